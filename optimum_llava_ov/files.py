"""Small files of the user's: written as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a file beside its place, and rename it. Keeps the mode of a file that was there, and a link to it.

    Raises:
        `OSError`: it cannot be written. What was in the file before is still there.
    """
    if file.exists() and not file.is_file():  # a pipe or a terminal, which nothing can take the place of
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as stream:
            if file.exists():
                shutil.copymode(file, partial)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise OSError(
            error.errno, f"Not saved, and what was there before is unchanged: {error.strerror}", str(file)
        ) from error
    finally:
        partial.unlink(missing_ok=True)
