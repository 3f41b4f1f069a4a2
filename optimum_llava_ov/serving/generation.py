"""Compute the answers to one request: wait for a place, prepare, join the batch, and pass on what comes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jinja2.exceptions import TemplateError

from optimum_llava_ov.batching.engine import BatchRequest, Step
from optimum_llava_ov.batching.options import RequestOptions
from optimum_llava_ov.batching.text import AnswerText
from optimum_llava_ov.errors import EngineFailureError
from optimum_llava_ov.serving.admission import QueueFullError
from optimum_llava_ov.serving.errors import ApiError, try_again
from optimum_llava_ov.serving.metrics import Metrics
from optimum_llava_ov.serving.models import Job, ServedModel


@dataclass(frozen=True)
class Piece:
    """Hold a piece of an answer.

    Attributes:
        choice (`int`): Index of the answer.
        text (`str`): New text.
        tokens (`list[int]`), logprobs (`list[float]`): New tokens, with the logarithms of their probabilities.
        finish_reason (`str` or `None`): "stop" or "length" with the last piece.
    """

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None


class Generation:
    """Compute the answers to one request. Iterate over it for pieces, and [`close`] it.

    Args:
        model: The model that answers.
        num_answers: Number of answers that are computed at the same time.

    Attributes:
        prompt_tokens (`int`): Number of tokens of the prompts.
        answer_tokens (`int`): Number of tokens of the answers so far.
        texts (`list[AnswerText]`): The answers.
        finish_reasons (`list[str | None]`): Why they ended.
    """

    def __init__(self, model: ServedModel, num_answers: int, metrics: Metrics):
        self.prompt_tokens = 0
        self.answer_tokens = 0
        self.texts: list[AnswerText] = []
        self.finish_reasons: list[str | None] = [None] * num_answers
        self._model = model
        self._num_answers = num_answers
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self._has_place = False
        self._requests: list[BatchRequest] = []
        self._closed = False
        self._lock = threading.Lock()
        self._remaining = 0
        self._began = time.monotonic()
        self._first = self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, read: Callable[[], list[Job]]) -> None:
        """Wait for a place, and join the batch.

        Args:
            read: Reads and checks the request. Called in another thread.

        Raises:
            [`ApiError`]: The request is wrong, the queue is full, the time is over, or the model failed.
        """
        settings = self._model.settings
        if self._num_answers > settings.max_running:
            raise ApiError(
                f"The request asks for {self._num_answers} answers. This server computes up to "
                f"{settings.max_running} at a time. Ask for fewer."
            )
        try:
            await asyncio.wait_for(self._join(read), settings.timeout)
        except asyncio.TimeoutError:
            raise self._timed_out() from None
        self._timer = self._loop.call_later(
            max(0.0, settings.timeout - (time.monotonic() - self._began)), self._news.put_nowait, self._timed_out()
        )

    async def _join(self, read: Callable[[], list[Job]]) -> None:
        try:
            await self._model.places.acquire(self._num_answers)
            self._has_place = True
        except QueueFullError:
            raise ApiError(
                f"{self._model.places.waiting} requests wait for the model {self._model.name}. Try again later.",
                status=429,
                code="queue_full",
                retry_after=self._retry_after(),
            ) from None
        await self._loop.run_in_executor(self._model.threads, self._prepare, read)
        self._metrics.prompt_tokens.labels(self._model.name).inc(self.prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            if news is None:
                return
            for piece in news:
                if self.finish_reasons[piece.choice] is None:
                    yield self._take(piece)

    def close(self) -> None:
        """Leave the batch, if the answers are not complete, and free the place."""
        with self._lock:
            self._closed = True
        for request in self._requests:
            request.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._leave()
        name = self._model.name
        self._metrics.generated_tokens.labels(name).inc(self.answer_tokens)
        if self._remaining and self._first:
            self._metrics.cancelled.labels(name).inc()
        if self._first:
            self._metrics.first_token.labels(name).observe(self._first - self._began)
            self._metrics.seconds.labels(name).observe(self._last - self._began)
            steps = self.answer_tokens / len(self.texts) - 1
            if steps > 0:
                self._metrics.per_token.labels(name).observe((self._last - self._first) / steps)

    def _leave(self) -> None:
        """Free the place. A client that reads slowly does not keep it."""
        if self._has_place:
            self._has_place = False
            self._model.places.release(self._num_answers)

    def _checked(self, read: Callable[[], list[Job]]) -> list[Job]:
        try:
            return read()
        except ApiError:
            raise
        except (ValueError, TemplateError) as error:
            raise ApiError(str(error)) from error

    def _prepare(self, read: Callable[[], list[Job]]) -> None:
        """Read the request, and join the batch. Called in another thread, because images are encoded here."""
        with self._model.engine.join():
            self._read_and_submit(read)

    def _read_and_submit(self, read: Callable[[], list[Job]]) -> None:
        jobs = self._checked(read)
        self.prompt_tokens = sum(job.num_tokens for job in jobs)
        self._remaining = self._num_answers
        tokenizer = self._model.engine.processor.tokenizer
        self.texts = [AnswerText(tokenizer, job.options.stop_strings) for job in jobs for _ in range(job.num_answers)]
        choice = 0
        for job in jobs:
            for number in range(job.num_answers):
                if self._closed:  # the client went away meanwhile
                    return
                seed = job.options.seed
                options = replace(job.options, seed=None if seed is None else (seed + number) % 2**63)
                request = self._submit_one(job, options, choice)
                with self._lock:
                    self._requests.append(request)
                    if self._closed:
                        request.cancel()
                choice += 1

    def _submit_one(self, job: Job, options: RequestOptions, choice: int) -> BatchRequest:
        engine = self._model.engine
        try:
            config = options.generation_config(engine)
            receive, end = self._poster(self._receive, choice), self._poster(self._end)
            return engine.submit(job.text, job.images, config, receive, end)
        except EngineFailureError as error:
            raise try_again(str(error)) from error
        except ValueError as error:
            raise ApiError(str(error)) from error

    def _poster(self, function: Callable[..., None], *first: Any) -> Callable[[Any], None]:
        """Return a function for the engine's thread that calls `function` in the event loop."""

        def post(value: Any) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(partial(function, *first, value))

        return post

    def _receive(self, choice: int, steps: list[Step]) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._news.put_nowait([Piece(choice, "", step.tokens, step.logprobs, step.finish_reason) for step in steps])

    def _end(self, error: Exception | None) -> None:
        if error is not None:
            self._news.put_nowait(try_again(str(error)))
        self._remaining -= 1
        if not self._remaining:
            self._leave()
            self._news.put_nowait(None)

    def _take(self, piece: Piece) -> Piece:
        """Return a piece with its text. The answer ends with a stop text, even if the engine did not see it."""
        text = self.texts[piece.choice]
        shown = text.add(piece.tokens)
        reason = "stop" if text.stopped else piece.finish_reason
        if reason is not None:
            shown += text.end()
            self.finish_reasons[piece.choice] = reason
            self._requests[piece.choice].cancel()
        self.answer_tokens += len(piece.tokens)
        return Piece(piece.choice, shown, piece.tokens, piece.logprobs, reason)

    def _timed_out(self) -> ApiError:
        return ApiError(
            f"The answer was not complete after {self._model.settings.timeout:g} seconds. Ask for a shorter one.",
            status=504,
            code="timeout",
        )

    def _retry_after(self) -> int:
        """Return the seconds after which a place in the queue is likely. The server does not know it better."""
        return 1 + self._model.places.waiting // max(1, self._model.settings.max_running)
