"""Prompts of an exact number of tokens, with an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.chat.prompt import Prompt, build_prompt


DEFAULT_LENGTHS = (300, 1000)
# One of these is one token wherever it stands, in every tokenizer that was met.
FILLERS = (" the", " a", ".", "?", "\n", "0")


class PromptMaker:
    """Makes questions about an image, as long as asked for.

    Args:
        images: taken in turn; drawn from noise, each another one, if there are none.
    """

    def __init__(self, processor: Any, config: Any, images: Sequence[Image.Image] = ()):
        self.processor = processor
        self.config = config
        self.images = images
        self._made = 0
        self._texts: dict[int, str] = {}

    def shortest(self) -> int:
        """Tokens of an image without a question."""
        return len(self._prompt("", Image.new("RGB", (8, 8))))

    def lengths(self, wanted: Sequence[int] | None) -> list[int]:
        """The lengths to measure: those wanted, or, if it is `None`, the usual ones, longer where an image takes more.

        Raises:
            `ValueError`: an image does not fit into one that was asked for.
        """
        shortest = self.shortest()
        if wanted is None:
            return sorted({max(length, -(-shortest // 100) * 100) for length in DEFAULT_LENGTHS})
        for length in wanted:
            if length < shortest:
                raise ValueError(
                    f"A prompt of {length} tokens was asked for, but with this model an image ({self.config.image_seq_length} "
                    f"tokens) and the words around it take {shortest} tokens. Ask for --prompt-tokens {shortest} or more."
                )
        return list(dict.fromkeys(wanted))

    def make(self, length: int) -> Prompt:
        """A prompt of `length` tokens with the next image."""
        if length not in self._texts:
            self._texts[length] = self._text(length)
        image = self.images[self._made % len(self.images)] if self.images else self._noise(self._made)
        self._made += 1
        return self._prompt(self._texts[length], image)

    def _text(self, length: int) -> str:
        image = Image.new("RGB", (8, 8))
        missing = length - self.shortest()
        for filler in FILLERS:
            text = filler * missing
            if len(self._prompt(text, image)) == length:
                return text
        raise ValueError(
            f"With this tokenizer no text was found that makes a prompt of exactly {length} tokens. Try another length."
        )

    def _prompt(self, text: str, image: Image.Image) -> Prompt:
        return build_prompt([user_message(text, [image])], self.processor, self.config)

    def _noise(self, seed: int) -> Image.Image:
        """Of the size of a photograph on a page: preparing it is part of what a user waits for."""
        pixels = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((640, 480), Image.Resampling.BILINEAR)
