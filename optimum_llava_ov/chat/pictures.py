"""Pictures from outside: opened within limits of bytes and pixels, and as text for JSON."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError


MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # width times height; a small file can unpack to gigabytes
MAX_REDIRECTS = 5


def open_picture(picture: Any, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Args:
        picture: a `PIL.Image`, a path, or the bytes of a file.

    Returns:
        The picture in RGB, turned as its EXIF orientation says, in memory.

    Raises:
        `ValueError`: it is no picture, or is larger than `max_bytes` or `max_pixels`.
    """
    if isinstance(picture, Image.Image):
        return _rgb(picture, "The picture", max_pixels)
    name = "The picture" if isinstance(picture, bytes) else f"The picture {picture}"
    try:
        size = len(picture) if isinstance(picture, bytes) else Path(picture).stat().st_size
        if size > max_bytes:
            raise ValueError(f"{name} has {size / 1e6:.1f} MB, and at most {max_bytes / 1e6:g} MB are accepted.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                return _rgb(image, name, max_pixels)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def fetch_picture(
    url: str,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    hosts: Collection[str] | None = None,
    timeout: float = 20.0,
) -> Image.Image:
    """Fetch a picture from the web, reading no more than `max_bytes`.

    Args:
        hosts: the only ones that may be asked, redirects included, as `name` or `name:port`. Default: any.
        timeout: seconds that all of it may take, redirects included.

    Raises:
        `ValueError`: it cannot be fetched, takes too long, is too large or compressed, or is no picture.
    """
    import httpx

    try:
        data = asyncio.run(asyncio.wait_for(_fetch(url, max_bytes, hosts), timeout))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The picture {url} cannot be fetched: {error}") from error
    except asyncio.TimeoutError as error:
        raise ValueError(f"The picture {url} cannot be fetched: it did not come within {timeout:g} seconds.") from error
    return open_picture(data, max_bytes, max_pixels)


async def _fetch(url: str, max_bytes: int, hosts: Collection[str] | None) -> bytes:
    """The body of a response as it was sent. Asynchronous, because only so can a server that sends slowly be left at any time.

    Nothing is decompressed: pictures are compressed already, and a decoder could make gigabytes of little. Of a redirect only
    the head is read.
    """
    import httpx

    async with httpx.AsyncClient(headers={"Accept-Encoding": "identity"}, timeout=None) as client:
        request = client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            if hosts is not None and not {request.url.host, request.url.netloc.decode()} & set(hosts):
                allowed = ", ".join(sorted(hosts))
                raise ValueError(f"Pictures from {request.url.host!r} are not fetched here, only from: {allowed}.")
            response = await client.send(request, stream=True)
            try:
                if response.next_request is not None:
                    request = response.next_request
                    continue
                response.raise_for_status()
                if (coding := response.headers.get("content-encoding", "identity").lower()) != "identity":
                    raise ValueError(
                        f"The picture {url} is sent compressed ({coding}); only one that is sent as it is can be read."
                    )
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > max_bytes:
                        raise ValueError(f"The picture {url} has more than {max_bytes / 1e6:g} MB.")
                return bytes(data)
            finally:
                await response.aclose()
    raise ValueError(f"The picture {url} cannot be fetched: it is redirected more than {MAX_REDIRECTS} times.")


def is_url(text: str) -> bool:
    return urlsplit(text).scheme in ("http", "https")


def digest(picture: Image.Image) -> str:
    """The same for two pictures of equal size and pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def to_base64(picture: Image.Image) -> str:
    """As a PNG, which loses nothing."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def from_base64(text: str) -> Image.Image:
    """
    Raises:
        `ValueError`: it is no picture.
    """
    return open_picture(base64.b64decode(text))


def _rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    from PIL import ImageOps

    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels, and at most {max_pixels / 1e6:g} million are accepted. "
            "Make it smaller; the model itself sees a few hundred pixels a side."
        )
    return ImageOps.exif_transpose(image).convert("RGB")
