"""The command, or the lines of Python, that make a bundle again, from what its `openvino_config.json` records."""

from __future__ import annotations

import shlex
from typing import Any

from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, ONE_BILLION, SMALL_PARTS


# What Optimum records about tools and defaults, not about the recipe
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
    """For each compressed part the options that say something: those that are set. Empty if nothing is compressed."""
    recipe = openvino_config.get("quantization_config") or {}
    configs = recipe.get("quantization_configs") or {}
    return {part: _said(config) for part, config in configs.items() if config}


def _said(config: dict[str, Any]) -> dict[str, Any]:
    said = {name: config[name] for name in ("dtype", "sym") if config.get(name) is not None}
    if config.get("quant_method") not in (None, "default"):
        said["quant_method"] = config["quant_method"]
    more = {
        name: value
        for name, value in config.items()
        if name not in _NOT_OPTIONS
        and value not in (None, False)
        and not (config["bits"] == 8 and name in ("group_size", "ratio"))
    }
    return (
        said
        | dict(sorted(more.items()))
        | ({"statistics_path": config["statistics_path"]} if config.get("statistics_path") else {})
    )


def export_command(openvino_config: dict[str, Any], parameters: int, output: str) -> str | None:
    """The export's command line, with every option spelled out.

    Args:
        openvino_config: content of the bundle's `openvino_config.json`.
        parameters: of the language model; from a billion on, the export compresses to 8 bits without being asked.
        output: folder to write to.

    Returns:
        `None` if no command line says what was done; see [`export_snippet`].
    """
    recipes, dtype = part_recipes(openvino_config), openvino_config.get("dtype")
    command = ["optimum-cli", "export", "openvino", "--model", openvino_config["converted_from"]["model"]]
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
    """Python that makes the bundle again, part by part."""
    recipes = part_recipes(openvino_config)
    parts = "\n".join(
        f'        "{part}": OVWeightQuantizationConfig(bits={4 if "4" in str(recipe["dtype"]) else 8}, {_arguments(recipe)}),'
        for part, recipe in recipes.items()
    )
    return (
        "from optimum.intel import OVConfig, OVPipelineQuantizationConfig, OVWeightQuantizationConfig\n"
        "from optimum_llava_ov import main_export\n\n"
        f"recipe = OVPipelineQuantizationConfig(\n    {{\n{parts}\n    }}\n)\n"
        f'main_export("{openvino_config["converted_from"]["model"]}", "{output}", ov_config=OVConfig(quantization_config=recipe))'
    )


def _arguments(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in recipe.items())
