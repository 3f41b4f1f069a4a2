"""Check that a bundle may be written into a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES
from optimum_llava_ov.errors import BundleError


# Optimum's folder for compiled models of devices that cache them
MODEL_CACHE = "model_cache"
OURS = ".optimum-llava-ov"  # folder of temporary files in the output during an export
# Files of new repositories and of file systems. A folder with only these counts as empty.
_OF_EMPTY_FOLDERS = (".git", ".gitattributes", ".gitignore", ".DS_Store", "lost+found")


def check_output(output: Path) -> None:
    """Check that `output` does not exist yet, is an empty folder, or is a bundle of this package.

    A bundle may contain hidden files of the user, and an empty folder may contain files of git. They stay.

    Raises:
        [`BundleError`]: `output` is something else, or cannot be written; says why.
    """
    try:
        exists = output.exists()
    except OSError as error:  # for example, the name is too long
        raise BundleError(f"{output} cannot be a folder: {error.strerror}. Choose another name.") from error
    if exists and not output.is_dir():
        raise BundleError(f"{output} is a file, expected a folder for the bundle. Choose another name.")
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    if not place.is_dir():
        raise BundleError(f"{output} cannot be created, because {place} is a file. Choose another name.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BundleError(f"{place} is not writable. Choose another folder, or change its permissions.")
    foreign = sorted(entry.name for entry in _foreign_entries(output)) if exists else []
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise BundleError(
            f"{output} contains files that are not part of a bundle ({shown}). It was not changed. Only an empty "
            "folder or a bundle of this package can be replaced. Choose another folder, or move these files away."
        )


def _foreign_entries(output: Path) -> list[Path]:
    is_bundle = _is_bundle_of_ours(output)
    return [
        entry
        for entry in output.iterdir()
        if not (_may_be_in_a_bundle(entry) if is_bundle else _counts_as_empty(entry))
    ]


def _may_be_in_a_bundle(entry: Path) -> bool:
    if entry.name in (*FILES, *EXTRA_FILES):
        return not entry.is_dir()
    return entry.name.startswith(".") or entry.name in (MODEL_CACHE, *_OF_EMPTY_FOLDERS)


def _counts_as_empty(entry: Path) -> bool:
    return entry.name in (OURS, *_OF_EMPTY_FOLDERS)


def _is_bundle_of_ours(folder: Path) -> bool:
    """Return whether this package wrote the bundle in `folder`, according to its settings."""
    return "optimum_llava_ov_version" in _section(
        folder / "config.json", "converted_from"
    ) or "optimum-llava-ov" in _section(folder / "openvino_config.json", "versions")


def _section(file: Path, name: str) -> dict[str, Any]:
    """Return a section of a JSON file; empty if the section or the file does not exist."""
    try:
        section = json.loads(file.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return section if isinstance(section, dict) else {}
