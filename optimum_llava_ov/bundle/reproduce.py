"""Write the command or the Python code that makes a bundle again, from its `openvino_config.json`."""

from __future__ import annotations

import json
import shlex
from typing import Any

from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, ONE_BILLION, SMALL_PARTS
from optimum_llava_ov.checkpoint.conversation import MPT


# Entries about tools and defaults, which are not options of the recipe
_NOT_OPTIONS = (
    "_dataset_kwargs",
    "processor",
    "tokenizer",
    "weight_only",
    "quant_method",
    "dtype",
    "bits",
    "sym",
    "statistics_path",
)
_FLAGS = {"all_layers": "--all-layers", "scale_estimation": "--scale-estimation", "gptq": "--gptq"}
_FLAGS |= {"lora_correction": "--lora-correction"}
_VALUES = {"group_size": "--group-size", "ratio": "--ratio", "group_size_fallback": "--group-size-fallback"}
_VALUES |= {"backup_precision": "--backup-precision", "sensitivity_metric": "--sensitivity-metric"}
_VALUES |= {
    "dataset": "--dataset",
    "num_samples": "--num-samples",
    "statistics_path": "--quantization-statistics-path",
}


def part_recipes(openvino_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options that are set, for each compressed part. Empty if no part is compressed."""
    recipe = openvino_config.get("quantization_config") or {}
    configs = recipe.get("quantization_configs") or {}
    return {part: _set_options(config) for part, config in configs.items() if config}


def _set_options(config: dict[str, Any]) -> dict[str, Any]:
    options = {name: config[name] for name in ("dtype", "sym") if config.get(name) is not None}
    if config.get("quant_method") not in (None, "default"):
        options["quant_method"] = config["quant_method"]
    more = {
        name: value
        for name, value in config.items()
        if name not in _NOT_OPTIONS
        and value not in (None, False)
        and not (config["bits"] == 8 and name in ("group_size", "ratio"))
    }
    return (
        options
        | dict(sorted(more.items()))
        | ({"statistics_path": config["statistics_path"]} if config.get("statistics_path") else {})
    )


def model_kwargs(converted_from: dict[str, Any]) -> dict[str, Any]:
    """Return the `--model-kwargs` of the export: parts of a fine-tune, vision tower, tokenizer, tokens of an
    image, conversation.

    The conversation is named where it could depend on the folder's name.
    """
    names = [adapter["model"] for adapter in converted_from.get("adapters") or ()]
    own = names.index(converted_from["model"]) if converted_from["model"] in names else -1
    # A fine-tune of a fine-tune names its base itself
    options: dict[str, Any] = {"base_model": converted_from["base_model"]} if own == 0 else {}
    if names[own + 1 :]:
        options["adapters"] = names[own + 1 :]
    if lora := converted_from.get("lora"):
        options["lora"] = lora
    if converted_from.get("vision_tower_chosen"):
        options["vision_tower"] = converted_from["vision_tower"]
    if converted_from.get("tokenizer"):
        options["tokenizer"] = converted_from["tokenizer"]
    if reduction := converted_from.get("image_tokens"):
        options |= {"image_tokens": reduction["count"], "image_token_method": reduction["method"]}
    conversation = converted_from.get("conversation")
    return options if conversation in (None, MPT.name) else options | {"conversation": conversation}


def export_command(openvino_config: dict[str, Any], parameters: int, output: str) -> str | None:
    """Return the command line of the export, with all options.

    Args:
        openvino_config: content of the bundle's `openvino_config.json`.
        parameters: number of parameters of the language model. From a billion on, the export compresses to 8 bits by
            default.
        output: folder of the bundle in the command.

    Returns:
        `None` if no command line describes the export; see [`export_snippet`].
    """
    recipes, dtype = part_recipes(openvino_config), openvino_config.get("dtype")
    command = ["optimum-cli", "export", "openvino", "--model", openvino_config["converted_from"]["model"]]
    if parts := model_kwargs(openvino_config["converted_from"]):
        command += ["--model-kwargs", json.dumps(parts)]
    if not recipes:
        command += ["--weight-format", dtype] if dtype in ("fp16", "fp32") else []
    elif recipes.keys() == {LANGUAGE_MODEL} and recipes[LANGUAGE_MODEL] == {"dtype": "int8", "sym": False}:
        if parameters < ONE_BILLION:
            return None
    else:
        options = _options(recipes)
        if options is None:
            return None
        command += options
    return " ".join(shlex.quote(word) for word in [*command, output])


def _options(recipes: dict[str, dict[str, Any]]) -> list[str] | None:
    small = {"dtype": "int8", "sym": True}
    if recipes.keys() != {LANGUAGE_MODEL, *SMALL_PARTS} or any(recipes[part] != small for part in SMALL_PARTS):
        return None
    recipe = dict(recipes[LANGUAGE_MODEL])
    options = ["--weight-format", recipe.pop("dtype")] + (["--sym"] if recipe.pop("sym", False) else [])
    if recipe.pop("quant_method", None) == "awq":
        options.append("--awq")
    for name, value in recipe.items():
        if name in _FLAGS:
            options.append(_FLAGS[name])
        elif name in _VALUES:
            options += [_VALUES[name], str(value[0] if isinstance(value, list) else value)]
        else:
            return None
    return options


def export_snippet(openvino_config: dict[str, Any], output: str) -> str:
    """Return Python code that makes the bundle again, with a recipe for each part."""
    recipes, model = part_recipes(openvino_config), openvino_config["converted_from"]["model"]
    options = model_kwargs(openvino_config["converted_from"])
    more = f", model_kwargs={options!r}" if options else ""
    parts = "\n".join(
        f'        "{part}": OVWeightQuantizationConfig(bits={_bits(recipe)}, {_arguments(recipe)}),'
        for part, recipe in recipes.items()
    )
    return (
        "from optimum.intel import OVConfig, OVPipelineQuantizationConfig, OVWeightQuantizationConfig\n"
        "from optimum_llava_ov import main_export\n\n"
        f"recipe = OVPipelineQuantizationConfig(\n    {{\n{parts}\n    }}\n)\n"
        f'main_export("{model}", "{output}", ov_config=OVConfig(quantization_config=recipe){more})'
    )


def _bits(recipe: dict[str, Any]) -> int:
    return 4 if "4" in str(recipe["dtype"]) else 8


def _arguments(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in recipe.items())
