"""Replace small files of the user: completely, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a new file next to the old one, then rename it. Keep the mode of the old file.

    If `file` is a link, its target is replaced.

    Raises:
        `OSError`: The file cannot be written. Its earlier content is unchanged.
    """
    if file.exists() and not file.is_file():  # a pipe or a terminal, which cannot be replaced
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("x", encoding="utf-8") as stream:
            if file.exists():
                shutil.copymode(file, partial)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise OSError(
            error.errno, f"Not saved. The earlier content of the file is unchanged: {error.strerror}", str(file)
        ) from error
    finally:
        partial.unlink(missing_ok=True)
