"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits


@dataclass(frozen=True)
class Settings:
    """Limit what requests may use.

    Attributes:
        max_running (`int`): Number of answers that one model computes at the same time.
        max_queue (`int`): Number of requests for one model that may wait. The next one gets status 429.
        max_tokens (`int`): Maximum length of an answer, in tokens.
        timeout (`float`): Maximum time of a request with its answer, in seconds.
        body_timeout (`float`): Maximum time in which a client must send a request, in seconds.
        max_body_bytes (`int`): Maximum size of a request.
        max_bodies_bytes (`int`): Maximum size of all requests that are being received or wait. The next one gets
            status 429.
        images (`ImageLimits`): Limits of an image, and of the number of images in a request.
        hosts (`tuple[str, ...]`): Hosts from which the server fetches images for clients.
        image_cache_bytes (`int`): Size of the cache of prepared images.
        keys (`tuple[str, ...]`): API keys. Without a key, everyone who reaches the server may use it.
        names (`tuple[str, ...]`): Host names of the server. IP addresses and `localhost` are always accepted. With API
            keys, all names are.
    """

    max_running: int = 16
    max_queue: int = 64
    max_tokens: int = 1024
    timeout: float = 600.0
    body_timeout: float = 30.0
    max_body_bytes: int = 32_000_000
    max_bodies_bytes: int = 256_000_000
    images: ImageLimits = DEFAULT_LIMITS
    hosts: tuple[str, ...] = ()
    image_cache_bytes: int = 256_000_000
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
