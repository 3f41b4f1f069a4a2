"""Find out what a terminal can show. Must be fast to import."""

from __future__ import annotations

import os
from typing import TextIO


def is_plain(output: TextIO) -> bool:
    """Return whether output must be plain text: it is not a terminal, or one without control codes."""
    default = "" if os.name == "nt" else "dumb"  # Windows does not set it
    return not output.isatty() or os.environ.get("TERM", default) in ("dumb", "unknown")
