"""Translate errors of the Hub's client into sentences, for downloads and for uploads."""

from __future__ import annotations

import os
import re

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from optimum_llava_ov.errors import HubError


# A token of the Hub. Shorter names with this prefix, such as `hf_hub_download`, are not tokens.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def clean_token(token: str | bool | None) -> str | bool | None:
    """Strip the white space around a token that was read from a file or copied.

    Raises:
        [`HubError`]: the token has characters that no token has. The message does not show it.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError(
            "The token contains white space or special characters, so it is not a token of the Hub. Copy it again."
        )
    return token or None


def redacted(text: str, *tokens: str | bool | None) -> str:
    """Replace each token in `text` by `hf_***`: the given tokens, that of HF_TOKEN, and all that look like one."""
    for token in (*tokens, os.environ.get("HF_TOKEN")):
        # A shorter token is a placeholder, whose letters also occur in other words
        if isinstance(token, str) and len(token.strip()) >= 4:
            text = text.replace(token.strip(), "hf_***")
    return _TOKEN.sub("hf_***", text)


def root_cause(error: BaseException) -> BaseException:
    """Return the HTTP or connection error that caused an error of the client; the error itself if there is none."""
    while not isinstance(error, (HfHubHTTPError, httpx.TransportError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_unreachable(error: BaseException) -> bool:
    """Return whether the connection failed: name not resolved, connection refused, timeout, or proxy error."""
    return isinstance(error, (httpx.ConnectError, httpx.TimeoutException, httpx.ProxyError))


def unreachable(error: BaseException, endpoint: str | None = None) -> str:
    """Return a sentence about a failed connection."""
    reason = str(error) or type(error).__name__
    return (
        f"The Hub ({endpoint or constants.ENDPOINT}) cannot be reached: {reason}. "
        "Check the connection, and HF_ENDPOINT and the proxy if they are set."
    )


def status_meaning(error: HfHubHTTPError, asked: str) -> str:
    """Return a sentence about an HTTP error of the Hub.

    Args:
        asked: what was requested, such as `config.json of 'owner/name'`.
    """
    status, reason = error.response.status_code, error.server_message or _first_line(error)
    if status in (401, 403):
        return (
            f"The Hub denied access to {asked}. Log in with `hf auth login`, or set HF_TOKEN to a valid token. "
            f"(HTTP {status}: {reason})"
        )
    if status == 404:
        return (
            f"The Hub ({constants.ENDPOINT}) does not know {asked} (HTTP 404). "
            f"Check the name, and HF_ENDPOINT if it is set. ({reason})"
        )
    if status == 429:
        return f"The Hub received too many requests (HTTP 429). Wait a few minutes, then run it again. ({reason})"
    if status >= 500:
        return f"The Hub has an internal problem (HTTP {status}). Run it again later. ({reason})"
    return f"The Hub refused {asked} (HTTP {status}): {reason}."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
