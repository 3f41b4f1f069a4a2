"""Which part is compressed how: the default recipes, and what a user's options mean for each part."""

from __future__ import annotations

from typing import Any

# Not from `optimum.intel`: this module is imported while that one is being
from optimum.intel.openvino.configuration import (
    OVConfig,
    OVPipelineQuantizationConfig,
    OVQuantizationConfigBase,
    OVWeightQuantizationConfig,
)

from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, SMALL_PARTS


# Small parts are kept in 8 bits whatever the language model gets, as Optimum does.
SMALL_PART_RECIPE = {"bits": 8, "sym": True, "weight_only": True}

# The recipe of the OpenVINO notebook for LLaVA: 4 bits for 80 % of the layers' weights, 8 bits for those that would suffer most.
# "adjust" changes nothing at 7B; it lets models whose width is no multiple of 128 use the same recipe.
INT4_RECIPE = {"bits": 4, "sym": False, "group_size": 128, "ratio": 0.8, "group_size_fallback": "adjust"}
INT8_RECIPE = {"bits": 8, "sym": False, "weight_only": True}


def default_recipe(weight_format: str) -> dict[str, Any]:
    """Recommended recipe for `int4` or `int8`, as Optimum's tables of defaults hold them."""
    language_model = {"int4": INT4_RECIPE, "int8": INT8_RECIPE}[weight_format]
    return {
        "quantization_configs": {
            LANGUAGE_MODEL: dict(language_model),
            **{part: dict(SMALL_PART_RECIPE) for part in SMALL_PARTS},
        }
    }


def recipe_of(quantization_config: OVQuantizationConfigBase | dict[str, Any]) -> OVPipelineQuantizationConfig:
    """What a quantization configuration of any of Optimum's kinds means for each part.

    Args:
        quantization_config: one for the language model, in which case the small parts get 8 bits; or one for each part.
            `{"bits": 4}` and `{"bits": 8}`, as in Optimum, stand for the default recipe.

    Raises:
        `ValueError`: it quantizes activations, or names a part that LLaVA-MPT does not have.
    """
    if quantization_config in ({"bits": 4}, {"bits": 8}):
        quantization_config = default_recipe(f"int{quantization_config['bits']}")
    if isinstance(quantization_config, dict):
        quantization_config = OVConfig(quantization_config=quantization_config).quantization_config
    if isinstance(quantization_config, OVWeightQuantizationConfig):
        small = {part: OVWeightQuantizationConfig(**SMALL_PART_RECIPE) for part in SMALL_PARTS}
        quantization_config = OVPipelineQuantizationConfig({LANGUAGE_MODEL: quantization_config, **small})
    if not isinstance(quantization_config, OVPipelineQuantizationConfig):
        raise ValueError(
            f"{type(quantization_config).__name__} quantizes activations, which is not supported for LLaVA-MPT: a decoder's speed is "
            "set by the size of its weights. Use OVWeightQuantizationConfig, or OVPipelineQuantizationConfig with one for each part."
        )
    _check_parts(quantization_config)
    return quantization_config


def _check_parts(recipe: OVPipelineQuantizationConfig) -> None:
    parts = (LANGUAGE_MODEL, *SMALL_PARTS)
    if unknown := set(recipe.quantization_configs) - set(parts):
        raise ValueError(f"LLaVA-MPT has no part {', '.join(sorted(unknown))}. Its parts are {', '.join(parts)}.")
    for part, config in recipe.quantization_configs.items():
        if not isinstance(config, OVWeightQuantizationConfig):
            raise ValueError(
                f"{part} is given a {type(config).__name__}; only OVWeightQuantizationConfig is supported for LLaVA-MPT."
            )


def recipe_for_part(recipe: OVPipelineQuantizationConfig, part: str) -> OVWeightQuantizationConfig | None:
    """Configuration of one part, or `None` if it is left as it is."""
    return recipe.quantization_configs.get(part, recipe.default_config)


def needs_data(config: OVWeightQuantizationConfig | None) -> bool:
    """Whether a part is compressed with a look at what flows through it."""
    return config is not None and config.bits == 4 and config.dataset is not None
