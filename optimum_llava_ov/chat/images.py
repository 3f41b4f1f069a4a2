"""Fetch images from the web, compare them, and write them as text for JSON."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Collection
from urllib.parse import urlsplit

from PIL import Image

from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits, open_image
from optimum_llava_ov.units import readable_size


MAX_REDIRECTS = 5


def fetch_image(
    url: str,
    max_bytes: int = DEFAULT_LIMITS.max_bytes,
    max_pixels: int = DEFAULT_LIMITS.max_pixels,
    hosts: Collection[str] | None = None,
    timeout: float = 20.0,
) -> Image.Image:
    """Fetch an image from the web. Read up to `max_bytes`.

    Args:
        hosts: The allowed hosts, as `name` or `name:port`. They also apply to redirects. Default: all hosts.
        timeout: Maximum time in seconds, redirects included.

    Raises:
        `ValueError`: The image cannot be fetched, takes too long, is too large or compressed, or is not an image.
    """
    return open_image(fetch_bytes(url, max_bytes, hosts, timeout), ImageLimits(max_bytes, max_pixels))


def fetch_bytes(url: str, max_bytes: int, hosts: Collection[str] | None = None, timeout: float = 20.0) -> bytes:
    """Fetch a file from the web. See [`fetch_image`].

    Raises:
        `ValueError`: The file cannot be fetched, takes too long, or is too large or compressed.
    """
    import httpx

    try:
        return asyncio.run(asyncio.wait_for(_fetch(url, max_bytes, hosts), timeout))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The image {url} cannot be fetched: {error}") from error
    except asyncio.TimeoutError as error:
        raise ValueError(
            f"The image {url} cannot be fetched: it did not arrive within {timeout:g} seconds."
        ) from error


async def _fetch(url: str, max_bytes: int, hosts: Collection[str] | None) -> bytes:
    """Return the body of a response as it was sent. Asynchronous, so that a slow server can be abandoned at any time.

    Nothing is decompressed: images are already compressed, and a small response could become gigabytes. Of a redirect,
    only the headers are read.
    """
    import httpx

    async with httpx.AsyncClient(headers={"Accept-Encoding": "identity"}, timeout=None) as client:
        request = client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            if hosts is not None and not {request.url.host, request.url.netloc.decode()} & set(hosts):
                allowed = ", ".join(sorted(hosts))
                raise ValueError(f"Images from {request.url.host!r} are not allowed. Allowed hosts: {allowed}.")
            response = await client.send(request, stream=True)
            try:
                if response.next_request is not None:
                    request = response.next_request
                    continue
                response.raise_for_status()
                if (coding := response.headers.get("content-encoding", "identity").lower()) != "identity":
                    raise ValueError(
                        f"The image {url} is sent with content-encoding {coding}. Expected a file without it."
                    )
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > max_bytes:
                        raise ValueError(f"The image {url} is larger than {readable_size(max_bytes)}.")
                return bytes(data)
            finally:
                await response.aclose()
    raise ValueError(f"The image {url} cannot be fetched: it is redirected more than {MAX_REDIRECTS} times.")


def is_url(text: str) -> bool:
    return urlsplit(text).scheme in ("http", "https")


def digest(image: Image.Image) -> str:
    """Return a hash of an image's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def to_base64(image: Image.Image) -> str:
    """Return an image as a PNG in base64, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
