"""Stream an answer while it is computed, and stop it."""

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

from optimum_llava_ov.units import readable_rate


@dataclass
class Stats:
    """Count the tokens of an answer and measure its time.

    Attributes:
        prompt_tokens (`int`): Number of tokens of the prompt.
        reused_tokens (`int` or `None`): How many of them were in the cache. `None` if the engine does not tell.
        new_tokens (`int`): Number of generated tokens.
        time_to_first_token (`float`): Seconds from the question to the first token.
        seconds (`float`): Seconds from the question to the last token.
    """

    prompt_tokens: int = 0
    reused_tokens: int | None = 0
    new_tokens: int = 0
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the speed after the first token; 0 if there is only one token."""
        duration = self.seconds - self.time_to_first_token
        return (self.new_tokens - 1) / duration if self.new_tokens > 1 and duration > 0 else 0.0

    def __str__(self) -> str:
        cached = "" if self.reused_tokens is None else f" ({self.reused_tokens} from the cache)"
        return (
            f"prompt {self.prompt_tokens} tokens{cached}, answer {self.new_tokens} tokens, "
            f"first token {self.time_to_first_token:.2f} s, then {readable_rate(self.tokens_per_second)} tokens/s"
        )


class Answer:
    """Compute an answer in another thread. Iterate over it for pieces of text as they come.

    Leaving the iteration before the end cancels the answer.

    Attributes:
        stats ([`Stats`]): Numbers of tokens and times. Complete when the answer ends.
        cancelled (`bool`): Whether the answer was cancelled.
        kept (`bool`): Whether the session has added the question and the answer to the conversation. Known when the
            answer ends. False after an error, and if the answer was cancelled before its first token.
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
        """Stop after the current token. Return at once; [`result`] waits for the end."""
        self._cancel.set()

    def wait(self) -> None:
        """Wait for the end. Do not raise errors of the answer."""
        self._thread.join()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> str:
        """Wait for the end, and return the whole text. Raise the error of the answer, if there is one."""
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
        self._pieces.put(None)  # a second reader must also find the end
        self.result()

    def emit(self, text: str) -> None:
        """Pass text to the reader. Hold back text that may be the beginning of a stop string."""
        self._put(self._filter(text))

    def token(self) -> None:
        """Count a token."""
        self.stats.new_tokens += 1
        self.stats.seconds = time.perf_counter() - self._started
        if self.stats.new_tokens == 1:
            self.stats.time_to_first_token = self.stats.seconds

    @property
    def text(self) -> str:
        """Return the text so far, up to the first stop string."""
        return self._filter.text

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was generated."""
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
        """Pass the text that was held back to the reader."""
        self._put(self._filter.flush())


class StopStringFilter:
    """Pass text up to the first stop string. Hold back text that may be the beginning of one."""

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
    """Turn the tokens of `generate` into text of an answer, word by word."""

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
    """Stop `generate` when the answer is cancelled."""

    def __init__(self, answer: Answer):
        self._answer = answer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self._answer.cancelled, dtype=torch.bool)
