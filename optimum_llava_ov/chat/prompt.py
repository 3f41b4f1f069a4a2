"""Turn messages into token ids that can be compared with those in a cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from optimum_llava_ov.chat.images import digest
from optimum_llava_ov.chat.messages import Message, images_of
from optimum_llava_ov.models.image_layout import ImageLayout


# Tokenizers are not safe for several threads: padding and truncation are part of their state.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt in the forms that engines need.

    Attributes:
        text (`str`): Text that the chat template wrote, with one `<image>` for each image.
        input_ids (`torch.LongTensor`): `(1, tokens)`. An image is one image token for each of its rows.
        keys (`list[int | str]`): For each position, the token's id, or the digest of an image.
        images (`dict[str, Image.Image]`): Images by digest.
        messages (`list[Message]`): The messages of this prompt.
    """

    text: str
    input_ids: torch.LongTensor
    keys: list[int | str]
    images: dict[str, Image.Image]
    messages: list[Message]

    def __len__(self) -> int:
        return len(self.keys)


def build_prompt(messages: Sequence[Message], processor: Any, config: Any) -> Prompt:
    """Build the prompt for the next answer. Its ids are those of `processor`; images are not preprocessed.

    Raises:
        `ValueError`: A text contains `<image>`.
    """
    images = [(digest(image), image) for image in images_of(messages)]
    with _TOKENIZING:
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True)
        tokens = processor.tokenizer(text)["input_ids"]
    num_placeholders = tokens.count(config.image_token_index)
    if num_placeholders != len(images):
        raise ValueError(
            f"The messages have {len(images)} image(s), but their texts contain {num_placeholders} `<image>` tokens."
        )
    layout = ImageLayout.of_bundle(config)
    keys: list[int | str] = []
    remaining = iter(images)
    for token in tokens:
        if token == config.image_token_index:
            key, image = next(remaining)
            keys += [key] * layout.num_image_tokens(image.size)
        else:
            keys.append(token)
    ids = [config.image_token_index if isinstance(key, str) else key for key in keys]
    return Prompt(text, torch.tensor([ids]), keys, dict(images), list(messages))


def model_inputs(prompts: Sequence[Prompt], processor: Any) -> Any:
    """Return inputs of `generate` for a batch of prompts, padded on the left. Images are preprocessed."""
    images = [image for prompt in prompts for image in images_of(prompt.messages)]
    with _TOKENIZING:
        return processor(
            text=[prompt.text for prompt in prompts],
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
