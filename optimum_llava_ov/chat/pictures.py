"""Pictures from the web, and as text for JSON."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Collection
from urllib.parse import urlsplit

from PIL import Image

from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits, open_image


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

    Raises:
        `ValueError`: it cannot be fetched, is too large, or is no picture.
    """
    import httpx

    def check(request: httpx.Request) -> None:
        if hosts is not None and not {request.url.host, request.url.netloc.decode()} & set(hosts):
            raise ValueError(f"Pictures from {request.url.host!r} are not fetched here, only from: {', '.join(sorted(hosts))}.")

    try:
        with (
            httpx.Client(event_hooks={"request": [check]}, follow_redirects=True, timeout=timeout) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(f"The picture {url} has more than {max_bytes / 1e6:g} MB.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The picture {url} cannot be fetched: {error}") from error
    return open_image(data, ImageLimits(max_bytes, max_pixels))


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
