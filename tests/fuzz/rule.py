"""The rule of the campaign, and how one attempt is held to it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import peak_above_idle

from optimum_llava_ov.cli.exit import user_sentence


SECONDS = 10  # of the processor; the watching process stops what takes this long without the processor
MEGABYTES = 500
CHARACTERS = 3000  # of an error, which a person is to read


class BrokenRuleError(AssertionError):
    """What came out is neither the right answer nor one of our errors, or it took too much, or a file has changed."""


def attempt(
    work: Callable[[], Any], *folders: Path, seconds: float = SECONDS, also: tuple[type[Exception], ...] = ()
) -> Any:
    """Do something that may be refused.

    Args:
        folders: of the user's; nothing in them may change.
        seconds: of the processor, in all threads, that it may take.
        also: exceptions that are right here, besides our own.

    Returns:
        What `work` returns; the error if it was refused.

    Raises:
        [`BrokenRuleError`]: says what is wrong.
    """
    before = [snapshot(folder) for folder in folders]
    outcome = []

    def refused_or_done():
        try:
            outcome.append(work())
        except BrokenRuleError:
            raise
        except Exception as error:
            check_error(error, also)
            outcome.append(error.with_traceback(None))

    begun = time.process_time()
    peak = peak_above_idle(refused_or_done)
    took = time.process_time() - begun
    if took > seconds:
        raise BrokenRuleError(f"It took {took:.1f} seconds of the processor.")
    if peak > MEGABYTES:
        raise BrokenRuleError(f"It took {peak:.0f} MB.")
    for folder, files in zip(folders, before):
        now = snapshot(folder)
        if now != files:
            raise BrokenRuleError(f"Files have changed: {sorted(dict(files.items() ^ now.items()))}.")
    return outcome[0]


def check_error(error: Exception, also: tuple[type[Exception], ...] = ()) -> None:
    """Check that an exception is one of our errors: a sentence of ours for the user."""
    if isinstance(error, also):
        return
    if user_sentence(error) is None or isinstance(error, OSError):
        raise BrokenRuleError(f"A raw exception: {type(error).__name__}: {error}") from error
    text = str(error)
    if not 20 < len(text) < CHARACTERS or "\n" in text:
        raise BrokenRuleError(f"An error that is not a sentence: {text[:CHARACTERS]!r}") from error


def snapshot(folder: Path) -> dict[str, tuple]:
    """What changes when anything in a folder does: names, and of each file the kind, size, time and place on the disk."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found
