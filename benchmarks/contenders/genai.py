"""Run OpenVINO GenAI on the same bundle, with either attention backend.

Times are measured outside of the engine, as for all contenders, and GenAI's own metrics are kept too. GenAI
preprocesses and encodes images itself. `VLMPipeline` takes one prompt at a time. Batches use continuous batching,
which has paged attention only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai
from PIL import Image

from contenders import Answer, Job


class GenAIContender:
    def __init__(self, pipeline: openvino_genai.VLMPipeline):
        self.pipeline = pipeline

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        config, clock = _config(new_tokens), _Clock()
        started = time.perf_counter()
        tensors = [_tensor(image) for image in images]
        result = self.pipeline.generate(_prompt(prompt), images=tensors, generation_config=config, streamer=clock)
        ended = time.perf_counter()
        metrics = result.perf_metrics
        return Answer(
            seconds=ended - started,
            first_token_seconds=clock.first_token - started,
            preprocess_seconds=None,
            tokens=[clock.tokens],
            prompt_tokens=metrics.get_num_input_tokens(),
            metrics={
                "ttft": metrics.get_ttft().mean,
                "tpot": metrics.get_tpot().mean,
                "vision_encoding": metrics.get_vision_encoding_duration().mean,
                "prepare_embeddings": metrics.get_prepare_embeddings_duration().mean,
            },
        )

    def stages(self, image: Image.Image) -> dict[str, float]:
        return {}


class ContinuousBatchingContender:
    """Answer a batch of requests."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline):
        self.pipeline = pipeline

    def answer(self, prompt: str, images: list[Image.Image], new_tokens: int) -> Answer:
        config = _config(new_tokens)
        started = time.perf_counter()
        handles = [
            self.pipeline.add_request(number, _prompt(prompt), images=[_tensor(image)], generation_config=config)
            for number, image in enumerate(images)
        ]
        tokens: list[list[int]] = [[] for _ in images]
        first_token = None
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for sequence, handle in zip(tokens, handles):
                while handle.can_read():
                    sequence += [token for output in handle.read().values() for token in output.generated_ids]
            if first_token is None and all(tokens):
                first_token = time.perf_counter()
        ended = time.perf_counter()
        return Answer(
            seconds=ended - started,
            first_token_seconds=first_token - started,
            preprocess_seconds=None,
            tokens=tokens,
            prompt_tokens=None,
        )

    def stages(self, image: Image.Image) -> dict[str, float]:
        return {}


class _Clock(openvino_genai.StreamerBase):
    def __init__(self):
        super().__init__()
        self.first_token: float | None = None
        self.tokens: list[int] = []

    def write(self, token: int | Sequence[int]) -> openvino_genai.StreamingStatus:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.tokens += [token] if isinstance(token, int) else list(token)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(job: Job) -> GenAIContender | ContinuousBatchingContender:
    backend = job.contender.removeprefix("genai-").upper()
    if job.batch == 1:
        properties = {"ATTENTION_BACKEND": backend, **job.ov_config}
        return GenAIContender(openvino_genai.VLMPipeline(job.paths["bundle"], "CPU", **properties))
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 1 << 30  # as in VLMPipeline: the whole prompt in one call
    return ContinuousBatchingContender(
        openvino_genai.ContinuousBatchingPipeline(job.paths["bundle"], scheduler, "CPU", **job.ov_config)
    )


def _config(new_tokens: int) -> openvino_genai.GenerationConfig:
    return openvino_genai.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, ignore_eos=True, apply_chat_template=False
    )


def _prompt(prompt: str) -> str:
    """Remove the newline after an image, because GenAI writes it."""
    return prompt.replace("<image>\n", "<image>")


def _tensor(image: Image.Image) -> openvino.Tensor:
    return openvino.Tensor(np.array(image)[None])
