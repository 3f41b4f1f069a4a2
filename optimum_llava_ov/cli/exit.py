"""How a command ends: with an exit status, and one sentence where the user can do something. Light to import, as all of this folder."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum_llava_ov.errors import (
    BundleError,
    HubError,
    ImageError,
    InvalidCheckpointError,
    UnsupportedCheckpointError,
)


DEBUG = "OPTIMUM_LLAVA_OV_DEBUG"
VERBOSE_HELP = f"Show where an error comes from: its traceback, as {DEBUG}=1 does for all commands."
FAILED, INTERRUPTED = 1, 130  # as shells count: 128 and the number of the signal

_OURS = (UnsupportedCheckpointError, InvalidCheckpointError, BundleError, HubError, ImageError)
_PACKAGE = Path(__file__).resolve().parent.parent
_REPORT = (
    "This is a bug of optimum-llava-ov, or of a library that it uses. Please open an issue in the repository of optimum-llava-ov, with all "
    "of the above."
)


@contextmanager
def exit_status(verbose: bool = False, token: str | None = None) -> Iterator[None]:
    """Run a command in it. An exception becomes an exit status and what the user needs to know on standard error.

    What the user can mend is `error: ...` and status 1; Ctrl-C is one line and status 130; anything else is a bug, and keeps its
    traceback. No token is ever shown.

    Args:
        verbose: show the traceback of every error.
        token: one that was given on the command line.
    """
    try:
        yield
    except KeyboardInterrupt:
        _say("Interrupted.")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None or verbose or os.environ.get(DEBUG, "0") not in ("", "0"):
            _say("".join(traceback.format_exception(type(error), error, error.__traceback__)), token)
        _say(_REPORT if sentence is None else f"error: {sentence}", token)
        raise SystemExit(FAILED) from None


def user_sentence(error: Exception) -> str | None:
    """What to tell the user about an exception; `None` if it is a bug.

    The user can mend our own errors, what the operating system refuses, and a package that is not installed. Where this package raises a
    plain `ValueError`, an argument is wrong. One that comes from a library was not foreseen.
    """
    if isinstance(error, _OURS) or (isinstance(error, ValueError) and _is_raised_here(error)):
        return str(error)
    if isinstance(error, OSError):
        if error.errno is None or error.strerror is None:
            return str(error) or type(error).__name__
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror}: {files}" if files else error.strerror
    if isinstance(error, ImportError) and error.name is None:  # somebody's sentence about what to install
        return str(error)
    return None


def _is_raised_here(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and Path(place.tb_frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE)


def _say(text: str, token: str | None = None) -> None:
    from optimum_llava_ov.hub_errors import redacted

    print(redacted(text.rstrip(), token), file=sys.stderr, flush=True)
