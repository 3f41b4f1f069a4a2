"""What every request passes first: its name in the logs, who sends it, and how large it is.

These are plain ASGI applications, because Starlette's base class for middleware hides that a client went away.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optimum_llava_ov.serving.errors import ApiError, try_again
from optimum_llava_ov.serving.metrics import Metrics
from optimum_llava_ov.serving.settings import Settings
from optimum_llava_ov.system.addresses import host_of, is_address


logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
LOCAL_NAMES = ("localhost",)
_NAME = re.compile(r"[\w.-]{1,64}")
_API = "/v1/"
_DISCARDED = 8  # times the limit of a body: what is read of a body that is too large
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class RequestLog:
    """Give each request an id, count it, and log it without its contents.

    An error that nothing else has answered becomes status 500.

    Args:
        metrics: Counts requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        number = given if _NAME.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["log"] = log = {"request_id": number}
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = number
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("A request failed.", extra={"fields": log})
            if not status:
                failure = ApiError(f"The server failed. Its log has the reason under {number}.", status=500)
                await failure.response()(scope, receive, send_with_id)
        finally:
            path = scope["path"]
            known = next((name for name in _PATHS if path.startswith(name)), "other")
            self.metrics.requests.labels(known, str(status or 499)).inc()
            fields = {
                **log,
                "method": scope["method"],
                "path": path,
                "status": status or 499,  # the client went away before an answer
                "seconds": round(time.monotonic() - began, 4),
            }
            logger.info("request", extra={"fields": fields})


class Gate:
    """Refuse requests without a key, and requests of web pages that point their own name at this server.

    Args:
        settings: Has the keys and names.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.keys = [_digest(key) for key in settings.keys]
        self.names = {*LOCAL_NAMES, *(name.lower() for name in settings.names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self.keys:
            host = host_of(f"//{headers.get('host', '')}")
            if host is None or not (host in self.names or is_address(host)):
                return ApiError(
                    f"This server does not accept the name {host!r}. Use its IP address, or ask the operator to add "
                    "the name with --allow-name.",
                    status=421,
                )
            return None
        if not scope["path"].startswith(_API):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All keys are compared, so that the time does not tell which one is similar
        matches = [hmac.compare_digest(given, expected) for expected in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            return ApiError(
                "The API key is missing or wrong. Send it as: Authorization: Bearer <key>",
                status=401,
                code="invalid_api_key",
            )
        return None


class Bodies:
    """Receive the bodies of requests within limits of size and time.

    Args:
        settings: Has the limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.settings = settings
        self._size = 0  # of all bodies that are being received or wait; used in the event loop only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            refusal = await asyncio.wait_for(
                self._read(Headers(scope=scope), receive, body), self.settings.body_timeout
            )
        except asyncio.TimeoutError:
            refusal = ApiError(
                f"The request did not arrive within {self.settings.body_timeout:g} seconds.", status=408
            )
        try:
            if refusal is None:
                await self.app(scope, _Replay(bytes(body), receive), send)
            else:
                response = refusal.response()
                response.headers["connection"] = "close"  # the rest of the body is not read
                await response(scope, receive, send)
        finally:
            self._size -= len(body)

    async def _read(self, headers: Headers, receive: Receive, body: bytearray) -> ApiError | None:
        limit = self.settings.max_body_bytes
        too_large = ApiError(f"The request is larger than {limit / 1e6:g} MB.", status=413)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            await _discard(receive, _DISCARDED * limit)
            return too_large
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return ApiError("The client went away.", status=400)
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > limit:
                # Nothing comes after the last message: to wait for more would only end at the timeout
                if message.get("more_body", False):
                    await _discard(receive, _DISCARDED * limit)
                return too_large
            if self._size + len(chunk) > self.settings.max_bodies_bytes:
                return try_again("The server receives too many large requests. Try again later.", status=429)
            body += chunk
            self._size += len(chunk)
            if not message.get("more_body", False):
                return None


async def _discard(receive: Receive, limit: int) -> None:
    """Read the rest of a body, up to a limit. Most clients read an answer only after they have sent all."""
    while limit > 0:
        message = await receive()
        limit -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


class _Replay:
    """Give a body that was received to the application, and then what comes after it."""

    def __init__(self, body: bytes, receive: Receive):
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class JsonLines(logging.Formatter):
    """Write a line of JSON for each record of the log. `extra={"fields": ...}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
