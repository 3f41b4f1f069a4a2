"""Whether a folder is a bundle that strangers can use: looked at before anything is published."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import openvino
import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers
from transformers import AutoConfig, AutoProcessor

from optimum_llava_ov.bundle.card import CARD, UNKNOWN_LICENSE, license_of, missing_metadata, read_card
from optimum_llava_ov.bundle.layout import PARTS, TOKENIZERS, check_bundle
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
    _check_graphs(folder)
    card = read_card(folder / CARD)
    if missing := missing_metadata(card):
        raise BundleError(
            f"The card {folder / CARD} lacks {', '.join(missing)}. Add it to the metadata between the two `---` at its top, or delete the "
            "card and export again."
        )
    if license_of(card) == UNKNOWN_LICENSE:
        logger.warning("The card says `license: %s`. Find out which it is, and write it there.", UNKNOWN_LICENSE)


def _check_settings(folder: Path) -> None:
    try:
        for file in folder.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder)
        AutoProcessor.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise BundleError(f"The settings in {folder} do not load: {error} Export it again.") from error
    if config.model_type != "llava" or config.text_config.model_type != "mpt":
        raise BundleError(f"{folder} is a {config.model_type!r} model, not a LLaVA-MPT bundle.")


def _check_graphs(folder: Path) -> None:
    core = openvino.Core()
    for name in (*PARTS.values(), *TOKENIZERS):
        try:
            core.read_model(folder / name)  # maps the weights, and checks that they are all there
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BundleError(f"{folder / name} does not load ({reason}). Export it again, or download it again.") from error
