"""Replace functions, classes and table entries of Optimum. Only this module patches the host.

[`activation`](activation.py) calls each function right after the host's module is imported. `tests/test_host.py` lists
what is replaced. If a new version of Optimum moves one of these, the tests fail and say what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_llava_ov.host import is_supported


if TYPE_CHECKING:
    from collections.abc import Callable


def hook_exporter() -> None:
    """Let `main_export` and `export_from_model` use our export for LLaVA-MPT, and Optimum's for all other models."""
    from optimum.exporters.openvino import __main__ as exporter
    from optimum.exporters.openvino import convert

    from optimum_llava_ov.export import configs  # noqa: F401  registers the export configuration

    _replace("main_export", exporter.main_export, _main_export_for_all(exporter.main_export))
    _replace("export_from_model", convert.export_from_model, _export_from_model_for_all(convert.export_from_model))


def _replace(name: str, original: Callable, ours: Callable) -> None:
    """Replace a function in all modules of Optimum that have imported it under this name."""
    for module in [module for name, module in sys.modules.items() if name.startswith("optimum.")]:
        if getattr(module, name, None) is original:
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

        from optimum_llava_ov.export.pipeline import main_export as export_llava_mpt

        return export_llava_mpt(**arguments)

    return main_export


def _export_from_model_for_all(original: Callable) -> Callable:
    @functools.wraps(original)
    def export_from_model(*args, **kwargs):
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        if getattr(arguments["model"].config, "model_type", None) != "llava_mpt":
            return original(*args, **kwargs)

        from optimum_llava_ov.export.pipeline import export_from_model as export_llava_mpt

        arguments.update(arguments.pop("kwargs_shapes", {}))
        return export_llava_mpt(**arguments)

    return export_from_model


def hook_command() -> None:
    """Let `optimum-cli export openvino` use our export for LLaVA-MPT checkpoints.

    Replacing `main_export` is not enough: the command would export to `/tmp` without compression, then load the result
    again and compress it.
    """
    from optimum.commands.export import openvino

    original, original_parse_args = openvino.OVExportCommand.run, openvino.OVExportCommand.parse_args

    @functools.wraps(original)
    def run(self):
        from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
        from optimum_llava_ov.cli.exit import exit_status

        options = {
            name: getattr(self.args, name) for name in _EXPORT_OPTIONS if getattr(self.args, name, None) is not None
        }
        with exit_status(getattr(self.args, "verbose", False), options.get("token")):
            # This also reports a model that cannot be read, instead of Optimum
            if (
                holds_original_checkpoint(self.args.model, any_name=True, cache_dir=self.args.cache_dir, **options)
                and is_supported()
            ):
                from optimum_llava_ov.cli.export import run_export

                return run_export(self.args)
            if options:
                raise ValueError(
                    f"{', '.join('--' + name for name in options)}: only for LLaVA-MPT checkpoints. "
                    f"{self.args.model!r} is not one, or cannot be read with these options."
                )
        return original(self)

    @functools.wraps(original_parse_args)
    def parse_args(parser):
        from optimum_llava_ov.cli.exit import VERBOSE_HELP

        original_parse_args(parser)
        group = parser.add_argument_group("Location of a LLaVA-MPT checkpoint on the Hub")
        for name, text in _EXPORT_OPTIONS.items():
            with contextlib.suppress(argparse.ArgumentError):  # a later Optimum may have it
                group.add_argument(f"--{name}", help=text)
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument("--verbose", action="store_true", help=f"For LLaVA-MPT checkpoints: {VERBOSE_HELP}")

    openvino.OVExportCommand.run, openvino.OVExportCommand.parse_args = run, staticmethod(parse_args)


_EXPORT_OPTIONS = {
    "revision": "Branch, tag or commit to export.",
    "subfolder": "Folder of the checkpoint in its repository.",
    "token": "Token for private repositories (default: the token of `hf auth login`, or HF_TOKEN).",
}


def hook_default_recipes() -> None:
    """Add the default recipes to Optimum's tables, under the model's id."""
    from optimum.intel.openvino import configuration

    from optimum_llava_ov.export.recipes import default_recipe

    for model_id in DEFAULT_RECIPE_IDS:
        configuration._DEFAULT_4BIT_WQ_CONFIGS[model_id] = default_recipe("int4")
        configuration._DEFAULT_8BIT_WQ_CONFIGS[model_id] = default_recipe("int8")


DEFAULT_RECIPE_IDS = ("liuhaotian/LLaVA-Lightning-MPT-7B-preview",)


def hook_modeling() -> None:
    """Let `OVModelForVisualCausalLM.from_pretrained` use our class for our bundles, and its own for other models."""
    from optimum.intel.openvino import modeling_visual_language

    mapping = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING
    # The model types of the bundle and of the checkpoint
    llava = mapping["llava"] = mapping["llava_mpt"] = _llava_class(mapping["llava"])
    visual = modeling_visual_language.OVModelForVisualCausalLM
    visual.from_pretrained = classmethod(_from_pretrained_for_all(visual, llava))


def _from_pretrained_for_all(visual: Any, llava: Any) -> Callable:
    """Let our class load folders that hold a LLaVA-MPT.

    Without a network, the host looks for any folder in the Hub's cache.
    """
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
    """Return whether a folder holds a LLaVA-MPT: a bundle or an original checkpoint."""
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


def _llava_class(stock: type) -> Any:
    """Make a class for the model type "llava" that chooses between Optimum's class and ours by the language model."""

    class OVLlava(stock):
        def __new__(cls, language_model, text_embeddings, vision_embeddings, config=None, *args, **kwargs):
            if cls is not OVLlava or config.text_config.model_type != "mpt":
                return super().__new__(cls)
            return _our_class(OVLlava)(language_model, text_embeddings, vision_embeddings, config, *args, **kwargs)

    OVLlava.__name__, OVLlava.__qualname__, OVLlava.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return OVLlava


def _our_class(llava: Any) -> Any:
    """Return our class. `isinstance` with the class `llava` of the host's table is true for its models."""
    from optimum_llava_ov.modeling import OVModelForLlavaMPT

    llava.register(OVModelForLlavaMPT)
    return OVModelForLlavaMPT
