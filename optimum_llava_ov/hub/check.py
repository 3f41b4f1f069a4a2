"""Check before publishing that a folder is a bundle that others can use."""

from __future__ import annotations

import logging
from pathlib import Path

from optimum_llava_ov.bundle.card import CARD, UNKNOWN_LICENSE, license_of, missing_metadata, read_card
from optimum_llava_ov.bundle.check import check_loads
from optimum_llava_ov.bundle.layout import check_bundle
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.errors import BundleError


logger = logging.getLogger(__name__)


def check_publishable(folder: Path, license_id: str | None = None) -> None:
    """Check that a bundle can be published.

    Args:
        license_id: License that replaces the one of the card.

    Raises:
        [`BundleError`]: Files are missing or do not load, or the card lacks metadata.
    """
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not a folder. Expected the folder of a bundle that `optimum-cli export openvino` wrote."
        )
    complete_replacement(folder)
    check_bundle(folder)
    check_loads(folder, tokenizers=True)
    card = read_card(folder / CARD) or ""
    if missing := missing_metadata(card):
        raise BundleError(
            f"The card {folder / CARD} lacks {', '.join(missing)}. Add it to the metadata between the two `---` at "
            "the top, or delete the card and export again."
        )
    if (license_id or license_of(card)) == UNKNOWN_LICENSE:
        logger.warning(
            "The card says `license: %s`. Find out the license of the model, and give it with --license.",
            UNKNOWN_LICENSE,
        )
