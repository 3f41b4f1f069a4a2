"""Share the places of a batch between streams of images."""

from __future__ import annotations

import threading
from collections.abc import Callable


_TOGETHER = 4  # A quarter of the places is given at once


class Places:
    """Count the places of a batch.

    Places are given several at a time. Prompts that begin together fill the steps of the model, and a step with twice
    as many tokens takes less than twice as long. A place that waits for others costs little, because a step with fewer
    answers is shorter.

    Args:
        number: Number of places.
    """

    def __init__(self, number: int):
        self._free = number
        self._least = max(1, number // _TOGETHER)
        self._streams: list[Stream] = []  # that want places, in the order in which they began
        self._lock = threading.Lock()

    def stream(self, wake: Callable[[], None]) -> Stream:
        """Begin a stream of images.

        Args:
            wake: Called in another stream's thread when places are free for this one.
        """
        stream = Stream(self, wake)
        with self._lock:
            self._streams.append(stream)
        return stream

    def take(self, stream: Stream, most: int) -> int:
        with self._lock:
            if self._free < self._least or self._streams[0] is not stream:
                return 0
            number = min(most, self._free)
            self._free -= number
            return number

    def give_back(self, stream: Stream, number: int, leaves: bool) -> None:
        with self._lock:
            self._free += number
            if leaves and stream in self._streams:
                self._streams.remove(stream)
            if self._streams and self._streams[0] is not stream and self._free >= self._least:
                self._streams[0].wake()


class Stream:
    """A stream of images. It gets places only when no earlier stream wants some, so that they end one by one.

    Attributes:
        taken (`int`): Number of places that it has.
    """

    def __init__(self, places: Places, wake: Callable[[], None]):
        self.wake = wake
        self._places = places
        self.taken = 0

    def take(self, most: int) -> int:
        """Return how many places it gets now, up to `most`: none, or several."""
        number = self._places.take(self, most)
        self.taken += number
        return number

    def give_back(self, number: int) -> None:
        """Free places."""
        if number:
            self.taken -= number
            self._places.give_back(self, number, leaves=False)

    def end(self) -> None:
        """Take no more places. The images that have one keep it."""
        self._places.give_back(self, 0, leaves=True)

    def close(self) -> None:
        """End, and free all places."""
        number, self.taken = self.taken, 0
        self._places.give_back(self, number, leaves=True)
