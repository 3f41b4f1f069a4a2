"""Run llama.cpp on the same weights. It supports MPT without images, so an MPT gets random tokens as prompts."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import llama
from PIL import Image

from contenders import Answer, Job


class LlamaContender:
    """Answer a question about an image.

    Args:
        model: Language model and image encoder.
    """

    def __init__(self, model: llama.VisionModel):
        self.model = model

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        self.model.forget()
        started = time.perf_counter()
        prompt_tokens = self.model.ask(prompt, images[0])
        return _greedy(self.model, started, prompt_tokens, new_tokens)

    def stages(self, image: Image.Image) -> dict[str, float]:
        started = time.perf_counter()
        self.model.encode(image)
        return {"vision": 1000 * (time.perf_counter() - started)}


class TextContender:
    """Answer random tokens.

    Args:
        model: Language model.
        prompt_tokens: Number of random tokens.
    """

    def __init__(self, model: llama.Model, prompt_tokens: int):
        self.model, self.prompt_tokens = model, prompt_tokens
        self.choose = random.Random(0)

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        prompt_ids = [self.choose.randrange(self.model.vocab_size) for _ in range(self.prompt_tokens)]
        self.model.forget()
        started = time.perf_counter()
        self.model.decode(prompt_ids)
        return _greedy(self.model, started, self.prompt_tokens, new_tokens)

    def stages(self, image: Image.Image) -> dict[str, float]:
        return {}


def _greedy(model: llama.Model, started: float, prompt_tokens: int, new_tokens: int) -> Answer:
    """Generate after a prompt that was processed."""
    tokens = [int(model.logits().argmax())]
    first_token_seconds = time.perf_counter() - started
    while len(tokens) < new_tokens:
        model.decode(tokens[-1:])
        tokens.append(int(model.logits().argmax()))
    return Answer(
        seconds=time.perf_counter() - started,
        first_token_seconds=first_token_seconds,
        preprocess_seconds=None,
        tokens=[tokens],
        prompt_tokens=prompt_tokens,
    )


def load(job: Job) -> LlamaContender | TextContender:
    file, threads = Path(job.paths["llama"]), len(os.sched_getaffinity(0))
    context = job.prompt_tokens + job.new_tokens
    if "mmproj" in job.paths:
        return LlamaContender(llama.VisionModel(file, Path(job.paths["mmproj"]), context, threads))
    return TextContender(llama.Model(file, context, threads), job.prompt_tokens)
