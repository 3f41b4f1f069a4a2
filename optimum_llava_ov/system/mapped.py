"""Release the pages of mapped files. On systems without this, everything works, but more memory is resident."""

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
    """Release the pages of a mapped file while it is read once, from beginning to end.

    When OpenVINO runs a graph for the first time, it copies weights into the layout of its kernels. Without this
    context, the file and the copies are resident together: twice the size of the model. If a released page is needed
    again, the system maps it again from its file cache.
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
    """Drop the resident pages of a file that is mapped read-only. The mapping stays valid. Linux only."""
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
