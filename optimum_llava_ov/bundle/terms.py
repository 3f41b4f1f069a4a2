"""Terms of use of known checkpoints, as data: their licenses, and notes for the legal section of a card.

A license is used only if the checkpoint's own card names none. Most cards of LLaVA's authors name it in their text,
but not in the metadata.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class _License(NamedTuple):
    model_id: str  # pattern of model ids, in lower case
    license_id: str  # as the Hub calls it


class _Note(NamedTuple):
    text_model_type: str  # type of the language model in transformers
    name: str  # pattern to find in the name of the checkpoint, in lower case
    text: str  # Markdown


_LICENSES = (
    _License(r"liuhaotian/llava-lightning-mpt-7b-preview", "cc-by-nc-sa-4.0"),
    _License(r"liuhaotian/llava-v1\.5-(7b|13b)(-lora)?", "llama2"),
    _License(r"liuhaotian/llava-v1\.6-vicuna-(7b|13b)", "llama2"),
    _License(r"liuhaotian/llava-llama-2-(7b|13b)-chat-lightning(-lora)?-preview", "llama2"),
    _License(r"lin-chen/sharegpt4v-(7b|13b)", "llama2"),
    # LLaMA 1: a license of its own, for research that is not commercial
    _License(r"liuhaotian/llava-.*vicuna-(7b|13b)-v1\.[13].*", "other"),
    _License(r"liuhaotian/llava-v1\.6-mistral-7b", "apache-2.0"),
    _License(r"microsoft/llava-med-v1\.5-mistral-7b", "apache-2.0"),
)

_LLAMA_1 = (
    "The language model is made from LLaMA, the first version, which Meta licenses for **non-commercial "
    "research only**."
)
_LLAMA_2 = (
    "The language model is made from Llama 2. Llama 2 is licensed under the [LLAMA 2 Community "
    "License](https://ai.meta.com/llama/license/), Copyright (c) Meta Platforms, Inc. All Rights Reserved. If you "
    "share this bundle, include a copy of that agreement and this notice. Its acceptable use policy applies."
)
# Every note whose name matches is in the card
_NOTES = (
    _Note(
        "mpt",
        r"lightning-mpt-7b",
        "The language model of LLaVA-Lightning-MPT-7B is fine-tuned from "
        "[MPT-7B-Chat](https://huggingface.co/mosaicml/mpt-7b-chat), which MosaicML licenses as cc-by-nc-sa-4.0: **no "
        "commercial use**, and models made from it must have the same license.",
    ),
    _Note("llama", r"delta-v[01]|vicuna-\d+b-v(0|1\.[13])|llava-(lightning-)?\d+b-v[01]", _LLAMA_1),
    _Note(
        "llama",
        r"llava-?v?1\.5-(7b|13b)|llava-v1\.6-vicuna|vicuna-\d+b-v1\.5|sharegpt4v|llava-rlhf.*v1\.5|llama-?2",
        _LLAMA_2,
    ),
    _Note(
        "llama",
        r"llava-v1\.6-34b",
        "The language model is made from "
        "[Nous-Hermes-2-Yi-34B](https://huggingface.co/NousResearch/Nous-Hermes-2-Yi-34B), which has the license "
        "Apache-2.0.",
    ),
    _Note(
        "mistral",
        r"llava-?med",
        "The authors of LLaVA-Med intend it for **research only**. It is not for clinical care and not for clinical "
        "decisions, and its authors exclude any deployed use.",
    ),
    _Note(
        "mistral", r"mistral|bakllava", "The language model is made from Mistral 7B, which has the license Apache-2.0."
    ),
)
_UNKNOWN_LLAMA = (
    "The language model has the architecture of LLaMA. If it is made from the first LLaMA, Meta's license allows "
    "non-commercial research only. If it is made from Llama 2, the [LLAMA 2 Community "
    "License](https://ai.meta.com/llama/license/) applies. Find out which."
)
_DATA = (
    "LLaVA's training data was written by OpenAI's models, whose terms of use apply to it; its authors intend the "
    "model for research only."
)


def known_license(model_id: str) -> str | None:
    """Return the license of a known checkpoint, as the Hub calls it; `None` for any other.

    Args:
        model_id: model id on the Hub. A path of a folder is not known.
    """
    return next((row.license_id for row in _LICENSES if re.fullmatch(row.model_id, model_id.lower())), None)


def notes_about(name: str, text_model_type: str) -> list[str]:
    """Return paragraphs about the terms of a checkpoint, for its card.

    Args:
        name: model id of the checkpoint, or the name of its folder.
        text_model_type: type of its language model in transformers.
    """
    notes = [
        note.text for note in _NOTES if note.text_model_type == text_model_type and re.search(note.name, name.lower())
    ]
    if not notes:
        return [_UNKNOWN_LLAMA] if text_model_type == "llama" else []
    return [*notes, _DATA]
