"""Find the repositories that a checkpoint names: its vision tower and its base model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from optimum_llava_ov.checkpoint.options import shown
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import HubError, InvalidCheckpointError


def find_related(
    repository: Repository,
    name: str,
    what: str,
    advice: str,
    chosen: bool = False,
    revision: str | None = None,
    needed: str = "config.json",
) -> Repository:
    """Return the repository with this name.

    A folder is preferred to a model id. A path relative to the checkpoint is preferred to a path relative to the
    working directory, so that a checkpoint can be copied elsewhere together with what it names. A checkpoint on the
    Hub can only name a model id: it must not choose folders of this machine.

    Args:
        repository: repository of the checkpoint.
        name: absolute path, path relative to the checkpoint, or model id.
        what: what is looked for, and where its name is from; the subject of the error's sentence.
        advice: how to choose another one; the end of the error.
        chosen: whether the user has chosen it, not the checkpoint.
        revision: revision of a model id.
        needed: a file that a model id must have.

    Raises:
        [`InvalidCheckpointError`]: it is not found.
    """
    candidates = [Path(name)] if chosen or repository.is_local else []
    if repository.is_local:
        candidates.insert(0, repository.folder / name)
    for folder in candidates:
        if os.path.isdir(folder):  # noqa: PTH112  unlike Path.is_dir, it never raises
            return Repository(os.path.normpath(folder))

    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_id:
        tried = [shown(str(folder)) for folder in candidates]
        not_there = f"{tried[0]} is not a folder" if len(tried) == 1 else f"neither {' nor '.join(tried)} is a folder"
        reason = not_there if tried else f"{repository.name!r} is on the Hub, so it must name a model id"
        raise InvalidCheckpointError(f"{what} was not found: {reason}. {advice}")

    related = replace(repository, name=name, subfolder="", revision=revision, on_hub=True)
    try:
        related.require(needed, "it is read first")
    except (HubError, InvalidCheckpointError) as error:
        raise InvalidCheckpointError(f"{what} was not found: {error} {advice}") from error
    return related
