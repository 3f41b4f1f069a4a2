"""Run the pipeline of the OpenVINO notebook. See [`notebook_conversion`] and [`notebook_pipeline`]."""

from __future__ import annotations

import time
from pathlib import Path

from notebook_pipeline import BORDERS, NotebookPipeline
from PIL import Image

from contenders import Answer, Job
from contenders.transformers_style import milliseconds


class NotebookContender:
    def __init__(self, pipeline: NotebookPipeline, num_image_tokens: int):
        self.pipeline, self.num_image_tokens = pipeline, num_image_tokens

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        times: list[float] = []
        started = time.perf_counter()
        prompt = prompt.replace("<image>", "<image>".join(BORDERS))
        ids, pixel_values = self.pipeline.prepare(prompt, images)
        prepared = time.perf_counter()
        input_ids = ids.expand(len(images), -1)
        tokens = self.pipeline.generate(
            input_ids, pixel_values, new_tokens, lambda _: times.append(time.perf_counter())
        )
        return Answer(
            seconds=time.perf_counter() - started,
            first_token_seconds=times[0] - started,
            preprocess_seconds=prepared - started,
            tokens=tokens.tolist(),
            prompt_tokens=ids.shape[1] - 1 + self.num_image_tokens,
        )

    def stages(self, image: Image.Image) -> dict[str, float]:
        process = self.pipeline.image_processor
        pixel_values = process(image, return_tensors="pt")["pixel_values"]
        return {
            "preprocess": milliseconds(lambda: process(image, return_tensors="pt")),
            "vision": milliseconds(lambda: self.pipeline.image_encoder(pixel_values)),
        }


def load(job: Job) -> NotebookContender:
    pipeline = NotebookPipeline(Path(job.paths["notebook"]))
    num_image_tokens = pipeline.image_encoder.output(0).partial_shape[1].get_length()
    return NotebookContender(pipeline, num_image_tokens)
