"""The families of language models, and which of them a `config.json` names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.families.llama import LlavaLlamaConfig
from optimum_llava_ov.checkpoint.families.mistral import LlavaMistralConfig
from optimum_llava_ov.checkpoint.families.mpt import LlavaMptConfig
from optimum_llava_ov.checkpoint.options import MAX_SETTINGS_BYTES, read_json, shown
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


FAMILIES: tuple[type[OriginalLlavaConfig], ...] = (LlavaMptConfig, LlavaLlamaConfig, LlavaMistralConfig)

# Optimum exports these with code from their repositories. Their configurations have LLaVA's options.
_OTHERS = ("llava-qwen2",)
# Relatives of LLaVA in its format: what is found in their `model_type` or architecture, and what they are
_RELATIVES = {
    "moe": "a mixture of experts (MoE-LLaVA)",
    "bunny": "a Bunny",
    "tinyllava": "a TinyLLaVA",
    "tiny_llava": "a TinyLLaVA",
    "phi": "a LLaVA with a Phi language model",
    "stablelm": "a LLaVA with a StableLM language model",
    "gemma": "a LLaVA with a Gemma language model",
    "qwen": "a LLaVA with a Qwen language model, such as LLaVA-OneVision",
    "lisa": "LISA, which has a decoder of masks",
    "glamm": "GLaMM, which has a decoder of masks",
    "matryoshka": "a matryoshka LLaVA",
    "m3": "a matryoshka LLaVA",
    "video": "a model of videos",
    "valley": "a model of videos",
}


def family_of(values: dict[str, Any]) -> type[OriginalLlavaConfig] | None:
    """Return the family that a `config.json` names by its architecture; `None` for any other model.

    `model_type` counts only where `architectures` is missing: transformers and others use "llava" too.
    """
    names = values.get("architectures")
    if isinstance(names, list) and names:
        # LoRA folders and projectors have the architecture of their base model
        is_llava = isinstance(values.get("mm_vision_tower"), str)
        return next(
            (
                family
                for family in FAMILIES
                if names[0] in family.original_architectures or (is_llava and names[0] in family.base_architectures)
            ),
            None,
        )
    return next((family for family in FAMILIES if values.get("model_type") == family.model_type), None)


def is_original(values: dict[str, Any]) -> bool:
    """Return whether a `config.json` is in LLaVA's original format, of a known family or of another."""
    if family_of(values) is not None:
        return True
    # No other format has this option. What has its own code, or is known to Optimum, is not ours.
    is_others = "auto_map" in values or values.get("model_type") in _OTHERS
    return isinstance(values.get("mm_vision_tower"), str) and not is_others


def names_original(file: Path) -> bool:
    """Return whether a `config.json` is in LLaVA's original format. A damaged one counts if it names a family."""
    try:
        return is_original(read_json(file))
    except InvalidCheckpointError:
        with suppress(OSError), file.open("rb") as stream:
            text = stream.read(MAX_SETTINGS_BYTES)
            return any(f'"{family.model_type}"'.encode() in text for family in FAMILIES)
        return False


def read_config(file: Path) -> OriginalLlavaConfig:
    """Read the configuration of an original checkpoint from its `config.json`.

    Raises:
        [`InvalidCheckpointError`]: the file is not a JSON object.
        [`UnsupportedCheckpointError`]: it describes another kind of model, or a model that our graph does not compute.
    """
    values = read_json(file)
    family = family_of(values)
    if family is None:
        raise UnsupportedCheckpointError(
            f"{file} describes {_kind(values)}. Expected an original LLaVA checkpoint with one of the architectures "
            f"{', '.join(name for family in FAMILIES for name in family.original_architectures)}. Nothing was "
            "converted."
        )
    if problems := family.problems(values):
        raise UnsupportedCheckpointError(
            f"{file} has options that optimum-llava-ov does not support for a LLaVA with {family.family}, and a "
            f"conversion would give wrong text: {'; '.join(problems)}. Nothing was converted."
        )
    config = family.from_dict(values)
    assert isinstance(config, OriginalLlavaConfig)  # `from_dict` returns a tuple only if it is asked for one
    return config


def _kind(values: dict[str, Any]) -> str:
    architectures, model_type = values.get("architectures"), values.get("model_type")
    name = f"{architectures} {model_type}".lower()
    relative = next((what for part, what in _RELATIVES.items() if part in name), "another model")
    return f"{relative} (architectures {shown(architectures)}, model_type {shown(model_type)})"
