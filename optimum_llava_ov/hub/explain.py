"""Explain the Hub's errors to a user who publishes a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from optimum_llava_ov.errors import HubError, HubUnreachableError
from optimum_llava_ov.hub_errors import is_unreachable, redacted, root_cause, status_meaning, unreachable


_AGAIN = "Nothing was published. Run it again: files that were uploaded are not uploaded twice."


@contextmanager
def explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn exceptions into a [`HubError`] that says what to do and does not show a token."""
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        message = f"{repo_id!r} is not a valid name for a repository. Expected `owner/name`. ({error})"
        raise HubError(message) from error
    except LocalTokenNotFoundError as error:
        raise HubError(_not_logged_in(repo_id)) from error
    except OfflineModeIsEnabled as error:
        raise HubError("Nothing can be published while HF_HUB_OFFLINE is set. Remove this variable.") from error
    except (HfHubHTTPError, httpx.TransportError, RuntimeError, ValueError, OSError) as error:
        cause = root_cause(error)
        if isinstance(cause, HfHubHTTPError):
            raise HubError(redacted(_meaning(cause, api, repo_id), api.token)) from error
        if is_unreachable(cause):
            raise HubUnreachableError(redacted(f"{unreachable(cause, api.endpoint)} {_AGAIN}", api.token)) from error
        message = f"Publishing {repo_id} failed: {cause} ({type(cause).__name__}, {api.endpoint}). {_AGAIN}"
        raise HubError(redacted(message, api.token)) from error


def _meaning(error: HfHubHTTPError, api: HfApi, repo_id: str) -> str:
    status, message = error.response.status_code, error.server_message or str(error)
    if status == 401:
        return _not_logged_in(repo_id)
    if status == 403:
        return _forbidden(api, repo_id, message)
    if status == 404:
        return f"{repo_id} or this revision of it does not exist, or the token may not see it. ({message})"
    if status in (409, 412):
        return f"Someone else is changing {repo_id} now. Look at the changes, then run it again. ({message})"
    return f"{status_meaning(error, repo_id)} {_AGAIN}"


def _not_logged_in(repo_id: str) -> str:
    return (
        f"You are not logged in to the Hub, so {repo_id} cannot be published. Log in with `hf auth login`, or give a "
        "valid token with write permission in HF_TOKEN or --token (https://huggingface.co/settings/tokens)."
    )


def _forbidden(api: HfApi, repo_id: str, message: str) -> str:
    try:
        user = api.whoami()
    except (httpx.HTTPError, LocalTokenNotFoundError):
        return _not_logged_in(repo_id)
    name, owner = user["name"], repo_id.split("/")[0]
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return (
            f"The token of {name!r} may only read. Use a token with write permission: "
            f"https://huggingface.co/settings/tokens. ({message})"
        )
    if owner not in (name, *(organization["name"] for organization in user.get("orgs", []))):
        return (
            f"{repo_id} belongs to {owner!r}, and you are {name!r}. Push to `{name}/{repo_id.split('/')[-1]}`. If the "
            f"repository exists, you can also propose a pull request (--create-pr, create_pr=True). ({message})"
        )
    return f"{name!r} may not write to {repo_id}. Does the token have write permission for it? ({message})"
