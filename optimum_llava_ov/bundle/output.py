"""Which folder a bundle may be written into."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES
from optimum_llava_ov.errors import BundleError


# Optimum's, of devices that cache what they compile
MODEL_CACHE = "model_cache"
OURS = ".optimum-llava-ov"  # the folder for what an export keeps in the output while it works
# May be in a folder that is empty otherwise: of a new repository, and what file systems put there themselves
_OF_EMPTY_FOLDERS = (".git", ".gitattributes", ".gitignore", ".DS_Store", "lost+found")


def check_output(output: Path) -> None:
    """Check that a bundle may be written to `output`: a folder that does not exist yet, is empty, or is a bundle of this package.

    Hidden files of the user's may be in a bundle, and those of git in an empty folder. They stay.

    Raises:
        [`BundleError`]: it may not, or cannot; says why.
    """
    try:
        exists = output.exists()
    except OSError as error:  # such as a name that is too long
        raise BundleError(f"{output} cannot be a folder: {error.strerror}. Choose another name.") from error
    if exists and not output.is_dir():
        raise BundleError(f"{output} is a file, expected a folder to write the bundle into. Choose another name.")
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    if not place.is_dir():
        raise BundleError(f"{output} cannot be made, because {place} is a file. Choose another name.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BundleError(f"{place} is not writable. Choose another folder, or change its permissions.")
    foreign = sorted(entry.name for entry in _foreign_entries(output)) if exists else []
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise BundleError(
            f"{output} holds something else than a bundle ({shown}); it was left as it is. Only an empty folder, or a bundle that this "
            "package has written, can be replaced. Choose another folder, or move these away."
        )


def _foreign_entries(output: Path) -> list[Path]:
    is_bundle = _is_bundle_of_ours(output)
    return [
        entry for entry in output.iterdir() if not (_may_be_in_a_bundle(entry) if is_bundle else _may_be_beside(entry))
    ]


def _may_be_in_a_bundle(entry: Path) -> bool:
    if entry.name in (*FILES, *EXTRA_FILES):
        return not entry.is_dir()
    return entry.name.startswith(".") or entry.name in (MODEL_CACHE, *_OF_EMPTY_FOLDERS)


def _may_be_beside(entry: Path) -> bool:
    return entry.name in (OURS, *_OF_EMPTY_FOLDERS)


def _is_bundle_of_ours(folder: Path) -> bool:
    """Whether this package wrote `folder`, by what its configuration says."""
    return "optimum_llava_ov_version" in _section(
        folder / "config.json", "converted_from"
    ) or "optimum-llava-ov" in _section(folder / "openvino_config.json", "versions")


def _section(file: Path, name: str) -> dict[str, Any]:
    """A section of a JSON file; empty if there is no such section or file."""
    try:
        section = json.loads(file.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return section if isinstance(section, dict) else {}
