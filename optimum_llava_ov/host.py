"""Everything of Optimum and NNCF that is not public and that we touch. Nothing else in this package does.

`tests/test_host.py` names each of these and fails with what to do when a new version of Optimum has moved one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

SUPPORTED_OPTIMUM_INTEL = ">=2.2,<2.3"


def is_supported() -> bool:
    """Whether this version of optimum-intel is one we know. Says what to install if not."""
    from packaging.specifiers import SpecifierSet

    found = version("optimum-intel")
    if SpecifierSet(SUPPORTED_OPTIMUM_INTEL).contains(found, prereleases=True):
        return True
    logger.warning(
        "optimum-llava-ov %s does not know optimum-intel %s and stays out of its way: LLaVA-MPT checkpoints cannot be exported. "
        'Install a version it knows: pip install "optimum-intel%s"',
        version("optimum-llava-ov"),
        found,
        SUPPORTED_OPTIMUM_INTEL,
    )
    return False


def hook_exporter() -> None:
    """Let `main_export` and `export_from_model` take LLaVA-MPT to our export, and everything else where it always went."""
    from optimum.exporters.openvino import __main__ as exporter
    from optimum.exporters.openvino import convert

    from optimum_llava_ov.export import configs  # noqa: F401  registers the export configuration

    _replace("main_export", _main_export_for_all(exporter.main_export))
    _replace("export_from_model", _export_from_model_for_all(convert.export_from_model))


def _replace(name: str, ours: Callable) -> None:
    """Put a function in the place of the one that it wraps, also in modules that were imported before us and hold it by name."""
    for module in [module for name, module in sys.modules.items() if name.startswith("optimum.")]:
        if getattr(module, name, None) is ours.__wrapped__:
            setattr(module, name, ours)


def _main_export_for_all(original: Callable) -> Callable:
    @functools.wraps(original)
    def main_export(*args, **kwargs):
        from optimum_llava_ov.checkpoint.reader import is_original_checkpoint
        from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS

        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs_shapes", {}))
        hub_options = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
        if not is_original_checkpoint(arguments["model_name_or_path"], **hub_options):
            return original(*args, **kwargs)

        from optimum_llava_ov.export.main import main_export as export_llava_mpt

        return export_llava_mpt(**arguments)

    return main_export


def _export_from_model_for_all(original: Callable) -> Callable:
    @functools.wraps(original)
    def export_from_model(*args, **kwargs):
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        if getattr(arguments["model"].config, "model_type", None) != "llava_mpt":
            return original(*args, **kwargs)

        from optimum_llava_ov.export.main import export_from_model as export_llava_mpt

        arguments.update(arguments.pop("kwargs_shapes", {}))
        return export_llava_mpt(**arguments)

    return export_from_model


def hook_command() -> None:
    """Let `optimum-cli export openvino` take LLaVA-MPT checkpoints to our export.

    Not only `main_export`: the command itself would export to `/tmp` uncompressed, and load all of it again to compress it.
    """
    from optimum.commands.export import openvino

    original, original_parse_args = openvino.OVExportCommand.run, openvino.OVExportCommand.parse_args

    @functools.wraps(original)
    def run(self):
        from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
        from optimum_llava_ov.cli.exit import exit_status

        options = {name: getattr(self.args, name) for name in _EXPORT_OPTIONS if getattr(self.args, name, None) is not None}
        with exit_status(getattr(self.args, "verbose", False), options.get("token")):
            # A model that nobody can read is not Optimum's to report either
            if (
                holds_original_checkpoint(self.args.model, any_name=True, cache_dir=self.args.cache_dir, **options)
                and is_supported()
            ):
                from optimum_llava_ov.export.command import run_export

                return run_export(self.args)
            if options:
                raise ValueError(
                    f"{', '.join('--' + name for name in options)}: only for LLaVA-MPT checkpoints. {self.args.model!r} is none, or cannot "
                    "be read with them."
                )
        return original(self)

    @functools.wraps(original_parse_args)
    def parse_args(parser):
        from optimum_llava_ov.cli.exit import VERBOSE_HELP

        original_parse_args(parser)
        group = parser.add_argument_group("Where a LLaVA-MPT checkpoint is on the Hub")
        for name, text in _EXPORT_OPTIONS.items():
            with contextlib.suppress(argparse.ArgumentError):  # should Optimum have it one day
                group.add_argument(f"--{name}", help=text)
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument("--verbose", action="store_true", help=f"Of a LLaVA-MPT checkpoint: {VERBOSE_HELP}")

    openvino.OVExportCommand.run, openvino.OVExportCommand.parse_args = run, staticmethod(parse_args)


_EXPORT_OPTIONS = {
    "revision": "Branch, tag or commit to export.",
    "subfolder": "Folder of the repository that the checkpoint is in.",
    "token": "Token for private repositories (default: that of `hf auth login`, or HF_TOKEN).",
}


def hook_default_recipes() -> None:
    """Enter the default recipes into Optimum's tables, under the model's id."""
    from optimum.intel.openvino import configuration

    from optimum_llava_ov.export.recipes import default_recipe

    for model_id in DEFAULT_RECIPE_IDS:
        configuration._DEFAULT_4BIT_WQ_CONFIGS[model_id] = default_recipe("int4")
        configuration._DEFAULT_8BIT_WQ_CONFIGS[model_id] = default_recipe("int8")


DEFAULT_RECIPE_IDS = ("liuhaotian/LLaVA-Lightning-MPT-7B-preview",)


def compress_weights(model, config, dataset=None):
    """NNCF's weight compression as Optimum configures it, runtime options of the graph included."""
    from optimum.intel.openvino.quantization import _weight_only_quantization

    return _weight_only_quantization(model, config, dataset, verify_not_optimized=False)


@contextlib.contextmanager
def compressing(keep):
    """While NNCF compresses, put each constant it makes through `keep`, which takes and returns an OpenVINO `Constant`."""
    from nncf.quantization.algorithms.weight_compression import openvino_backend as backend

    original = backend.create_ov_const_from_tensor
    backend.create_ov_const_from_tensor = lambda *args, **kwargs: keep(original(*args, **kwargs))
    try:
        yield
    finally:
        backend.create_ov_const_from_tensor = original


@contextlib.contextmanager
def exporting(transform=None, save_model=None):
    """While Optimum exports, skip the second trace and give each graph to `transform` before it is written.

    The second trace compares with the first: half of the export's time at 7B, and for graphs without branches no news.

    Args:
        transform: takes and returns an `openvino.Model`.
        save_model: writes it, in place of `openvino.save_model`.
    """
    from optimum.exporters.openvino import convert

    originals = convert._save_model, convert.allow_skip_tracing_check, convert.save_model

    @functools.wraps(convert._save_model)
    def save(model, *args, **kwargs):
        return originals[0](transform(model) if transform else model, *args, **kwargs)

    convert._save_model, convert.allow_skip_tracing_check = save, lambda *args: True
    convert.save_model = save_model or convert.save_model
    try:
        yield
    finally:
        convert._save_model, convert.allow_skip_tracing_check, convert.save_model = originals


def hook_modeling() -> None:
    """Let `OVModelForVisualCausalLM.from_pretrained` give our class for our bundles, and its own for every other "llava"."""
    from optimum.intel.openvino import modeling_visual_language

    mapping = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING
    # The bundle's type and the checkpoint's
    llava = mapping["llava"] = mapping["llava_mpt"] = _llava_class(mapping["llava"])
    visual = modeling_visual_language.OVModelForVisualCausalLM
    visual.from_pretrained = classmethod(_from_pretrained_for_all(visual, llava))


def _from_pretrained_for_all(visual: type, llava: type) -> Callable:
    """Let our class load folders with a LLaVA-MPT. Without a network, the host looks for each folder in the Hub's cache."""
    original = visual.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        arguments = inspect.signature(original).bind(cls, *args, **kwargs).arguments
        if cls is not visual or not _is_in_folder(Path(arguments["model_id"]) / (arguments.get("subfolder") or "")):
            return original(cls, *args, **kwargs)
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["cls"]
        return _our_class(llava).from_pretrained(**arguments)

    return from_pretrained


def _is_in_folder(folder: Path) -> bool:
    """Whether a folder has a LLaVA-MPT: a bundle, or an original checkpoint."""
    from optimum_llava_ov.bundle.check import check_is_llava_mpt
    from optimum_llava_ov.checkpoint.config import names_our_model
    from optimum_llava_ov.checkpoint.options import read_json

    file = folder / "config.json"
    if not file.is_file():
        return False
    with contextlib.suppress(ValueError):
        check_is_llava_mpt(folder, read_json(file))
        return True
    return names_our_model(file)


def _llava_class(stock: type) -> type:
    """The class of the model type "llava". Which one a model gets depends on its language model."""

    class OVLlava(stock):
        def __new__(cls, language_model, text_embeddings, vision_embeddings, config=None, *args, **kwargs):
            if cls is not OVLlava or config.text_config.model_type != "mpt":
                return super().__new__(cls)
            return _our_class(OVLlava)(language_model, text_embeddings, vision_embeddings, config, *args, **kwargs)

    OVLlava.__name__, OVLlava.__qualname__, OVLlava.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return OVLlava


def _our_class(llava: type) -> type:
    """Our class. Whoever asks whether a model of it is of the class `llava` in the host's table is told so."""
    from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT

    llava.register(OVModelForLlavaMPT)
    return OVModelForLlavaMPT


def named_datasets() -> dict[str, dict]:
    """Data sets for vision-language models that Optimum knows by name: for each `id`, `split`, and `inputs` with its columns."""
    from optimum.intel.openvino.utils import PREDEFINED_VISUAL_LM_DATASETS

    return PREDEFINED_VISUAL_LM_DATASETS
