"""Plugin of pytest that lets optimum-intel's tests run on our checkpoint.

Reads from standard input, a line each: the checkpoint, its bundle, an image, and the names of the tests to run.
"""

import importlib.machinery
import importlib.util
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType

import requests


CHECKPOINT, BUNDLE, IMAGE, *WANTED = sys.stdin.read().splitlines()
PLACE = "llava"  # the one of their models whose place ours takes


# What modules of tests import for other tests than those that are run; two of them need torchvision
NOT_NEEDED = ("evaluate", "open_clip", "timm", "optimum.intel.openvino.modeling_timm")


class _StandIn(ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return object


class _Image:
    """What `requests.get` gives for the photo that the tests download."""

    def __init__(self, *args, **kwargs):
        self.raw = open(IMAGE, "rb")  # noqa: SIM115


def pytest_configure(config):
    requests.get = _Image
    # They skip the comparison with torch for their own model, whose results differ with this OpenVINO
    unittest.TestCase.skipTest = lambda self, reason: None
    _skip_making_of_a_speech_model()
    import optimum_llava_ov  # noqa: F401

    sys.path.insert(
        0, str(config.rootpath if (config.rootpath / "utils_tests.py").exists() else config.invocation_params.dir)
    )
    import utils_tests

    for name in NOT_NEEDED:
        if importlib.util.find_spec(name.split(".")[0]) is None or "." in name:
            sys.modules[name] = _StandIn(name)
    utils_tests.MODEL_NAMES[PLACE] = CHECKPOINT


def _skip_making_of_a_speech_model():
    """Their models are listed by a module that first makes one of them, for which it needs a package, unless it finds its files."""
    tempfile.tempdir = tempfile.mkdtemp()
    folder = Path(tempfile.tempdir) / "optimum_intel_tiny_random_kokoro"
    for file in ("config.json", "tiny-kokoro-random.pth", "voices/tiny_voice.pt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _is_wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in kept:  # the bundle that one of the tests takes from the Hub, by an attribute that each instance sets
        item.cls.OV_VLM_MODEL_ID = property(lambda self: BUNDLE, lambda self, name: None)


def _is_wanted(item) -> bool:
    test = max(
        (name for name in WANTED if item.name == name or item.name.startswith(f"{name}_")), key=len, default=None
    )
    if test is None or not any(
        word in item.nodeid for word in ("VisualCausalLM", "VLMPipeline", "ExportModelTest", "visual_language")
    ):
        return False
    if item.name == test:
        return True
    place = item.name.removeprefix(f"{test}_").lstrip("0123456789").removeprefix("_")
    return place == PLACE
