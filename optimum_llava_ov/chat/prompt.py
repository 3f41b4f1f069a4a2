"""Messages as token ids, comparable with what a cache holds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from optimum_llava_ov.chat.messages import Message, pictures_of
from optimum_llava_ov.chat.pictures import digest


# Tokenizers are not made for several threads: padding and truncation are settings of theirs.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        text (`str`): as the chat template writes it, with one `<image>` for each picture.
        input_ids (`torch.LongTensor`): `(1, tokens)`, a picture being `image_seq_length` times the image token.
        keys (`list[int | str]`): what stands at each position: a token's id, or the digest of a picture.
        pictures (`dict[str, Image.Image]`): by digest.
        messages (`list[Message]`): what it was made from.
    """

    text: str
    input_ids: torch.LongTensor
    keys: list[int | str]
    pictures: dict[str, Image.Image]
    messages: list[Message]

    def __len__(self) -> int:
        return len(self.keys)


def build_prompt(messages: Sequence[Message], processor: Any, config: Any) -> Prompt:
    """The prompt that asks for the next answer: what `processor` makes of the messages, without the pixels.

    Raises:
        `ValueError`: a text spells `<image>`.
    """
    pictures = [(digest(picture), picture) for picture in pictures_of(messages)]
    with _TOKENIZING:
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True)
        tokens = processor.tokenizer(text)["input_ids"]
    places = tokens.count(config.image_token_index)
    if places != len(pictures):
        raise ValueError(f"The messages have {len(pictures)} picture(s), but their texts spell places for {places}.")
    keys: list[int | str] = []
    waiting = iter(pictures)
    for token in tokens:
        keys += [next(waiting)[0]] * config.image_seq_length if token == config.image_token_index else [token]
    ids = [config.image_token_index if isinstance(key, str) else key for key in keys]
    return Prompt(text, torch.tensor([ids]), keys, dict(pictures), list(messages))


def common_prefix(first: Sequence, second: Sequence) -> int:
    """Number of leading items that are the same in both."""
    pairs = enumerate(zip(first, second))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
