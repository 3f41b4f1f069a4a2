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
    """Let `main_export` and `export_from_model` export original LLaVA checkpoints with this package."""
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
        from optimum_llava_ov.checkpoint.reader import find_original
        from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS

        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs_shapes", {}))
        hub_options = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
        base_model = (arguments.get("model_kwargs") or {}).get("base_model")
        repository = None
        with contextlib.suppress(ValueError, OSError):  # Optimum reports what is wrong with it
            repository = find_original(arguments["model_name_or_path"], base_model=base_model, **hub_options)
        if repository is None:
            return original(*args, **kwargs)

        from optimum_llava_ov.export.pipeline import main_export as export_llava

        return export_llava(**{**arguments, "model_name_or_path": repository})

    return main_export


def _export_from_model_for_all(original: Callable) -> Callable:
    @functools.wraps(original)
    def export_from_model(*args, **kwargs):
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig

        if not isinstance(getattr(arguments["model"], "config", None), OriginalLlavaConfig):
            return original(*args, **kwargs)

        from optimum_llava_ov.export.pipeline import export_from_model as export_llava

        arguments.update(arguments.pop("kwargs_shapes", {}))
        return export_llava(**arguments)

    return export_from_model


def hook_command() -> None:
    """Let `optimum-cli export openvino` use our export for original LLaVA checkpoints.

    Replacing `main_export` is not enough: the command would export to `/tmp` without compression, then load the result
    again and compress it.
    """
    from optimum.commands.export import openvino

    original, original_parse_args = openvino.OVExportCommand.run, openvino.OVExportCommand.parse_args

    @functools.wraps(original)
    def run(self):
        from optimum_llava_ov.checkpoint.reader import find_original
        from optimum_llava_ov.cli.exit import exit_status

        options = {
            name: getattr(self.args, name) for name in _EXPORT_OPTIONS if getattr(self.args, name, None) is not None
        }
        with exit_status(getattr(self.args, "verbose", False), options.get("token")):
            # This also reports a model that cannot be read, instead of Optimum
            repository = find_original(
                self.args.model,
                any_name=True,
                base_model=(getattr(self.args, "model_kwargs", None) or {}).get("base_model"),
                cache_dir=self.args.cache_dir,
                **options,
            )
            if repository is not None and is_supported():
                from optimum_llava_ov.cli.export import run_export

                return run_export(self.args, repository)
            if getattr(self.args, "image_tokens", None) is not None:
                options["image-tokens"] = self.args.image_tokens
            if options:
                raise ValueError(
                    f"{', '.join('--' + name for name in options)}: only for original LLaVA checkpoints. "
                    f"{self.args.model!r} is not one, or cannot be read with these options."
                )
        return original(self)

    @functools.wraps(original_parse_args)
    def parse_args(parser):
        from optimum_llava_ov.cli.exit import VERBOSE_HELP

        original_parse_args(parser)
        group = parser.add_argument_group("Location of an original LLaVA checkpoint on the Hub")
        for name, text in _EXPORT_OPTIONS.items():
            with contextlib.suppress(argparse.ArgumentError):  # a later Optimum may have it
                group.add_argument(f"--{name}", help=text)
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(
                "--image-tokens",
                type=int,
                metavar="N",
                help="For original LLaVA checkpoints: reduce the patches of an image to this number of tokens, which "
                "makes the first token of an answer faster and can change answers (default: all patches).",
            )
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(
                "--verbose", action="store_true", help=f"For original LLaVA checkpoints: {VERBOSE_HELP}"
            )

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

    from optimum_llava_ov.bundle.check import MODEL_TYPES
    from optimum_llava_ov.checkpoint.families import FAMILIES

    mapping = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING
    # The model types of the bundles and of the checkpoints
    mapping.update({model_type: _llava_class(mapping[model_type]) for model_type in MODEL_TYPES})
    mapping.update({family.model_type: mapping["llava"] for family in FAMILIES})
    visual = modeling_visual_language.OVModelForVisualCausalLM
    visual.from_pretrained = classmethod(_from_pretrained_for_all(visual, [mapping[name] for name in MODEL_TYPES]))


def _from_pretrained_for_all(visual: Any, llava_classes: list[Any]) -> Callable:
    """Let our class load an original checkpoint, or a bundle that this package made of one.

    The host takes "llava" for the type of transformers' own models. Without a network, it looks for any folder in the
    Hub's cache.
    """
    original = visual.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        arguments = inspect.signature(original).bind(cls, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["cls"]
        ours = _class_for(**arguments) if cls is visual else None
        if ours is None:
            return original(cls, *args, **kwargs)
        for llava in llava_classes:
            llava.register(ours)
        return ours.from_pretrained(**arguments)

    return from_pretrained


def _class_for(model_id: str | Path, **options: Any) -> Any:
    """Return our class for our bundles and for original checkpoints; `None` for other models."""
    from optimum_llava_ov.bundle.check import MODEL_TYPES, is_our_bundle
    from optimum_llava_ov.checkpoint.families import family_of, names_original
    from optimum_llava_ov.checkpoint.options import read_json
    from optimum_llava_ov.checkpoint.reader import is_original_checkpoint
    from optimum_llava_ov.checkpoint.repository import Repository

    config_file = None
    with contextlib.suppress(ValueError, OSError):  # the host reports what is wrong with it
        repository = Repository.of(model_id, any_name=True, **options)
        config_file = repository.get("config.json")
        if config_file is None and is_original_checkpoint(repository, base_model=options.get("base_model")):
            return _our_class(None)  # an adapter
    if config_file is None:
        return None
    with contextlib.suppress(ValueError):
        values = read_json(config_file)
        if values.get("model_type") in MODEL_TYPES and is_our_bundle(values):
            return _our_class(values["text_config"]["model_type"])
        if (family := family_of(values)) is not None:
            return _our_class(family.text_model_type)
    return _our_class(None) if names_original(config_file) else None  # says what is wrong with it


def _llava_class(stock: type) -> Any:
    """Make a class for a model type of bundles that chooses Optimum's class or ours, by who made the bundle.

    `isinstance` with it is true for the models of our classes.
    """
    from optimum_llava_ov.bundle.check import is_our_bundle

    class OVLlava(stock):
        def __new__(cls, language_model, text_embeddings, vision_embeddings, config=None, *args, **kwargs):
            if cls is not OVLlava or not is_our_bundle(config.to_dict()):
                return super().__new__(cls)
            ours = _our_class(config.text_config.model_type)
            OVLlava.register(ours)
            return ours(language_model, text_embeddings, vision_embeddings, config, *args, **kwargs)

    OVLlava.__name__, OVLlava.__qualname__, OVLlava.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return OVLlava


def _our_class(text_model_type: str | None) -> Any:
    from optimum_llava_ov.modeling import OVModelForLlava, OVModelForLlavaMPT

    return OVModelForLlavaMPT if text_model_type == "mpt" else OVModelForLlava
