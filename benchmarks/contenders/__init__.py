"""The contenders that `benchmarks/engines.py` compares. One process runs one contender in one configuration.

A contender is a module with `load(job) -> Contender`, and a line in `MODULES`. It may run anything, as long as
`answer` returns when the answer is complete. `Job.paths`, which `engines.py` fills, has the files that it needs. See
`__main__`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from PIL import Image


MODULES = {
    "ours": "ours",
    "stock": "stock",
    "genai-sdpa": "genai",
    "genai-pa": "genai",
    "torch": "torch_bf16",
    "notebook": "notebook",
    "llama-Q4_K_M": "llama",
    "llama-Q4_0": "llama",
}
NEEDS_PACKAGE = {"llama": "llama_cpp"}  # additional packages that modules need
MPT_ONLY = ("torch", "notebook")
ONE_SEQUENCE = ("genai-sdpa", "llama-Q4_K_M", "llama-Q4_0")  # contenders without batches


@dataclasses.dataclass
class Job:
    """Describe one process.

    Attributes:
        contender (`str`): A key of `MODULES`.
        paths (`dict[str, str]`): Folders by name: `bundle`, `checkpoint`, `notebook`. Files: `llama`, `mmproj`.
        prompt (`str`): A complete prompt in the bundle's chat template, with one `<image>`.
        prompt_tokens (`int`): Length of the prompt in tokens, image tokens included.
        batch (`int`): Number of sequences in a batch, each with a different image.
        new_tokens (`int`): Number of tokens to generate for each sequence.
        repeats (`int`): Number of answers after the first.
        image_size (`tuple[int, int]`): Width and height of the images, in pixels.
        ov_config (`dict[str, str]`): Properties of OpenVINO, for contenders that use it.
        turns (`str`): Folder of [`contenders.turns`], if this contender takes turns with others.
    """

    contender: str
    paths: dict[str, str]
    prompt: str
    prompt_tokens: int
    batch: int = 1
    new_tokens: int = 32
    repeats: int = 2
    image_size: tuple[int, int] = (640, 480)
    ov_config: dict[str, str] = dataclasses.field(default_factory=dict)
    turns: str | None = None


@dataclasses.dataclass
class Answer:
    """Hold the result of one answer.

    Attributes:
        seconds (`float`): Seconds from images and text to the last token.
        first_token_seconds (`float`): Seconds until all sequences have their first token.
        preprocess_seconds (`float`): Part of these for preprocessing and tokenization. `None` if the engine does it.
        tokens (`list[list[int]]`): Generated tokens of each sequence.
        prompt_tokens (`int`): Length of the prompt according to the engine. `None` if it does not tell.
        metrics (`dict[str, float]`): Metrics that the engine reports.
    """

    seconds: float
    first_token_seconds: float
    preprocess_seconds: float | None
    tokens: list[list[int]]
    prompt_tokens: int | None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class Contender(Protocol):
    """A loaded model."""

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        """Generate greedily, one sequence for each image. Do not stop at end tokens."""

    def stages(self, image: Image.Image) -> dict[str, float]:
        """Return the milliseconds of single parts: `preprocess`, `vision`. Empty if they cannot be called."""
