"""Those who are compared by `benchmarks/engines.py`. One process runs one contender in one configuration: see `__main__`.

A contender is a module with `load(job) -> Contender`, and a line in `MODULES`. It may run anything, as long as `answer` returns
when the answer is there. What files it needs goes into `Job.paths`, which `engines.py` fills.
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
NEEDS_PACKAGE = {"llama": "llama_cpp"}  # modules of contenders that run only where another package was installed
ONE_ROW = ("genai-sdpa", "llama-Q4_K_M", "llama-Q4_0")  # those that are not asked for batches


@dataclasses.dataclass
class Job:
    """
    Attributes:
        contender (`str`): a key of `MODULES`.
        paths (`dict[str, str]`): `bundle`, `checkpoint`, `notebook`, `llama`: what there is to run.
        prompt (`str`): a whole prompt of the bundle's chat template, with one `<image>`.
        prompt_tokens (`int`): its length, with the picture's rows.
        batch (`int`): how many rows at once, each with a picture of its own.
        new_tokens (`int`): how many tokens every row generates.
        repeats (`int`): how many answers after the first.
        turns (`str`): folder of [`contenders.turns`], if other contenders run meanwhile and take turns with this one.
    """

    contender: str
    paths: dict[str, str]
    prompt: str
    prompt_tokens: int
    batch: int = 1
    new_tokens: int = 32
    repeats: int = 2
    turns: str | None = None


@dataclasses.dataclass
class Answer:
    """
    Attributes:
        seconds (`float`): from pictures and text to the last token.
        first_token_seconds (`float`): to the first token, of all rows.
        preprocess_seconds (`float`): of these, for preparing pictures and tokenizing; `None` if that happens inside the engine.
        tokens (`list[list[int]]`): what each row generated.
        prompt_tokens (`int`): length of the prompt as the engine saw it; `None` if it does not say.
        metrics (`dict[str, float]`): what the engine says of itself.
    """

    seconds: float
    first_token_seconds: float
    preprocess_seconds: float | None
    tokens: list[list[int]]
    prompt_tokens: int | None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class Contender(Protocol):
    """A loaded model."""

    def answer(self, prompt: str, pictures: list[Image.Image], new_tokens: int) -> Answer:
        """Greedily, one row for each picture, and past end tokens."""

    def stages(self, picture: Image.Image) -> dict[str, float]:
        """Milliseconds that parts take by themselves: `preprocess`, `vision`. Empty if they cannot be called."""
