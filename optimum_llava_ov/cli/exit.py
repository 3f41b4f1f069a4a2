"""End commands with an exit status, and with one sentence if the user can fix the error. Must be fast to import."""

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
VERBOSE_HELP = f"Show the traceback of an error, as {DEBUG}=1 does for all commands."
FAILED, INTERRUPTED = 1, 130  # as in shells: 128 + the number of the signal

_OURS = (UnsupportedCheckpointError, InvalidCheckpointError, BundleError, HubError, ImageError)
_PACKAGE = Path(__file__).resolve().parent.parent
_REPORT = (
    "This is a bug in optimum-llava-ov, or in a library that it uses. Please open an issue in the repository of "
    "optimum-llava-ov, and include all of the above."
)


@contextmanager
def exit_status(verbose: bool = False, token: str | None = None) -> Iterator[None]:
    """Turn exceptions of a command into an exit status and a message on standard error.

    An error that the user can fix prints `error: ...` and has status 1. Ctrl-C prints one line and has status 130. Any
    other exception is a bug: it prints its traceback and has status 1. Tokens are never shown.

    Args:
        verbose: Show the traceback of every error.
        token: Token from the command line, which must not be shown.
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
    """Return what to tell the user about an exception, or `None` if it is a bug.

    The user can fix errors of this package, errors of the operating system, and missing packages. A plain `ValueError`
    that this package raises means a wrong argument. A `ValueError` that a library raises is a bug.
    """
    if isinstance(error, _OURS) or (isinstance(error, ValueError) and _is_raised_here(error)):
        return str(error)
    if isinstance(error, OSError):
        if error.errno is None or error.strerror is None:
            return str(error) or type(error).__name__
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror}: {files}" if files else error.strerror
    if isinstance(error, ImportError) and error.name is None:
        # The message of this package says what to install, that of transformers only which of its modules failed
        return str(error) if error.__cause__ is None or _is_raised_here(error) else _broken_package(error)
    return None


def _broken_package(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"A package does not import: {error}. To see which one, and how to fix it: optimum-cli llava-ov doctor"


def _is_raised_here(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and Path(place.tb_frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE)


def _say(text: str, token: str | None = None) -> None:
    from optimum_llava_ov.hub_errors import redacted

    print(redacted(text.rstrip(), token), file=sys.stderr, flush=True)
