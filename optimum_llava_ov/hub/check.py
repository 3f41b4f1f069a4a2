"""Whether a folder is a bundle that strangers can use: looked at before anything is published."""

from __future__ import annotations

import logging
from pathlib import Path

from optimum_llava_ov.bundle.card import CARD, UNKNOWN_LICENSE, license_of, missing_metadata, read_card
from optimum_llava_ov.bundle.check import check_loads
from optimum_llava_ov.bundle.layout import check_bundle
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.errors import BundleError


logger = logging.getLogger(__name__)


def check_publishable(folder: Path) -> None:
    """
    Raises:
        [`BundleError`]: files are missing or do not load, or the card lacks metadata; says which.
    """
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is no folder. Expected one with a bundle, as `optimum-cli export openvino` writes it."
        )
    complete_replacement(folder)
    check_bundle(folder)
    check_loads(folder, tokenizers=True)
    card = read_card(folder / CARD)
    if missing := missing_metadata(card):
        raise BundleError(
            f"The card {folder / CARD} lacks {', '.join(missing)}. Add it to the metadata between the two `---` at its top, or delete the "
            "card and export again."
        )
    if license_of(card) == UNKNOWN_LICENSE:
        logger.warning("The card says `license: %s`. Find out which it is, and write it there.", UNKNOWN_LICENSE)
