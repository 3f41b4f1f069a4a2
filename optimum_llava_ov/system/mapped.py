"""How much of a mapped file stays in memory. Hints: where they are not available all works, with more memory resident."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


INTERVAL = 0.1  # seconds


@contextmanager
def read_once(file: Path) -> Iterator[None]:
    """While a mapped file is read from beginning to end, and will not be read again, keep what was read from piling up.

    OpenVINO copies weights into the layout its kernels want when it first runs a graph. Without this, the files and the copies are
    resident together: twice the model. A page that is needed all the same is mapped again from the system's file cache.
    """
    done = threading.Event()

    def release() -> None:
        while not done.wait(INTERVAL):
            release_pages(file)

    thread = threading.Thread(target=release, name="release-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release_pages(file)


def release_pages(file: Path) -> None:
    """Unmap the pages of a file that this process has mapped read-only. The mapping stays valid. Linux only."""
    maps = Path("/proc/self/maps")
    if not hasattr(mmap, "MADV_DONTNEED") or not maps.exists():
        return
    libc = ctypes.CDLL(None)
    name = str(file.resolve())
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name and "w" not in fields[1]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
