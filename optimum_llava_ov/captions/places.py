"""Share the places of a batch between streams of images."""

from __future__ import annotations

import threading


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
        self._changed = threading.Condition()

    def stream(self) -> Stream:
        """Begin a stream of images."""
        stream = Stream(self)
        with self._changed:
            self._streams.append(stream)
        return stream

    def take(self, stream: Stream, most: int, wait: bool) -> int:
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._is_turn(stream))
            number = min(most, self._free) if self._is_turn(stream) else 0
            self._free -= number
            return number

    def give_back(self, number: int) -> None:
        with self._changed:
            self._free += number
            self._changed.notify_all()

    def leave(self, stream: Stream) -> None:
        with self._changed:
            if stream in self._streams:
                self._streams.remove(stream)
                self._changed.notify_all()

    def _is_turn(self, stream: Stream) -> bool:
        return self._free >= self._least and self._streams[0] is stream


class Stream:
    """A stream of images. It gets places only when no earlier stream wants some, so that they end one by one.

    Attributes:
        taken (`int`): Number of places that it has.
    """

    def __init__(self, places: Places):
        self.taken = 0
        self._places = places

    def take(self, most: int, wait: bool) -> int:
        """Return how many places it gets now, up to `most`: none, or several. Wait for some if `wait`."""
        number = self._places.take(self, most, wait)
        self.taken += number
        return number

    def give_back(self, number: int) -> None:
        """Free places."""
        self.taken -= number
        self._places.give_back(number)

    def end(self) -> None:
        """Take no more places. The images that have one keep it."""
        self._places.leave(self)

    def close(self) -> None:
        """End, and free all places."""
        self.end()
        self.give_back(self.taken)
