"""Memory of this process, on every system."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import psutil


INTERVAL = 0.02  # seconds between two samples of what no system keeps the maximum of


def peak_rss() -> int:
    """Bytes of resident memory at most since the process began, mapped files included. The system's own maximum, without gaps."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    status = Path("/proc/self/status")  # Linux, whose `ru_maxrss` may be that of the process which started this one
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    import resource

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else 1024 * maximum


def anonymous_memory() -> int | None:
    """Bytes that this process needs for itself, without what is mapped from files and can be dropped. `None` where the system does
    not tell, as on macOS.
    """
    memory = psutil.Process().memory_info()
    if hasattr(memory, "private"):  # Windows
        return memory.private
    return memory.rss - memory.shared if hasattr(memory, "shared") else None


class AnonymousPeak:
    """The most of [`anonymous_memory`] while the `with` block runs."""

    def __init__(self) -> None:
        self.bytes = anonymous_memory()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")

    def __enter__(self) -> AnonymousPeak:
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
            self.bytes = max(self.bytes, anonymous_memory())
