"""Describe a bundle in a few words, for the first line of a chat and the last line of a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimum_llava_ov.bundle.card import license_of, read_card
from optimum_llava_ov.bundle.check import read_graph
from optimum_llava_ov.bundle.layout import PARTS
from optimum_llava_ov.bundle.licenses import CARD, UNKNOWN_LICENSE
from optimum_llava_ov.bundle.precision import precision_of, weight_shares
from optimum_llava_ov.errors import BundleError


@dataclass(frozen=True)
class Description:
    """Describe a bundle.

    Attributes:
        precision (`str`): Precision of the language model's weights, such as "int4".
        license (`str`): License in its card, or "unknown".
    """

    precision: str
    license: str


def describe_bundle(folder: Path) -> Description:
    """Read the precision and the license of a bundle.

    Raises:
        [`BundleError`]: The language model cannot be read.
    """
    try:
        license_id = license_of(read_card(folder / CARD) or "")
    except BundleError:  # the card is not needed to run a bundle
        license_id = None
    shares = weight_shares(read_graph(folder / PARTS["language_model"]))
    return Description(precision_of(shares), license_id or UNKNOWN_LICENSE)
