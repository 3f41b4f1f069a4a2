"""Whether a folder is a bundle that strangers can use: looked at before anything is published."""

from __future__ import annotations

import logging
from pathlib import Path

import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers

from optimum_llava_ov.bundle.card import CARD, UNKNOWN_LICENSE, license_of, missing_metadata, read_card
from optimum_llava_ov.bundle.layout import PARTS, TOKENIZERS, check_bundle
from optimum_llava_ov.bundle.reading import load_processor, read_graphs, read_settings
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.errors import BundleError


logger = logging.getLogger(__name__)


def check_publishable(folder: Path) -> None:
    """
    Raises:
        [`BundleError`]: files are missing or do not load, or the card lacks metadata; says which.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder. Expected one with a bundle, as `optimum-cli export openvino` writes it.")
    complete_replacement(folder)
    check_bundle(folder)
    _check_settings(folder)
    read_graphs(folder, (*PARTS.values(), *TOKENIZERS))
    card = read_card(folder / CARD)
    if missing := missing_metadata(card):
        raise BundleError(
            f"The card {folder / CARD} lacks {', '.join(missing)}. Add it to the metadata between the two `---` at its top, or delete the "
            "card and export again."
        )
    if license_of(card) == UNKNOWN_LICENSE:
        logger.warning("The card says `license: %s`. Find out which it is, and write it there.", UNKNOWN_LICENSE)


def _check_settings(folder: Path) -> None:
    config = read_settings(folder)
    load_processor(folder)
    text_model_type = config["text_config"].get("model_type")
    if (config.get("model_type"), text_model_type) != ("llava", "mpt"):
        raise BundleError(f"{folder} is a {config.get('model_type')!r} model, not a LLaVA-MPT bundle.")
