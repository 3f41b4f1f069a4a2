"""Run llama.cpp on the same weights. It supports MPT without images, so it gets random tokens as prompts."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import llama
from PIL import Image

from contenders import Answer, Job


class LlamaContender:
    def __init__(self, job: Job):
        file = Path(job.paths["llama"]) / f"{job.contender.removeprefix('llama-')}.gguf"
        self.model = llama.Model(file, job.prompt_tokens + job.new_tokens, threads=os.cpu_count())
        self.prompt_tokens = job.prompt_tokens
        self.choose = random.Random(0)

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        prompt_ids = [self.choose.randrange(self.model.vocab_size) for _ in range(self.prompt_tokens)]
        self.model.forget()
        started = time.perf_counter()
        self.model.decode(prompt_ids)
        tokens = [int(self.model.logits().argmax())]
        first_token_seconds = time.perf_counter() - started
        while len(tokens) < new_tokens:
            self.model.decode(tokens[-1:])
            tokens.append(int(self.model.logits().argmax()))
        return Answer(
            seconds=time.perf_counter() - started,
            first_token_seconds=first_token_seconds,
            preprocess_seconds=None,
            tokens=[tokens],
            prompt_tokens=self.prompt_tokens,
        )

    def stages(self, image: Image.Image) -> dict[str, float]:
        return {}


load = LlamaContender
