"""Measure the memory of this process, on every system."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil


if TYPE_CHECKING:
    from typing_extensions import Self


INTERVAL = 0.02  # seconds between two samples; no system records this maximum


def peak_rss() -> int:
    """Return the maximum resident memory since the process began, in bytes, as the system records it.

    Mapped files are included.
    """
    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return memory.peak_wset
    status = Path("/proc/self/status")  # Linux. Its `ru_maxrss` may be that of the parent process.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    import resource

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else 1024 * maximum


def anonymous_memory() -> int | None:
    """Return the memory of this process without mapped files, in bytes.

    Returns:
        `None` if the system does not report it, as on macOS.
    """
    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return memory.private
    return memory.rss - memory.shared if hasattr(memory, "shared") else None


class AnonymousPeak:
    """Measure the maximum of [`anonymous_memory`] in a `with` block.

    Attributes:
        bytes (`int` or `None`): the maximum so far; `None` if the system does not report it.
    """

    def __init__(self) -> None:
        self.bytes = anonymous_memory()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")

    def __enter__(self) -> Self:
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bytes is not None:
            self._end.set()
            self._thread.join()

    def _watch(self) -> None:
        at_end = False
        while not at_end:
            at_end = self._end.wait(INTERVAL)
            self.bytes = max(self.bytes or 0, anonymous_memory() or 0)
