"""Keeping the memory and the disk of an export busy with what is needed, and with nothing else. Hints: without them all works, slower."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import threading
from pathlib import Path

import torch


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def return_what_is_freed() -> None:
    """Let the C library give buffers back to the system as soon as they are freed, instead of keeping them for later.

    For a process of our own: what is kept otherwise is 10 % of an export's memory at 7B. Only glibc has these settings.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
        libc.mallopt(_M_ARENA_MAX, 2)


def restart_with_huge_pages() -> None:
    """Start this command again, this once, with large buffers in pages of 2 MB. Does nothing where that is not possible, or not needed.

    Compressing fills and frees thousands of large buffers; page by page of 4 KB that is a quarter of its time. glibc can ask for large
    pages, but looks only when a process starts whether it should, and the kernel must leave the choice to programs (`madvise`).
    https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or not setting.exists() or "[madvise]" not in setting.read_text():
        return
    if _HUGE_PAGES.split("=")[0] not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, _HUGE_PAGES]))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def return_freed() -> None:
    """Give the system back what the C library keeps of buffers that were freed. Only glibc can, and only it needs to."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def move_to_disk(parameter: torch.nn.Parameter, folder: Path) -> None:
    """Map a parameter that is no tensor of the checkpoint from a file, too. The file has no name any more, and goes with the mapping."""
    file = folder / ".parameter"
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and would be a crash later
        with file.open("wb") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, parameter.numel() * parameter.element_size())
    tensor = torch.from_file(str(file), shared=True, size=parameter.numel(), dtype=parameter.dtype).view(
        parameter.shape
    )
    parameter.data = tensor.copy_(parameter.data)
    file.unlink()


def free(module: torch.nn.Module) -> None:
    """Let go of weights that are on disk now."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.new_empty(0)
    gc.collect()
    return_freed()


def read_ahead(files: list[Path]) -> None:
    """Have the system read files while something else is computed; as much as there is memory for."""
    if not hasattr(os, "posix_fadvise"):
        return
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def advise() -> None:
        budget = available // 2
        for file in files:
            with file.open("rb") as stream:
                size = min(file.stat().st_size, budget)
                os.posix_fadvise(stream.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
            budget -= size
            if budget <= 0:
                return

    threading.Thread(target=advise, name="read-ahead", daemon=True).start()


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None
