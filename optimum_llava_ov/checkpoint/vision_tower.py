"""Where the vision tower of a checkpoint is: LLaVA keeps it in a repository of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import HubError, InvalidCheckpointError


_OVERRIDE = (
    'Say where it is: `--model-kwargs \'{"vision_tower": "<folder or model id>"}\'` on the command line, '
    '`model_kwargs={"vision_tower": ...}` in `main_export`, `vision_tower=` in `from_pretrained`.'
)


def find_vision_tower(repository: Repository, vision_tower: str | None) -> Repository:
    """Repository of the vision tower.

    A folder wins over a model id, and a path relative to the checkpoint over one relative to the working directory: the
    former is what a checkpoint that was copied elsewhere means.

    Args:
        repository: the checkpoint's.
        vision_tower: absolute path, path relative to the checkpoint, or model id.
    """
    if not vision_tower:
        raise InvalidCheckpointError(f"config.json of {repository.name!r} names no vision tower (mm_vision_tower). {_OVERRIDE}")

    candidates = [Path(vision_tower)]
    if repository.is_local:
        candidates.insert(0, repository.folder / vision_tower)
    for folder in candidates:
        if folder.is_dir():
            return Repository(os.path.normpath(folder))

    looks_like_id = vision_tower.count("/") == 1 and not vision_tower.startswith((".", "/", "~"))
    if not looks_like_id:
        tried = " and ".join(str(folder) for folder in candidates)
        raise InvalidCheckpointError(f"The vision tower {vision_tower!r} was not found: {tried} is no folder. {_OVERRIDE}")

    tower = replace(repository, name=vision_tower, subfolder="", revision=None)
    try:
        tower.require("config.json", "it is the vision tower's configuration")
    except (HubError, InvalidCheckpointError) as error:
        raise InvalidCheckpointError(f"The vision tower {vision_tower!r} was not found: {error} {_OVERRIDE}") from error
    return tower
