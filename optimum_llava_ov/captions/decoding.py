"""Read and decode images ahead, in other processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from PIL import Image

from optimum_llava_ov.captions.items import Item
from optimum_llava_ov.errors import ImageError
from optimum_llava_ov.images import ImageLimits, see_image, settings_of


Seen = Image.Image | Exception


def read_image(item: Item, image_processor: Any, limits: ImageLimits) -> Seen:
    """Return an image as the model sees it, or the error of an image that cannot be read."""
    try:
        return see_image(item.read(), image_processor, limits)
    except (ImageError, OSError) as error:
        return error


class Decoder:
    """Read and decode images in processes that live until [`close`]. Several threads may use it.

    A process that is killed costs the image that it decoded, not the job.

    Args:
        workers: Number of processes. 0: images are read in this process.
    """

    def __init__(self, image_processor: Any, limits: ImageLimits, workers: int):
        self._arguments = settings_of(image_processor) if workers else image_processor, limits
        self._workers = workers
        self._lock = threading.Lock()
        self._pool = self._new_pool(workers)  # its processes begin with the first image

    def ahead(self, items: Iterable[Item], ahead: int) -> Iterator[tuple[Item, Seen]]:
        """Read images in the order of `items`, some before they are needed.

        Args:
            ahead: Number of images that are read before they are needed.
        """
        if not self._workers:
            for item in items:
                yield item, read_image(item, *self._arguments)
            return
        remaining = iter(items)
        pending: deque[tuple[Item, Future[Seen], Executor]] = deque()
        try:
            while True:
                for item in itertools.islice(remaining, ahead - len(pending)):
                    pending.append(self._submit(item))
                if not pending:
                    return
                item, future, pool = pending.popleft()
                try:
                    seen: Seen = future.result()
                except BrokenProcessPool:
                    self._replace(pool)
                    seen = self._alone(item)
                    pending = deque(
                        self._submit(later) if other is pool else (later, future, other)
                        for later, future, other in pending
                    )
                yield item, seen
        finally:
            for _, future, _ in pending:
                future.cancel()

    def close(self) -> None:
        """End the processes. Do not wait for them."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, item: Item) -> tuple[Item, Future[Seen], Executor]:
        while True:
            pool = self._pool
            try:
                return item, pool.submit(_read_in_worker, item), pool
            except BrokenProcessPool:
                self._replace(pool)

    def _replace(self, broken: Executor) -> None:
        """Begin new processes, unless another thread has."""
        with self._lock:
            if self._pool is broken:
                broken.shutdown(wait=False)
                self._pool = self._new_pool(self._workers)

    def _alone(self, item: Item) -> Seen:
        with self._new_pool(1) as pool:
            try:
                return pool.submit(_read_in_worker, item).result()
            except BrokenProcessPool:
                return ImageError("The process that decoded the image was killed. The image may need too much memory.")

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        # Not forked: OpenVINO and torch have threads
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(max(1, workers), context, _begin_worker, self._arguments)


_worker: dict[str, Any] = {}


def _begin_worker(image_processor: Any, limits: ImageLimits) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["arguments"] = (image_processor, limits)


def _end_with_parent() -> None:
    """End this process when the job was killed. It would wait for images forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read_in_worker(item: Item) -> Seen:
    return read_image(item, *_worker["arguments"])
