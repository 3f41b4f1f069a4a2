"""Prepare the images of requests, each content once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import openvino
from PIL import Image

from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.chat.images import fetch_bytes, is_url
from optimum_llava_ov.errors import ImageError
from optimum_llava_ov.images import ImageLimits, see_image


@dataclass(frozen=True)
class PreparedImage:
    """Hold an image as the model takes it.

    Attributes:
        image (`Image.Image`): In RGB, of the size that the model sees.
        tensor (`openvino.Tensor`): `(1, height, width, 3)` uint8, for GenAI.
    """

    image: Image.Image
    tensor: openvino.Tensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.get_byte_size() + 3 * self.image.width * self.image.height


class ImageCache:
    """Prepare images, and keep those that were used last.

    Args:
        processor: Processor of the bundle.
        max_bytes: Maximum size of all images that are kept.

    Attributes:
        hits (`int`), misses (`int`): How many images were found in the cache, and how many were prepared.
    """

    def __init__(self, processor: Any, limits: ImageLimits, max_bytes: int):
        self.hits = 0
        self.misses = 0
        self._processor = processor
        self._limits = limits
        self._max_bytes = max_bytes
        self._images: OrderedDict[bytes, PreparedImage] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def prepare(self, data: bytes) -> PreparedImage:
        """Prepare an image.

        Args:
            data: The bytes of a file.

        Raises:
            [`ImageError`]: It is not an image of a supported format, or exceeds the limits.
        """
        key = hashlib.sha256(data).digest()
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                self.hits += 1
                return self._images[key]
            self.misses += 1
        image = see_image(data, self._processor.image_processor, self._limits)
        prepared = PreparedImage(image, image_tensor(image, self._processor))
        with self._lock:
            if key not in self._images:
                self._images[key] = prepared
                self._size += prepared.num_bytes
            while self._size > self._max_bytes:
                _, oldest = self._images.popitem(last=False)
                self._size -= oldest.num_bytes
        return prepared


def read_source(url: str, limits: ImageLimits, hosts: tuple[str, ...]) -> bytes:
    """Return the bytes of an image.

    Args:
        url: A data URL, or an address on one of the hosts.

    Raises:
        `ValueError`: It cannot be read, or its host is not allowed.
    """
    if url.startswith("data:"):
        return _decode(url, limits)
    if not is_url(url):
        raise ImageError("An image is given as a data URL (data:image/png;base64,...) or as an http(s) address.")
    if not hosts:
        raise ImageError(
            "This server does not fetch images. Send the image in a data URL (data:image/png;base64,...)."
        )
    return fetch_bytes(url, limits.max_bytes, hosts)


def _decode(url: str, limits: ImageLimits) -> bytes:
    head, comma, content = url.partition(",")
    if not comma:
        raise ImageError("A data URL has no comma. Expected data:image/png;base64,...")
    if len(content) > 4 * limits.max_bytes:
        raise ImageError(f"The image is larger than {limits.max_bytes / 1e6:g} MB.")
    if not head.endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The base64 of an image cannot be decoded: {error}.") from error
