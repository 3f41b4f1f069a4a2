"""Let processes take turns: one works, the others wait. Files in a folder tell which one works."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


INTERVAL = 0.02  # seconds between two checks


@contextmanager
def turn(folder: str | None, name: str):
    """Wait until the process `name` is asked to work, and tell when it has finished.

    Without a folder, do not wait, because the process runs alone.
    """
    if folder is None:
        yield
        return
    begin, end = _files(folder, name)
    while not begin.exists():
        time.sleep(INTERVAL)
    begin.unlink()
    yield
    end.touch()


def give_turn(folder: str, name: str, is_over: Callable[[], bool]) -> None:
    """Ask the process `name` to work, and wait until it has finished or ended."""
    begin, end = _files(folder, name)
    begin.touch()
    while not end.exists() and not is_over():
        time.sleep(INTERVAL)
    end.unlink(missing_ok=True)


def _files(folder: str, name: str) -> tuple[Path, Path]:
    return Path(folder) / f"{name}.begin", Path(folder) / f"{name}.end"
