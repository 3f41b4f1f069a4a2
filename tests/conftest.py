"""What the tests share: the golden checkpoints, bundles exported from them, and how to run code as a user would."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import programs
import pytest
from filelock import FileLock
from PIL import Image


os.environ["CI"] = "true"  # OpenVINO and NNCF then send no telemetry, which takes longer than a tiny model's export

# torch's threads wait for each other in a loop. Where tests run in parallel, this takes ten times what a tiny model computes. OpenMP reads
# this when torch is imported, here and in the programs that are started.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be all programs that are tested
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = Path(__file__).parent.parent / "examples"
# Exact arithmetic, so that tokens can be compared; the defaults trade it for speed.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def computes_in_bf16():
    """Return whether OpenVINO computes in bf16 on this processor unless it is told otherwise."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# These begin first, so that no process still works when the others have nothing left to do
LONGEST = (
    "test_snippets",
    "test_campaign",
    "test_names_of_the_hosts_can_be_imported_first",
    "test_engines",
    "test_it_gives_what_it_shows",
    "test_merging_keeps_more_than_pooling",
    "test_notebook",
    "test_stopped_at_every_call",
    "test_words_arrive_one_by_one_and_stop",
)


def pytest_configure() -> None:
    gc.disable()  # while tests are imported: what the imports leave stays for good


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.originalname not in LONGEST)


@dataclass(frozen=True)
class Golden:
    """Outputs of the original LLaVA code on a tiny random checkpoint (see `golden/README.md`)."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @cached_property
    def cases(self) -> dict[str, dict]:
        return json.loads((self.folder / "cases.json").read_text())["cases"]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "arrays.npz") as arrays:
            return dict(arrays)

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / "images" / f"{name}.png").convert("RGB")

    def images(self, case: str) -> list[Image.Image] | None:
        return [self.image(name) for name in self.cases[case]["images"]] or None

    def pixel_values(self, name: str) -> np.ndarray:
        """What the original's image processor gave, `(1, 3, height, width)`."""
        return self.arrays[f"{'pixel_values_pad' if 'pad' in self.name else 'pixel_values'}/{name}"]


class Once(dict):
    """Make each value when it is first asked for."""

    def __init__(self, make: Callable[[str], object]):
        super().__init__()
        self.make = make

    def __missing__(self, name: str) -> object:
        self[name] = self.make(name)
        return self[name]


GOLDENS = [Golden("linear_fp16_sharded"), Golden("mlp2x_fp32_pad")]
# Of other families. What the tests ask of every family, they ask of these too.
FAMILIES = [*GOLDENS, Golden("llava15_vicuna"), Golden("llava1_llama2chat")]
CASES = [(golden, case) for golden in GOLDENS for case in golden.cases]
by_case = pytest.mark.parametrize(("golden", "case"), CASES, ids=[f"{golden.name}-{case}" for golden, case in CASES])
by_golden = pytest.mark.parametrize("golden", GOLDENS, ids=[golden.name for golden in GOLDENS])
by_family = pytest.mark.parametrize("golden", FAMILIES, ids=[golden.name for golden in FAMILIES])
FAMILY_CASES = [(golden, case) for golden in FAMILIES for case in golden.cases]
by_family_case = pytest.mark.parametrize(
    ("golden", "case"), FAMILY_CASES, ids=[f"{golden.name}-{case}" for golden, case in FAMILY_CASES]
)


def run(
    *command: str | Path, env: dict[str, str] | None = None, check: bool = True, fresh: bool = False, **kwargs
) -> subprocess.CompletedProcess:
    """Run a program of this environment, such as `optimum-cli`, as a user would type it.

    In a process that `programs.py` forks, or, with `fresh`, in one that starts from nothing.
    """
    installed = Path(sys.executable).parent / command[0]
    command = [str(installed if installed.exists() else command[0]), *map(str, command[1:])]
    if not fresh:
        command = programs.quick(command, env)
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, **kwargs)
    assert not check or result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result


def quick_programs(folder: Path) -> Path:
    """Make a folder for `PATH` with `optimum-cli` and `python` that start quickly (`programs.py`), for shells."""
    folder.mkdir()
    here = Path(sys.executable)
    commands = {"optimum-cli": programs.quick([str(here.parent / "optimum-cli")])}
    commands["python"] = programs.quick([str(here), "a.py"])[:-1]
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def quick_path(tmp_path) -> str:
    """A PATH whose programs start quickly, for programs that are started by others."""
    folder = quick_programs(tmp_path / "bin")
    return f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run_stock(code: str, *arguments: str | Path, **kwargs) -> str:
    """Run Python where this package cannot be imported, as for somebody who never heard of it. Returns what it printed."""
    guard = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'optimum_llava_ov': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return run(sys.executable, "-c", guard + code, *arguments, **kwargs).stdout


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def fill_hub_cache(cache: Path, repositories: dict[str, Path]) -> None:
    """Put folders into a cache of the Hub as if they had been downloaded.

    A checkpoint among them names its tower as the real one does, by the id that is also in `repositories`.
    """
    for name, folder in repositories.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        tower = next((other for other in repositories if "clip" in other), None)
        config = json.loads((snapshot / "config.json").read_text())
        if tower and "mm_vision_tower" in config:
            (snapshot / "config.json").write_text(json.dumps({**config, "mm_vision_tower": tower}))


@pytest.fixture(scope="session", autouse=True)
def frozen_heap():
    """Each export collects garbage several times. What the imports have left need not be looked through again each time."""

    import optimum_llava_ov.export.pipeline  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes share which run tests in parallel."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # each process has its own below


@pytest.fixture(scope="session")
def export_once(shared_folder) -> Callable[..., Path]:
    """Exports a checkpoint by the real command, once for all processes that run tests in parallel. Tests do not write into it."""

    def export(name: str, checkpoint: Path, *options: str) -> Path:
        output = shared_folder / "bundles" / name
        with FileLock(shared_folder / f"{name}.lock"):
            if not output.exists():
                run("optimum-cli", "export", "openvino", "--model", checkpoint, *options, output)
        return output

    return export


@pytest.fixture(scope="session")
def bundles(export_once) -> dict[str, Path]:
    """Bundles of the golden checkpoints."""
    return Once(lambda name: export_once(name, Golden(name).checkpoint))


@pytest.fixture(scope="session")
def models(bundles):
    """The bundles, loaded in exact arithmetic."""
    from optimum_llava_ov import OVModelForLlava

    return Once(lambda name: OVModelForLlava.from_pretrained(bundles[name], ov_config=EXACT))


@pytest.fixture(scope="session")
def processors(bundles):
    from transformers import AutoProcessor

    return Once(lambda name: AutoProcessor.from_pretrained(bundles[name]))


@pytest.fixture(scope="session")
def shapes_bundle(export_once) -> Path:
    """A bundle of the model that answers about coloured shapes."""
    return export_once("shapes-ov", EXAMPLES / "shapes" / "checkpoint")


@pytest.fixture
def optimum_cli(monkeypatch, capfd):
    """Run the command in this process. Returns its exit status, and what it wrote to stdout and stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    from optimum.commands.optimum_cli import main

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?"))
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return command


class _Pictures(SimpleHTTPRequestHandler):
    """The example's pictures, and an address that leads to another host."""

    def do_GET(self):
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/a.png")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def website():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Pictures, directory=EXAMPLES / "shapes" / "pictures"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def torch_models():
    """The checkpoints in torch, in float32."""
    from optimum_llava_ov import OriginalLlavaForConditionalGeneration

    return Once(
        lambda name: OriginalLlavaForConditionalGeneration.from_pretrained(Golden(name).checkpoint, dtype="float32")
    )
