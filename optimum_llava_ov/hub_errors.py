"""What the errors of the Hub's client mean, for who reads from the Hub and for who publishes there."""

from __future__ import annotations

import os
import re

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from optimum_llava_ov.errors import HubError


# A token of the Hub; shorter names that begin so, such as `hf_hub_download`, are not
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def clean_token(token: str | bool | None) -> str | bool | None:
    """A token without the white space that a file or a copied line has around it.

    Raises:
        [`HubError`]: it has characters that cannot be in a token. Does not show it.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError(
            "The token has white space or special characters inside, so it is not a token of the Hub. Copy it again."
        )
    return token or None


def redacted(text: str, *tokens: str | bool | None) -> str:
    """`text` with each token replaced by `hf_***`: those given, that of HF_TOKEN, and all that look like one."""
    for token in (*tokens, os.environ.get("HF_TOKEN")):
        if (
            isinstance(token, str) and len(token.strip()) >= 4
        ):  # a shorter one is a placeholder, and its letters are everywhere
            text = text.replace(token.strip(), "hf_***")
    return _TOKEN.sub("hf_***", text)


def root_cause(error: BaseException) -> BaseException:
    """The answer of the Hub or the failure of the connection that a client's error was made of."""
    while not isinstance(error, (HfHubHTTPError, httpx.TransportError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_unreachable(error: BaseException) -> bool:
    """Whether there was no connection: the name does not resolve, nobody listens, no answer in time, a proxy that fails."""
    return isinstance(error, (httpx.ConnectError, httpx.TimeoutException, httpx.ProxyError))


def unreachable(error: BaseException, endpoint: str | None = None) -> str:
    """Sentence about a connection that failed."""
    reason = str(error) or type(error).__name__
    return (
        f"The Hub ({endpoint or constants.ENDPOINT}) cannot be reached: {reason}. Check the connection, and HF_ENDPOINT and the proxy "
        "if they are set."
    )


def status_meaning(error: HfHubHTTPError, asked: str) -> str:
    """Sentence about an answer of the Hub that says no, to who reads or publishes.

    Args:
        asked: what was asked for, such as `config.json of 'owner/name'`.
    """
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if status in (401, 403):
        return f"The Hub did not give {asked}. Log in with `hf auth login`, or set HF_TOKEN to a valid token. (HTTP {status}: {said})"
    if status == 404:
        return f"The Hub ({constants.ENDPOINT}) does not know {asked} (HTTP 404). Check the name, and HF_ENDPOINT if it is set. ({said})"
    if status == 429:
        return (
            f"The Hub asks for patience: too many requests (HTTP 429). Wait a few minutes, then run it again. ({said})"
        )
    if status >= 500:
        return f"The Hub has a problem of its own (HTTP {status}). Run it again later. ({said})"
    return f"The Hub refused {asked} (HTTP {status}): {said}."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
