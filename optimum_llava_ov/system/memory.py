"""Save memory and time in an export. On systems without these functions, everything works, but more slowly."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def return_what_is_freed() -> None:
    """Let the C library return buffers to the system as soon as they are freed.

    These settings hold for the whole process, so call this only in a command of this package. Otherwise the library
    keeps freed buffers: 10 % of an export's memory at 7B. Only glibc has these settings.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
        libc.mallopt(_M_ARENA_MAX, 2)


def return_freed() -> None:
    """Return freed buffers that the C library keeps to the system. Only glibc needs this."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reserve(file: Path, size: int) -> None:
    """Make a file of `size` bytes, to be mapped. If the disk is full, this raises an error; a mapping would crash."""
    with file.open("wb") as reserved:
        os.posix_fallocate(reserved.fileno(), 0, size)


def empty_tensor(shape: torch.Size, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """Return a tensor of undefined values, in a mapped file if there is a folder for it, else in memory.

    The file has no name; the system deletes it with the mapping. Only POSIX systems delete a file that is mapped.
    Elsewhere the tensor is in memory.
    """
    if folder is None or os.name != "posix":
        return torch.empty(shape, dtype=dtype)
    file = folder / ".tensor"
    if hasattr(os, "posix_fallocate"):
        reserve(file, shape.numel() * dtype.itemsize)
    tensor = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype)
    file.unlink()
    return tensor.view(shape)


def move_to_disk(parameters: Iterable[torch.nn.Parameter], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Move parameters to mapped files, one at a time, and convert them to `dtype`. What shares memory still does.

    See [`empty_tensor`].
    """
    moved: dict[int, torch.Tensor] = {}
    for parameter in parameters:
        weight = parameter.data
        key = weight.data_ptr()
        if key not in moved:
            moved[key] = empty_tensor(weight.shape, dtype or weight.dtype, folder).copy_(weight)
        parameter.data = moved[key]


def free(module: torch.nn.Module) -> None:
    """Free the weights of a module."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.new_empty(0)
    gc.collect()
    return_freed()


def read_ahead(files: list[Path]) -> None:
    """Let the system read files into its cache in the background, up to half of the free memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    budget_of_all = psutil.virtual_memory().free // 2

    def advise() -> None:
        budget = budget_of_all
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
