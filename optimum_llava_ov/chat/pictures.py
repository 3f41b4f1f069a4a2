"""Pictures from the web, and as text for JSON."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Collection
from urllib.parse import urlsplit

from PIL import Image

from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits, open_image


MAX_REDIRECTS = 5


def fetch_picture(
    url: str,
    max_bytes: int = DEFAULT_LIMITS.max_bytes,
    max_pixels: int = DEFAULT_LIMITS.max_pixels,
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
        raise ValueError(
            f"The picture {url} cannot be fetched: it did not come within {timeout:g} seconds."
        ) from error
    return open_image(data, ImageLimits(max_bytes, max_pixels))


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
