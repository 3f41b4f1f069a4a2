"""Read and decode images ahead, in other processes."""

from __future__ import annotations

import itertools
import multiprocessing
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


def decode_ahead(
    items: Iterable[Item], image_processor: Any, limits: ImageLimits, workers: int, ahead: int
) -> Iterator[tuple[Item, Seen]]:
    """Read images in the order of `items`, some before they are needed.

    A process that is killed costs the image that it decoded, not the job.

    Args:
        workers: Number of processes. 0: images are read in this process.
        ahead: Number of images that are read before they are needed.
    """
    if not workers:
        for item in items:
            yield item, read_image(item, image_processor, limits)
        return
    remaining = iter(items)
    pending: deque[tuple[Item, Future[Seen]]] = deque()
    pool = _new_pool(workers, image_processor, limits)
    try:
        while True:
            for item in itertools.islice(remaining, ahead - len(pending)):
                pending.append((item, pool.submit(_read_in_worker, item)))
            if not pending:
                return
            item, future = pending.popleft()
            try:
                seen: Seen = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False)
                with _new_pool(1, image_processor, limits) as single:
                    seen = _alone(single, item)
                pool = _new_pool(workers, image_processor, limits)
                pending = deque((other, pool.submit(_read_in_worker, other)) for other, _ in pending)
            yield item, seen
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _alone(pool: Executor, item: Item) -> Seen:
    try:
        return pool.submit(_read_in_worker, item).result()
    except BrokenProcessPool:
        return ImageError("The process that decoded the image was killed. The image may need too much memory.")


_worker: dict[str, Any] = {}


def _new_pool(workers: int, image_processor: Any, limits: ImageLimits) -> ProcessPoolExecutor:
    # Not forked: OpenVINO and torch have threads
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin_worker, (settings_of(image_processor), limits))


def _begin_worker(image_processor: Any, limits: ImageLimits) -> None:
    _worker["arguments"] = (image_processor, limits)


def _read_in_worker(item: Item) -> Seen:
    return read_image(item, *_worker["arguments"])
