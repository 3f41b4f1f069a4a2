"""Turn the tokens of an answer into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum_llava_ov.chat.streaming import StopStringFilter


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


class AnswerText:
    """Decode an answer as it comes, up to the first stop string.

    Args:
        tokenizer: Tokenizer of the bundle.
        stop_strings: Texts that end the answer. They are not part of it.

    Attributes:
        tokens (`list[int]`): All tokens so far.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._filter = StopStringFilter(stop_strings)
        self._decoded = ""
        self._context = 0  # Tokens from here on are decoded together, because spaces depend on the token before
        self._shown = 0  # Tokens up to here are in `_decoded`

    @property
    def text(self) -> str:
        """Return the text so far."""
        return self._filter.text

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was generated."""
        return self._filter.stopped

    def add(self, tokens: Sequence[int]) -> str:
        """Add tokens. Return the text that is certain now."""
        self.tokens += tokens
        before = self._decode(self.tokens[self._context : self._shown])
        after = self._decode(self.tokens[self._context :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._context, self._shown = self._shown, len(self.tokens)
        piece = after[len(before) :]
        self._decoded += piece
        return self._filter(piece)

    def end(self) -> str:
        """Return the rest of the text."""
        complete = self._decode(self.tokens)
        rest = complete[len(self._decoded) :] if complete.startswith(self._decoded) else ""
        return self._filter(rest) + self._filter.flush()

    def complete(self) -> str:
        """Return the whole text."""
        whole = StopStringFilter(self._stop_strings)
        return whole(self._decode(self.tokens)) + whole.flush()

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
