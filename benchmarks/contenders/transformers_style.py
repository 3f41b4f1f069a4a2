"""Run contenders that have a processor and `generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image

from contenders import Answer


class Clock:
    """Measure when the first token of each sequence arrives. The first call of a streamer brings the prompt.

    transformers accepts streamers for batches, but not for beams. Only its own streamers are limited to one sequence.
    """

    def __init__(self):
        self.calls, self.first_token = 0, None

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first_token = time.perf_counter()

    def end(self) -> None:
        pass


class TransformersContender:
    """Answer with `generate` of transformers.

    Args:
        model: A model with transformers' `generate`.
        processor: Processor of the bundle.
        encode: Function from `(images, 3, height, width)` to image features.
    """

    def __init__(self, model, processor, encode: Callable[[torch.Tensor], object]):
        self.model, self.processor, self.encode = model, processor, encode

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        clock = Clock()
        started = time.perf_counter()
        inputs = self.processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        prepared = time.perf_counter()
        with torch.no_grad():
            output = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, streamer=clock
            )
        ended = time.perf_counter()
        length = inputs["input_ids"].shape[1]
        return Answer(
            seconds=ended - started,
            first_token_seconds=clock.first_token - started,
            preprocess_seconds=prepared - started,
            tokens=output[:, length:].tolist(),
            prompt_tokens=length,
        )

    def stages(self, image: Image.Image) -> dict[str, float]:
        process = self.processor.image_processor
        pixel_values = process(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return {
                "preprocess": milliseconds(lambda: process(image, return_tensors="pt")),
                "vision": milliseconds(lambda: self.encode(pixel_values)),
            }


def milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call. The first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])
