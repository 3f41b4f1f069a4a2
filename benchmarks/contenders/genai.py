"""OpenVINO GenAI on the same bundle, with either attention backend.

Time is taken outside, as for everybody, and what GenAI says of itself is kept beside it. A picture is prepared and encoded inside.
`VLMPipeline` takes one prompt at a time; batches are those of continuous batching, which has paged attention only.
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

    def answer(self, prompt: str, pictures: list[Image.Image], new_tokens: int) -> Answer:
        config, clock = _config(new_tokens), _Clock()
        started = time.perf_counter()
        images = [_tensor(picture) for picture in pictures]
        result = self.pipeline.generate(_prompt(prompt), images=images, generation_config=config, streamer=clock)
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

    def stages(self, picture: Image.Image) -> dict[str, float]:
        return {}


class ContinuousBatchingContender:
    """All rows are requests of one batch."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline):
        self.pipeline = pipeline

    def answer(self, prompt: str, pictures: list[Image.Image], new_tokens: int) -> Answer:
        config = _config(new_tokens)
        started = time.perf_counter()
        handles = [
            self.pipeline.add_request(number, _prompt(prompt), images=[_tensor(picture)], generation_config=config)
            for number, picture in enumerate(pictures)
        ]
        tokens: list[list[int]] = [[] for _ in pictures]
        first_token = None
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for row, handle in zip(tokens, handles):
                while handle.can_read():
                    row += [token for output in handle.read().values() for token in output.generated_ids]
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

    def stages(self, picture: Image.Image) -> dict[str, float]:
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
        return GenAIContender(openvino_genai.VLMPipeline(job.paths["bundle"], "CPU", ATTENTION_BACKEND=backend))
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 1 << 30  # as VLMPipeline itself sets it: a prompt in one piece
    return ContinuousBatchingContender(
        openvino_genai.ContinuousBatchingPipeline(job.paths["bundle"], scheduler, "CPU")
    )


def _config(new_tokens: int) -> openvino_genai.GenerationConfig:
    return openvino_genai.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, ignore_eos=True, apply_chat_template=False
    )


def _prompt(prompt: str) -> str:
    """The newline behind a picture is GenAI's to write."""
    return prompt.replace("<image>\n", "<image>")


def _tensor(picture: Image.Image) -> openvino.Tensor:
    return openvino.Tensor(np.array(picture)[None])
