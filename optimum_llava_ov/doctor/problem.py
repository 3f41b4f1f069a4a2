"""What a check finds, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Describe something that is wrong.

    Attributes:
        found (`str`): What is wrong, as a sentence.
        fix (`str`): What to do: a command, or a sentence.
        stops (`bool`): Whether commands fail because of it. Otherwise something is only slower or larger.
    """

    found: str
    fix: str
    stops: bool = True
