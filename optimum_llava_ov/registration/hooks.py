"""What replaces something inside Optimum: the only module that patches the host.

[`activation`](activation.py) calls each function right after the host's module was imported. `tests/test_host.py` names what is
replaced, and fails with what to do when a new version of Optimum has moved it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import sys
from typing import TYPE_CHECKING

from optimum_llava_ov.host import is_supported


if TYPE_CHECKING:
    from collections.abc import Callable


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
    """Let `optimum-cli export openvino` take LLaVA-MPT checkpoints to our export.

    Not only `main_export`: the command itself would export to `/tmp` uncompressed, and load all of it again to compress it.
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
            # A model that nobody can read is not Optimum's to report either
            if (
                holds_original_checkpoint(self.args.model, any_name=True, cache_dir=self.args.cache_dir, **options)
                and is_supported()
            ):
                from optimum_llava_ov.cli.export import run_export

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


def hook_modeling() -> None:
    """Let `OVModelForVisualCausalLM.from_pretrained` give our class for our bundles, and its own for every other "llava"."""
    from optimum.intel.openvino import modeling_visual_language

    mapping = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING
    # The bundle's type and the checkpoint's
    mapping["llava"] = mapping["llava_mpt"] = _llava_class(mapping["llava"])


def _llava_class(stock: type) -> type:
    """The class of the model type "llava". Which one a model gets depends on its language model."""

    class OVLlava(stock):
        def __new__(cls, language_model, text_embeddings, vision_embeddings, config=None, *args, **kwargs):
            if cls is not OVLlava or config.text_config.model_type != "mpt":
                return super().__new__(cls)
            from optimum_llava_ov.modeling import OVModelForLlavaMPT

            OVLlava.register(OVModelForLlavaMPT)  # whoever asks whether a model is of the class in the table
            return OVModelForLlavaMPT(language_model, text_embeddings, vision_embeddings, config, *args, **kwargs)

    OVLlava.__name__, OVLlava.__qualname__, OVLlava.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return OVLlava
