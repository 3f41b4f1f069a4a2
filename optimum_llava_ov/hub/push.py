"""Publish a complete bundle in one commit. Nothing else is published, and nothing is uploaded twice."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from optimum_llava_ov.bundle.card import CARD, add_tags, card_text, is_untouched, license_of, read_card, with_metadata
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES
from optimum_llava_ov.bundle.licenses import check_license
from optimum_llava_ov.hub.check import check_publishable
from optimum_llava_ov.hub.explain import explained
from optimum_llava_ov.hub_errors import clean_token
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_size


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushPlan:
    """List what a push would publish.

    Attributes:
        repo_id (`str`): Repository, with its owner if that was given.
        files (`dict[str, int]`): Size of each file in bytes, by name.
    """

    repo_id: str
    files: dict[str, int]

    def __str__(self) -> str:
        sizes = {**self.files, "total": sum(self.files.values())}
        lines = table_lines([(name, readable_size(size)) for name, size in sizes.items()], "<>")
        return "\n".join([*lines, f"to {self.repo_id}"])


def plan_push(
    bundle: str | Path, repo_id: str, license_id: str | None = None, base_model: str | None = None
) -> PushPlan:
    """Check everything that can be checked without the Hub.

    Args:
        license_id, base_model: As for [`push_bundle`].

    Raises:
        [`BundleError`]: The bundle is incomplete, does not load, or its card lacks metadata.
        [`HubError`]: `repo_id` or `base_model` is not a valid name.
        `ValueError`: `license_id` is not an id of a license.
    """
    bundle = Path(bundle)
    for name in filter(None, (repo_id, base_model)):
        with explained(HfApi(), name):
            validate_repo_id(name)
    if license_id is not None:
        check_license(license_id)
    check_publishable(bundle, license_id)
    names = [name for name in (*FILES, *EXTRA_FILES) if (bundle / name).is_file()]
    return PushPlan(repo_id, {name: (bundle / name).stat().st_size for name in names})


def push_bundle(
    bundle: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    license_id: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Publish a bundle in one commit. Files that the repository already has are not uploaded again.

    The snippets of the card get the repository's name. A card that was edited on the Hub is updated, not replaced,
    unless the bundle's own card was edited too.

    Args:
        repo_id: `owner/name`, or `name` for a repository of your own. Created if it does not exist.
        private: Whether a newly created repository is private. Default: the owner's setting.
        revision: Branch to push to. Created if it does not exist. Default: `main`.
        create_pr: Propose the bundle as a pull request, which does not need write permission.
        tags: Additional tags for the card.
        license_id: License in the card, as the Hub calls it. Default: that of the card.
        base_model: Model id in the card of the model that the bundle was made from. Default: that of the card. It is
            missing if the checkpoint was a local folder.

    Returns:
        `CommitInfo`: A string with the address of the commit. `.pr_url` is the address of the pull request.

    Raises:
        [`BundleError`]: See [`plan_push`].
        [`HubError`]: The Hub refused, or could not be reached. Nothing was published. A second try uploads only the
            remaining files.
    """
    bundle, plan = Path(bundle), plan_push(bundle, repo_id, license_id, base_model)
    metadata = {"license": license_id, "base_model": base_model}
    api = HfApi(token=clean_token(token), library_name="optimum-llava-ov")
    with explained(api, repo_id), ExitStack() as files:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        published = set(api.list_repo_files(repo_id, revision=revision))
        card = _card(api, bundle, repo_id, revision, CARD in published, metadata)
        operations = [CommitOperationAdd(CARD, add_tags(card, tags).encode())]
        streamed = _client_has_xet() and not _server_has_xet(api, repo_id, revision, create_pr)
        # Small files first, so that they are uploaded if the connection is lost
        for name in sorted(plan.files.keys() - {CARD}, key=lambda name: plan.files[name]):
            # The client uploads streams with git-LFS, and paths with Xet even if the server does not support it
            content = files.enter_context((bundle / name).open("rb")) if streamed else bundle / name
            operations.append(CommitOperationAdd(name, content))
        # Files that describe an earlier version and not this one
        operations += [
            CommitOperationDelete(name) for name in EXTRA_FILES if name in published and name not in plan.files
        ]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload LLaVA for OpenVINO",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _card(
    api: HfApi, bundle: Path, repo_id: str, revision: str | None, is_published: bool, metadata: dict[str, str | None]
) -> str:
    card = read_card(bundle / CARD) or ""
    if is_published and is_untouched(bundle, card):
        try:
            published = read_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
        except EntryNotFoundError:
            published = None
        if published:
            return card_text(bundle, license_of(card), with_metadata(published, **metadata), repo_id)
    return card_text(bundle, None, with_metadata(card, **metadata), repo_id)


def _client_has_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _server_has_xet(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> bool:
    """Return whether the server supports Xet storage. huggingface.co does; mirrors and private servers may not."""
    revision = quote(revision or constants.DEFAULT_REVISION, safe="")
    response = get_session().get(
        f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{revision}",
        headers=build_hf_headers(token=api.token),
        params={"create_pr": "1"} if create_pr else None,
    )
    return response.status_code != 404
