"""Choose how each part is compressed, from the default recipes and the options of the user."""

from __future__ import annotations

from typing import Any

# Not from `optimum.intel`, because this module is imported while `optimum.intel` is being imported
from optimum.intel.openvino.configuration import (
    OVConfig,
    OVPipelineQuantizationConfig,
    OVQuantizationConfigBase,
    OVQuantizationMethod,
    OVWeightQuantizationConfig,
)

from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, SMALL_PARTS


# As in Optimum, small parts have 8 bits even if the language model has fewer
SMALL_PART_RECIPE: dict[str, Any] = {"bits": 8, "sym": True, "weight_only": True}

# The recipe of the OpenVINO notebook for LLaVA: 4 bits for 80 % of the layers' weights, 8 bits for the most sensitive
# ones. "adjust" has no effect at 7B. With it, models whose width is not a multiple of 128 can use the same recipe.
INT4_RECIPE: dict[str, Any] = {
    "bits": 4,
    "sym": False,
    "group_size": 128,
    "ratio": 0.8,
    "group_size_fallback": "adjust",
}
INT8_RECIPE: dict[str, Any] = {"bits": 8, "sym": False, "weight_only": True}


def default_recipe(weight_format: str) -> dict[str, Any]:
    """Return the default recipe for `int4` or `int8`, in the format of Optimum's tables of defaults."""
    language_model = {"int4": INT4_RECIPE, "int8": INT8_RECIPE}[weight_format]
    return {
        "quantization_configs": {
            LANGUAGE_MODEL: dict(language_model),
            **{part: dict(SMALL_PART_RECIPE) for part in SMALL_PARTS},
        }
    }


def recipe_of(quantization_config: OVQuantizationConfigBase | dict[str, Any]) -> OVPipelineQuantizationConfig:
    """Convert a quantization configuration of any type of Optimum to one with a configuration for each part.

    Args:
        quantization_config: a configuration for the language model, with 8 bits for the small parts; or a
            configuration for each part. As in Optimum, `{"bits": 4}` and `{"bits": 8}` stand for the default recipes.

    Raises:
        `ValueError`: the configuration quantizes activations, or names a part that a bundle does not have.
    """
    if quantization_config in ({"bits": 4}, {"bits": 8}):
        quantization_config = default_recipe(f"int{quantization_config['bits']}")
    if isinstance(quantization_config, dict):
        quantization_config = OVConfig(quantization_config=quantization_config).quantization_config
    if isinstance(quantization_config, OVWeightQuantizationConfig):
        small = {part: OVWeightQuantizationConfig(**SMALL_PART_RECIPE) for part in SMALL_PARTS}
        quantization_config = OVPipelineQuantizationConfig({LANGUAGE_MODEL: quantization_config, **small})
    if not isinstance(quantization_config, OVPipelineQuantizationConfig):
        raise ValueError(  # noqa: TRY004  errors for users are ValueErrors
            f"{type(quantization_config).__name__} quantizes activations, which is not supported for LLaVA: the "
            "speed of a decoder depends on the size of its weights. Use OVWeightQuantizationConfig, or "
            "OVPipelineQuantizationConfig with one for each part."
        )
    _check_parts(quantization_config)
    return quantization_config


def _check_parts(recipe: OVPipelineQuantizationConfig) -> None:
    parts = (LANGUAGE_MODEL, *SMALL_PARTS)
    if unknown := set(recipe.quantization_configs) - set(parts):
        raise ValueError(f"A LLaVA has no part {', '.join(sorted(unknown))}. Its parts are {', '.join(parts)}.")
    for part, config in recipe.quantization_configs.items():
        if not isinstance(config, OVWeightQuantizationConfig):
            raise ValueError(  # noqa: TRY004  errors for users are ValueErrors
                f"{part} has a {type(config).__name__}. Expected an OVWeightQuantizationConfig."
            )


def recipe_for_part(recipe: OVPipelineQuantizationConfig, part: str) -> OVWeightQuantizationConfig | None:
    """Return the configuration of one part; `None` if the part is not compressed."""
    return recipe.quantization_configs.get(part, recipe.default_config)


def needs_data(config: OVWeightQuantizationConfig | None) -> bool:
    """Return whether the compression of a part is data-aware."""
    return config is not None and config.bits == 4 and config.dataset is not None


def reads_each_weight(config: OVWeightQuantizationConfig | None) -> bool:
    """Return whether a part is compressed weight by weight, without running it and without changing weights first."""
    if config is None or needs_data(config):
        return False
    more = (config.scale_estimation, config.gptq, config.lora_correction)
    return not any(more) and config.quant_method in (None, OVQuantizationMethod.DEFAULT)


def bytes_per_weight(config: OVWeightQuantizationConfig) -> float:
    """Return an upper estimate of the bytes of a weight, with its share of a scale of 2 bytes and a zero point."""
    if config.bits == 8:
        return 1.01
    group_size = config.group_size if config.group_size and config.group_size > 0 else 128
    return config.ratio * (0.5 + 2.5 / group_size) + (1 - config.ratio) * 1.01 + 0.05
