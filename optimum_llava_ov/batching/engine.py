"""Answer many requests at once with GenAI's continuous batching.

One thread drives the pipeline. A request joins the batch at the next step, and leaves it when it is complete or
cancelled.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino
import openvino_genai
import torch

from optimum_llava_ov.chat.genai_engine import GenAIEngine, text_for_genai
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer
from optimum_llava_ov.errors import EngineFailureError


logger = logging.getLogger(__name__)

MAX_BATCHED_TOKENS = 512  # in one step. GenAI holds the interpreter for a step, so long steps delay other threads
_YIELD = 0.0002  # seconds after a step in which other threads run: those that receive requests and send tokens
_HANDOVER = 0.003  # the same after a request has ended, so that another one takes its place before the next step
_LONGEST_JOIN = 1.0  # seconds for which the next step waits for a request that joins the batch
_REASONS = {
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}


@dataclass(frozen=True)
class Step:
    """Hold what a request has new after a step.

    Attributes:
        tokens (`list[int]`): Ids of new tokens. An end-of-text token is one of them.
        logprobs (`list[float]`): Logarithm of the probability of each token, before sampling options. 0 if they were
            not requested.
        finish_reason (`str` or `None`): "stop" or "length" if the answer is complete.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None


class BatchRequest:
    """A request in the batch.

    Attributes:
        cancelled (`bool`): Whether [`cancel`] was called.
    """

    def __init__(
        self, handle: Any, receive: Callable[[list[Step]], None], end: Callable[[Exception | None], None]
    ) -> None:
        self.handle = handle
        self.cancelled = False
        self.receive = receive
        self.end = end

    def cancel(self) -> None:
        """Leave the batch before its next step. Return at once."""
        self.cancelled = True


@dataclass(frozen=True)
class Usage:
    """Say how full an engine is.

    Attributes:
        requests (`int`): Number of requests in the batch.
        cache (`float`): Share of the allocated cache that is in use, 0 ... 1.
        cache_bytes (`int`): Allocated cache, in bytes.
    """

    requests: int
    cache: float
    cache_bytes: int


class BatchEngine(GenAIEngine):
    """Run a bundle for many requests at once. See [`Engine`]; its conversations share the batch.

    If a step fails, all requests in the batch end with an [`EngineFailureError`], and the bundle is loaded again.

    Args:
        bundle: Folder of a bundle.
        max_sequences: Maximum number of answers that are computed at the same time.
        max_batched_tokens: Maximum number of tokens in one step. A longer prompt takes several steps, between which
            other answers go on.
        cache_gb: Maximum size of the cache of all requests, in GB. 0: it grows as needed.
    """

    def __init__(
        self,
        bundle: Path,
        device: str = "CPU",
        ov_config: dict[str, str] | None = None,
        prefix_caching: bool = True,
        max_sequences: int = 256,
        max_batched_tokens: int = MAX_BATCHED_TOKENS,
        cache_gb: int = 0,
    ):
        super().__init__(
            bundle,
            device,
            ov_config,
            prefix_caching,
            max_num_seqs=max_sequences,
            max_num_batched_tokens=max_batched_tokens,
            cache_size=cache_gb,
        )
        self.bundle = bundle
        self._requests: dict[int, BatchRequest] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._holds = 0
        self._joining = False
        self._has_stepped = True  # since a request joined
        self._thread = threading.Thread(target=self._run, daemon=True, name="batch")
        self._thread.start()

    def submit(
        self,
        text: str,
        images: Sequence[openvino.Tensor],
        config: openvino_genai.GenerationConfig,
        receive: Callable[[list[Step]], None],
        end: Callable[[Exception | None], None],
    ) -> BatchRequest:
        """Add a request to the batch. Encode its images in this thread.

        Args:
            text: The prompt, with one `<image>` for each image.
            images: See [`image_tensor`].
            config: See [`generation_config`].
            receive: Called with new tokens, in the thread of the engine.
            end: Called once, after the last tokens: with `None`, or with the error that ended the request.

        Raises:
            [`EngineFailureError`]: The engine is starting again, or was closed.
            `ValueError`: A message has images but no text.
            `RuntimeError`: GenAI does not accept the request.
        """
        config.apply_chat_template = False  # the prompt's text has it
        text = text_for_genai(text)
        number, pipeline = next(self._numbers), self._pipeline
        if pipeline is None or self._closing:
            raise EngineFailureError("The model is not loaded now. Try again.")
        request = BatchRequest(pipeline.add_request(number, text, list(images), config), receive, end)
        with self._changed:
            if pipeline is not self._pipeline:
                raise EngineFailureError("The model failed and is loaded again. Try again.")
            self._requests[number] = request
            self._changed.notify_all()
        return request

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Begin no step in this context. Requests that are submitted meanwhile begin together, and sooner.

        A step holds the interpreter. A thread that prepares a request would wait for several steps, in which its place
        in the batch is empty.
        """
        with self._changed:
            self._holds += 1
        try:
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify_all()

    @contextmanager
    def join(self) -> Iterator[None]:
        """Let the next step wait for a request that is prepared and submitted in this context, as [`hold`] does.

        Requests join one by one, with a step between them, so that answers in the batch go on. A step does not wait
        long.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._joining and (self._has_stepped or not self._requests))
            self._joining = True
        try:
            yield
        finally:
            with self._changed:
                self._joining = False
                self._has_stepped = False
                self._changed.notify_all()

    def new_conversation(self) -> BatchConversation:
        return BatchConversation(self)

    def generate(self, prompts: Sequence[Prompt], receive: Callable[[int, int], None], **options: Any) -> None:
        config = self.generation_config(options)
        config.stop_strings = set()
        steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for index, prompt in enumerate(prompts):
            self.submit(
                prompt.text,
                self.image_tensors(prompt.messages),
                config,
                lambda new, index=index: steps.put((index, new)),  # type: ignore[misc]
                lambda error: steps.put((None, error)),
            )
        remaining = len(prompts)
        while remaining:
            index, new = steps.get()
            if index is None:
                if new is not None:
                    raise new
                remaining -= 1
                continue
            for token in (token for step in new for token in step.tokens):
                receive(index, token)

    @property
    def is_alive(self) -> bool:
        """Return whether the engine can answer. It cannot after it was closed, or if it could not be loaded again."""
        return self._thread.is_alive() and self._pipeline is not None

    def usage(self) -> Usage:
        pipeline = self._pipeline
        if pipeline is None:
            return Usage(0, 0.0, 0)
        metrics = pipeline.get_metrics()
        return Usage(len(self._requests), metrics.cache_usage / 100, metrics.cache_size_in_bytes)

    def close(self) -> None:
        """End when the requests in the batch are complete."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._holds and (self._requests or self._closing))
                self._changed.wait_for(lambda: not self._joining, timeout=_LONGEST_JOIN)
                requests = dict(self._requests)
            if not requests:
                return
            try:
                for request in requests.values():
                    if request.cancelled:
                        request.handle.cancel()
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                news = {number: _read(request.handle) for number, request in requests.items()}
            except Exception:
                logger.exception("A step of the model failed. It is loaded again.")
                self._restart()
                continue
            for number, (steps, ended, error) in news.items():
                request = requests[number]
                if steps and not request.cancelled:
                    request.receive(steps)
                if ended:
                    with self._changed:
                        del self._requests[number]
                    request.end(error)
            with self._changed:
                self._has_stepped = True
                self._changed.notify_all()
            # Here, so that what is new is used before the next step
            has_ended = any(ended for _, ended, _ in news.values())
            time.sleep(_HANDOVER if has_ended and self._requests else _YIELD)

    def _restart(self) -> None:
        """Load the bundle again. GenAI cannot go on after a step that failed."""
        with self._changed:
            failed, self._requests = self._requests, {}
            self._pipeline = None  # free its memory first
            self._changed.notify_all()
        for request in failed.values():
            request.handle = None
        try:
            self._pipeline = self.new_pipeline()
        except Exception:
            logger.critical("The model could not be loaded again.", exc_info=True)
        for request in failed.values():
            request.end(EngineFailureError("The model failed while it computed this answer. Try again."))


def _read(handle: Any) -> tuple[list[Step], bool, Exception | None]:
    """Return what a request has new, whether it has ended, and the error that ended it."""
    status = handle.get_status()  # first, so that what comes with the end is read
    steps = []
    while handle.can_read():
        steps += [
            Step(output.generated_ids, output.generated_log_probs, _REASONS.get(output.finish_reason))
            for output in handle.read().values()
        ]
    if status == openvino_genai.GenerationStatus.IGNORED:
        return (
            steps,
            True,
            EngineFailureError(
                "The request does not fit into the cache of the model. Make it shorter, or serve with a larger "
                "--cache-gb."
            ),
        )
    return steps, status != openvino_genai.GenerationStatus.RUNNING, None


class BatchConversation:
    """Compute the answers of one conversation in the batch. See [`Conversation`].

    The prefix cache of the engine keeps the earlier turns of all conversations.
    """

    def __init__(self, engine: BatchEngine):
        self._engine = engine

    def reset(self) -> None:
        """Do nothing: a conversation has no state of its own."""

    def answer(self, prompt: Prompt, answer: Answer, streamer: Any = None, **options: Any) -> None:
        config = self._engine.generation_config(options)
        output = AnswerStreamer(self._engine.processor.tokenizer, answer, streamer)
        output.put(prompt.input_ids)
        answer.stats.reused_tokens = None
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        images = self._engine.image_tensors(prompt.messages)
        request = self._engine.submit(prompt.text, images, config, news.put, news.put)
        while isinstance(steps := news.get(), list):
            for token in (token for step in steps for token in step.tokens):
                if not answer.cancelled and not answer.stopped:
                    output.put(torch.tensor([token]))
            if answer.cancelled or answer.stopped:
                request.cancel()
        if steps is not None:
            raise steps
        output.end()
