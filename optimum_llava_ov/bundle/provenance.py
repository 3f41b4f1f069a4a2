"""Record how a bundle was made in `openvino_config.json`, for Optimum and for people."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimum.intel.openvino.configuration import OVConfig, OVPipelineQuantizationConfig


TOOLS = ("optimum-llava-ov", "optimum", "optimum-intel", "openvino", "nncf", "torch", "transformers")


def openvino_config(
    ov_config: OVConfig | None, recipe: OVPipelineQuantizationConfig | None, converted_from: dict[str, Any]
) -> OVConfig:
    """Make the content of `openvino_config.json`.

    Args:
        ov_config: requested configuration. Its dtype is used if there is no recipe.
        recipe: compression of each part. Only the names of the user's files are recorded, not their paths.
        converted_from: `converted_from` of the bundle's `config.json`.
    """
    config = (
        OVConfig(quantization_config=_without_paths(recipe))
        if recipe
        else OVConfig(dtype=ov_config.dtype if ov_config else None)
    )
    names = ("model", "revision", "vision_tower", "vision_tower_revision")
    config.converted_from = {name: converted_from.get(name) for name in names}
    more = (
        "tokenizer", "tokenizer_revision", "base_model", "base_model_revision", "adapters", "quantized_training",
        "lora",
    )  # fmt: skip
    config.converted_from |= {name: converted_from[name] for name in more if name in converted_from}
    config.versions = {tool: version(tool) for tool in TOOLS}
    return config


def _without_paths(recipe: OVPipelineQuantizationConfig) -> OVPipelineQuantizationConfig:
    """Replace paths by file names: a path is useless to others, and tells them about its owner."""
    recipe = recipe.clone()
    for config in filter(None, (*recipe.quantization_configs.values(), recipe.default_config)):
        if isinstance(config.dataset, list):
            config.dataset = [Path(name).name for name in config.dataset]
        if config.statistics_path is not None:
            config.statistics_path = Path(config.statistics_path).name
    return recipe
