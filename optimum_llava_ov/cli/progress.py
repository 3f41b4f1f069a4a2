"""Show that a command is busy. Must be fast to import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spinner(text: str, is_shown: bool) -> Iterator[None]:
    """Show a spinner and a text on standard error until the block ends."""
    if not is_shown:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
