"""Protect the page: check who sends a request and how large it is, and tell the browser what it may load."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from optimum_llava_ov.system.addresses import host_of, is_address


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_FILE = 4096  # bytes that the smallest file takes on most disks
MAX_BODY = 16_000_000  # bytes of a request; uploads have another limit
# The page consists of inline scripts and styles, so these must be allowed. Everything else must come from this server.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; "
    "font-src 'self' data:; "
    "connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; "
    "object-src 'none'; "
    "frame-src 'none'; "
    "base-uri 'self'; "
    "form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class OpenPages:
    """Track the pages that are open in browsers. Each open page keeps one request, its heartbeat, open."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, page: object) -> bool:
        return self._open[page] > 0 if isinstance(page, str) else False

    @contextmanager
    def opened(self, page: str) -> Iterator[None]:
        with self._lock:
            self._open[page] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= Counter((page,))


class Uploads:
    """Limit the growth of the folder with the uploads. It shrinks again when the server deletes old files.

    Args:
        limit: bytes on the disk, beyond those that are there now.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self._before = _size(folder)
        self._coming = 0  # of requests that are not complete; used in the event loop only

    def free(self) -> int:
        """Bytes that may still come."""
        return self.limit + self._before - _size(self.folder)

    @asynccontextmanager
    async def coming(self, size: int) -> AsyncIterator[bool]:
        """Receive a request of that size in it. False if there is no room for it."""
        self._coming += size
        try:
            yield self._coming <= await asyncio.to_thread(self.free)
        finally:
            self._coming -= size


class Guard:
    """Refuse requests from other sites, as an ASGI middleware.

    A request is refused if its host is not this server, or if it comes from a page of another site. This stops sites
    that point their own name at this address (DNS rebinding). An IP address cannot be pointed elsewhere, so it is
    accepted as a host.

    Args:
        names: Names of this server, without port. IP addresses and `localhost` are always accepted.
        pages: Receives the pages that are opened and closed.
        uploads: Limits the folder of the uploads.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        names: tuple[str, ...],
        pages: OpenPages,
        uploads: Uploads,
    ):
        self.app = app
        self.names = {*LOCAL_NAMES, *(name.lower().strip("[]") for name in names)}
        self.pages = pages
        self.uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(headers)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        if refusal is None and is_upload:
            await self._upload(headers, scope, receive, send_with_headers)
            return
        if refusal is None:
            receive, refusal = await _read(headers, receive)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        folder, _, page = scope["path"].rstrip("/").rpartition("/")
        if folder.endswith("/heartbeat"):
            with self.pages.opened(page):
                await self.app(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    async def _upload(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        length = headers.get("content-length", "")
        if not length.isdecimal():
            await _sentence("An upload must say its length (Content-Length).", 411)(scope, receive, send)
            return
        async with self.uploads.coming(int(length)) as is_room:
            full = _sentence(
                "The server has no room for more uploads. Try again in an hour, when it deletes old ones.", 507
            )
            await (self.app if is_room else full)(scope, receive, send)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        host = host_of(f"//{headers.get('host', '')}")
        if host is None or not (host in self.names or is_address(host)):
            return _sentence(
                f"This server does not accept the name {host!r}. Open the page by its IP address, or ask the operator "
                "to add the name with --allow-name.",
                421,
            )
        origin = headers.get("origin")
        if origin is not None and (name := host_of(origin)) != host and name not in self.names:
            return _sentence(f"Pages of {origin} may not use this server. Only its own pages may.", 403)
        return None


async def _read(headers: Headers, receive: Receive) -> tuple[Receive, PlainTextResponse | None]:
    """Read a request's body if it is not too large. Return a function that receives it again, or a refusal."""
    too_large = _sentence(f"The request is larger than the limit of {MAX_BODY:,} bytes.", 413)
    if int(length if (length := headers.get("content-length", "")).isdecimal() else 0) > MAX_BODY:
        return receive, too_large
    if length in ("", "0") and "transfer-encoding" not in headers:
        return receive, None
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY:
            return receive, too_large
        more = message.get("more_body", False)  # missing if the client has disconnected
    pending = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def receive_again() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return receive_again, None


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk. Empty files and folders take some, too."""
    return sum(_bytes_on_disk(entry) for entry in folder.rglob("*"))


def _bytes_on_disk(entry: Path) -> int:
    try:
        return max(entry.lstat().st_size, MIN_FILE)
    except OSError:  # deleted meanwhile
        return 0


def _sentence(text: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(text + "\n", status_code=status)
