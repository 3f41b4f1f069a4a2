"""Set the number of torch's threads. Overlapping calls share this number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


_lock = threading.Lock()
_num_calls = 0  # number of calls that are in the context now
_num_threads_before = 0  # number of threads when the first of these calls began


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread in this context.

    Between two inferences of OpenVINO, torch has little to do, but its idle threads spin on the cores that OpenVINO
    needs. This costs 5 % at 1.3B.

    torch stores the number for the thread that sets it, and for threads that begin later. So each call sets the number
    of its own thread. At its end, each call restores the number that the first of the overlapping calls found. A
    later call may have found the 1 of an earlier call.
    """
    global _num_calls, _num_threads_before
    with _lock:
        if _num_calls == 0:
            _num_threads_before = torch.get_num_threads()
        _num_calls += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _num_calls -= 1
            torch.set_num_threads(_num_threads_before)
