"""Publishing a bundle: all of it in one commit, nothing else, and nothing twice."""

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

from optimum_llava_ov.bundle.card import CARD, add_tags, card_text, is_untouched, license_of, read_card
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES
from optimum_llava_ov.hub.check import check_publishable
from optimum_llava_ov.hub.explain import explained
from optimum_llava_ov.hub_errors import clean_token


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushPlan:
    """What a push would publish.

    Attributes:
        repo_id (`str`): where; with its owner if that was given.
        files (`dict[str, int]`): name and size of each file.
    """

    repo_id: str
    files: dict[str, int]

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"{name:<{width}}  {size / 1e6:>12,.3f} MB" for name, size in self.files.items()]
        return "\n".join(
            [*lines, f"{'together':<{width}}  {sum(self.files.values()) / 1e6:>12,.3f} MB", f"to {self.repo_id}"]
        )


def plan_push(bundle: str | Path, repo_id: str) -> PushPlan:
    """Check everything that can be checked without the Hub.

    Raises:
        [`BundleError`]: the bundle is not whole, does not load, or its card lacks metadata.
        [`HubError`]: `repo_id` is not a valid name.
    """
    bundle = Path(bundle)
    with explained(HfApi(), repo_id):
        validate_repo_id(repo_id)
    check_publishable(bundle)
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
) -> CommitInfo:
    """Publish a bundle in one commit. What the repository has already is not uploaded again.

    The card's snippets get the repository's name. A card on the Hub that somebody has edited there is brought up to date, not replaced,
    unless the bundle's own card was edited, too.

    Args:
        repo_id: `owner/name`; just `name` is yours. Created if it does not exist.
        private: whether a repository that is created is private; the owner's default if not given.
        revision: branch, created if it does not exist; `main` if not given.
        create_pr: propose the bundle as a pull request, which needs no write permission.
        tags: more tags for the card.

    Returns:
        `CommitInfo`: a string, the commit's address; `.pr_url` is that of the pull request.

    Raises:
        [`BundleError`]: see [`plan_push`].
        [`HubError`]: the Hub refused, or could not be reached. Nothing is published then; a second try uploads only the rest.
    """
    bundle, plan = Path(bundle), plan_push(bundle, repo_id)
    api = HfApi(token=clean_token(token), library_name="optimum-llava-ov")
    with explained(api, repo_id), ExitStack() as files:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        card = _card(api, bundle, repo_id, revision, CARD in there)
        operations = [CommitOperationAdd(CARD, add_tags(card, tags).encode())]
        streamed = _client_has_xet() and not _server_has_xet(api, repo_id, revision, create_pr)
        # What is small first: it has arrived then if the connection is lost
        for name in sorted(plan.files.keys() - {CARD}, key=plan.files.get):
            # The client sends streams as git-LFS does, and paths by Xet, whether the server has that or not
            content = files.enter_context(open(bundle / name, "rb")) if streamed else bundle / name
            operations.append(CommitOperationAdd(name, content))
        # Of an earlier version, and not true of this one
        operations += [CommitOperationDelete(name) for name in EXTRA_FILES if name in there and name not in plan.files]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload LLaVA-MPT for OpenVINO",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _card(api: HfApi, bundle: Path, repo_id: str, revision: str | None, is_there: bool) -> str:
    card = read_card(bundle / CARD)
    if is_there and is_untouched(bundle, card):
        try:
            published = read_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
        except EntryNotFoundError:
            published = None
        if published:
            return card_text(bundle, license_of(card), published, repo_id)
    return card_text(bundle, None, card, repo_id)


def _client_has_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _server_has_xet(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> bool:
    """huggingface.co has Xet storage; mirrors and servers of companies may not."""
    revision = quote(revision or constants.DEFAULT_REVISION, safe="")
    response = get_session().get(
        f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{revision}",
        headers=build_hf_headers(token=api.token),
        params={"create_pr": "1"} if create_pr else None,
    )
    return response.status_code != 404
