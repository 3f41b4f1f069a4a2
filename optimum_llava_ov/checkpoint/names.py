"""Find the original's name of a tensor that another library has named."""

from __future__ import annotations

import re
from collections.abc import Container


_PEFT_PREFIXES = ("base_model.model.", "base_model.")
# Names in transformers' LlavaForConditionalGeneration, before and since version 4.52, and the original's
_TRANSFORMERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:model\.)?language_model\.(lm_head\.)", r"\1"),
        (r"^(?:model\.)?language_model\.(?:model\.)?(?!transformer\.)", "model."),
        (r"^(?:model\.)?language_model\.transformer\.", "transformer."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^(?:model\.)?image_newline$", "model.image_newline"),
        (r"^(?:model\.)?vision_tower\.vision_model\.", "model.vision_tower.vision_tower.vision_model."),
    )
)


def without_peft(name: str) -> str:
    """Remove the prefix that PEFT puts before the names of the model that it has wrapped."""
    for prefix in _PEFT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def original_name(name: str, known: Container[str] | re.Pattern) -> str | None:
    """Return the name of a tensor in the original's checkpoints; `None` if it is not known.

    The original code, PEFT and transformers put different prefixes before the same names.

    Args:
        name: name without PEFT's prefix.
        known: names in the original's checkpoint, or a pattern of them.
    """
    candidates = [name, name.removeprefix("model."), f"model.{name}", f"transformer.{name}"]
    candidates += [pattern.sub(to, name) for pattern, to in _TRANSFORMERS if pattern.match(name)]
    for candidate in candidates:
        if known.fullmatch(candidate) if isinstance(known, re.Pattern) else candidate in known:
            return candidate
    return None
