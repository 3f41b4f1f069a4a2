"""Let a limited number of requests in, and a limited number wait."""

from __future__ import annotations

import asyncio
from collections import deque


class QueueFullError(Exception):
    """Raised if no place is free and the queue is full."""


class Places:
    """Give places to requests in the order in which they come. For one event loop.

    Args:
        places: Number of places. An answer takes one.
        queue: Number of requests that may wait.
    """

    def __init__(self, places: int, queue: int):
        self.places = places
        self.queue = queue
        self.running = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self, number: int) -> None:
        """Wait for `number` places. [`release`] gives them back.

        Raises:
            [`QueueFullError`]: Too many requests wait.
        """
        if not self._waiting and self.running + number <= self.places:
            self.running += number
        else:
            await self._wait(number)

    def release(self, number: int) -> None:
        self.running -= number
        self._wake()

    async def _wait(self, number: int) -> None:
        if len(self._waiting) >= self.queue:
            raise QueueFullError
        turn = (number, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        try:
            await turn[1]
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:  # the place was given and the request was cancelled at the same time
                self.running -= number
            self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self.running + self._waiting[0][0] <= self.places:
            number, future = self._waiting.popleft()
            if not future.cancelled():
                self.running += number
                future.set_result(None)
