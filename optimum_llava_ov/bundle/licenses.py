"""Read the license of a model from its card."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from optimum_llava_ov.bundle.terms import known_license
from optimum_llava_ov.checkpoint.repository import Repository


logger = logging.getLogger(__name__)

CARD = "README.md"
UNKNOWN_LICENSE = "unknown"  # as the Hub calls it

FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n?---[ \t]*(?:\n|$)(.*)", re.DOTALL)
_LICENSE = re.compile(r"""^license:[ \t]*["']?([\w.+-]{1,100})["']?[ \t]*$""", re.MULTILINE)


def check_license(license_id: str) -> None:
    """Check that a license is written as the Hub writes it.

    Raises:
        `ValueError`: it is a name or a sentence, and not an id.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,98}", license_id):
        raise ValueError(
            f"The license is {license_id!r}. Expected an id of the Hub in lower case, such as apache-2.0, "
            "cc-by-nc-4.0, llama2, or other: https://huggingface.co/docs/hub/repositories-licenses lists them."
        )


def repository_license(repository: Repository) -> str:
    """Return the license of a repository: from its card, else what is known about it; "unknown" if nothing is.

    The card is searched, not parsed, because an error elsewhere in it must not stop an export.
    """
    readme = repository.get(CARD)
    match = _LICENSE.search(_metadata_lines(readme)) if readme else None
    return (match and match[1]) or known_license(repository.name) or UNKNOWN_LICENSE


def _metadata_lines(readme: Path) -> str:
    """Return the text between the first two lines of `---`; empty if the file has none or cannot be read."""
    try:
        with readme.open(encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError as error:
        logger.warning("%s cannot be read, so the license is unknown. (%s)", readme, error)
        return ""
    match = FRONT_MATTER.match(text)
    return match[1] if match else ""
