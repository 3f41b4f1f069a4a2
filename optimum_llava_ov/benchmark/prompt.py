"""Make prompts with an image and an exact number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.chat.prompt import Prompt, build_prompt
from optimum_llava_ov.models.image_layout import ImageLayout


DEFAULT_LENGTHS = (300, 1000)
# In every tokenizer that was tested, one of these is one token at every position
FILLERS = (" the", " a", ".", "?", "\n", "0")


class PromptMaker:
    """Make questions about an image with a given number of tokens.

    Args:
        images: Images that are used in turn. Default: a new random image for each prompt.
    """

    def __init__(self, processor: Any, config: Any, images: Sequence[Image.Image] = ()):
        self.processor = processor
        self.config = config
        self.images = images
        self._made = 0
        self._layout = ImageLayout.of_bundle(config)
        self._texts: dict[tuple[int, int], str] = {}

    def shortest(self) -> int:
        """Return the number of tokens of a prompt with an image and no question.

        If the number of tokens of an image depends on its size, the largest one counts.
        """
        images = self.images or [self._noise(0)]
        return max(len(self._prompt("", Image.new("RGB", size))) for size in {image.size for image in images})

    def lengths(self, requested: Sequence[int] | None) -> list[int]:
        """Return the lengths to measure. The default lengths are increased if an image needs more tokens.

        Raises:
            `ValueError`: A requested length is too short for an image.
        """
        shortest = self.shortest()
        if requested is None:
            return sorted({max(length, -(-shortest // 100) * 100) for length in DEFAULT_LENGTHS})
        for length in requested:
            if length < shortest:
                raise ValueError(
                    f"A prompt of {length} tokens is too short. With this model, an image "
                    f"({self._largest_image()} tokens) and the chat template take {shortest} tokens. Use "
                    f"--prompt-tokens {shortest} or more."
                )
        return list(dict.fromkeys(requested))

    def make(self, length: int) -> Prompt:
        """Return a prompt of `length` tokens with the next image."""
        image = self.images[self._made % len(self.images)] if self.images else self._noise(self._made)
        key = length, self._layout.num_image_tokens(image.size)
        if key not in self._texts:
            self._texts[key] = self._text(length, image)
        self._made += 1
        return self._prompt(self._texts[key], image)

    def _largest_image(self) -> int:
        return max(self._layout.num_image_tokens(image.size) for image in self.images or [self._noise(0)])

    def _text(self, length: int, image: Image.Image) -> str:
        missing = length - len(self._prompt("", image))
        for filler in FILLERS:
            text = filler * missing
            if len(self._prompt(text, image)) == length:
                return text
        raise ValueError(f"No text makes a prompt of exactly {length} tokens with this tokenizer. Try another length.")

    def _prompt(self, text: str, image: Image.Image) -> Prompt:
        return build_prompt([user_message(text, [image])], self.processor, self.config)

    def _noise(self, seed: int) -> Image.Image:
        """Return a random image of 640 x 480 pixels, whose preprocessing takes a realistic time."""
        pixels = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((640, 480), Image.Resampling.BILINEAR)
