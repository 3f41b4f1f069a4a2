"""The number of torch's threads, which calls that overlap share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


_lock = threading.Lock()
_calls = 0  # that are inside now
_before = 0  # the number that the first of them found


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch has little to do between two steps of OpenVINO, but its idle threads spin on the cores that OpenVINO needs: 5 % at 1.3B.

    torch keeps the number twice: for the thread that sets it, and for threads that begin later. So each call sets it for its own
    thread, and each call leaves behind what the first one found: a later one may have found the 1 of an earlier one.
    """
    global _calls, _before
    with _lock:
        if _calls == 0:
            _before = torch.get_num_threads()
        _calls += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            torch.set_num_threads(_before)
