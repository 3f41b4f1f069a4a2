"""An answer while it is made: pieces of text for whoever reads it, and a way to stop it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer


@dataclass
class Stats:
    """
    Attributes:
        prompt_tokens (`int`): length of the prompt; of these, `reused_tokens` were in the cache.
            `None` if the engine does not tell.
        new_tokens (`int`): generated.
        time_to_first_token (`float`): seconds from the question to the first token.
        seconds (`float`): from the question to the last token.
    """

    prompt_tokens: int = 0
    reused_tokens: int | None = 0
    new_tokens: int = 0
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 if there was only one."""
        duration = self.seconds - self.time_to_first_token
        return (self.new_tokens - 1) / duration if self.new_tokens > 1 and duration > 0 else 0.0

    def __str__(self) -> str:
        cached = "" if self.reused_tokens is None else f" ({self.reused_tokens} of them in the cache)"
        return (
            f"{self.prompt_tokens} tokens asked{cached}, {self.new_tokens} answered, "
            f"first after {self.time_to_first_token:.2f} s, then {self.tokens_per_second:.1f} tokens/s"
        )


class Answer:
    """An answer that is being made in another thread. Iterate over it for pieces of text as they come.

    To stop iterating before the end cancels it.

    Attributes:
        stats ([`Stats`]): what it took; complete when the answer is.
        cancelled (`bool`): whether it was stopped.
        kept (`bool`): whether the session has taken in the question and what was said; known when the answer ends. False after
            an error, and if the answer was cancelled before its first token.
    """

    def __init__(self, work: Callable[[Answer], str], stop_strings: Sequence[str] = ()):
        self.stats = Stats()
        self.kept = False
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._filter = StopStringFilter(stop_strings)
        self._cancel = threading.Event()
        self._error: BaseException | None = None
        self._text: str | None = None
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="answer")
        self._thread.start()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def cancel(self) -> None:
        """Stop after the token that is being computed. Returns at once; [`result`] waits for the end."""
        self._cancel.set()

    def wait(self) -> None:
        """Wait for the end, whatever it is."""
        self._thread.join()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> str:
        """Wait for the end, and give the whole text. Raises what went wrong, if anything did."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._text or ""

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
        except GeneratorExit:
            self.cancel()
            self.wait()
            raise
        self._pieces.put(None)  # so that a second reader finds the end too
        self.result()

    def emit(self, text: str) -> None:
        """Give text to the reader, what may be the beginning of a stop string held back."""
        self._put(self._filter(text))

    def token(self) -> None:
        """Note that a token has come."""
        self.stats.new_tokens += 1
        self.stats.seconds = time.perf_counter() - self._started
        if self.stats.new_tokens == 1:
            self.stats.time_to_first_token = self.stats.seconds

    @property
    def text(self) -> str:
        """What was said until now, stop strings and what follows them left out."""
        return self._filter.text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def _put(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)

    def _run(self, work: Callable[[Answer], str]) -> None:
        try:
            self._text = work(self)
        except BaseException as error:
            self._error = error
        finally:
            self._pieces.put(None)

    def flush(self) -> None:
        """Give the reader what was held back."""
        self._put(self._filter.flush())


class StopStringFilter:
    """Lets text through up to the first stop string, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stop_strings: Sequence[str]):
        self.stop_strings = tuple(stop_strings)
        self.text = ""
        self._held = ""
        self.stopped = False

    def __call__(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [text.index(stop) for stop in self.stop_strings if stop in text]
        self.stopped = bool(ends)
        passed = text[: min(ends)] if ends else text[: len(text) - self._possible_beginning(text)]
        self._held = "" if ends else text[len(passed) :]
        self.text += passed
        return passed

    def flush(self) -> str:
        passed, self._held = self._held, ""
        self.text += passed
        return passed

    def _possible_beginning(self, text: str) -> int:
        lengths = range(max(map(len, self.stop_strings), default=1) - 1, 0, -1)
        return next((n for n in lengths for stop in self.stop_strings if n < len(stop) and text.endswith(stop[:n])), 0)


class AnswerStreamer(TextStreamer):
    """Turns the tokens of `generate` into pieces of an answer, word by word."""

    def __init__(self, tokenizer: Any, answer: Answer, other: BaseStreamer | None = None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._other = other
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._answer.token()
        self._prompt_seen = True
        super().put(value)
        if self._other is not None:
            self._other.put(value)

    def end(self) -> None:
        super().end()
        if self._other is not None:
            self._other.end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._answer.emit(text)
        if stream_end:
            self._answer.flush()


class Cancelled(StoppingCriteria):
    """Stops `generate` once the answer is cancelled."""

    def __init__(self, answer: Answer):
        self._answer = answer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self._answer.cancelled, dtype=torch.bool)
