"""Read `preprocessor_config.json`, and check that its images fit the vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_llava_ov.checkpoint.options import (
    Rule,
    broken_rules,
    either,
    flag,
    integer,
    number,
    numbers,
    positive,
    read_json,
)
from optimum_llava_ov.errors import UnsupportedCheckpointError


MAX_SIDE = 2048  # pixels; published towers use up to 448

_SIDE = integer(1, MAX_SIDE)
_SQUARE = ("height", "width")


def _sizes(*forms: tuple[str, ...]) -> Rule:
    """Make a rule for objects that have exactly the keys of one of `forms`, with numbers of pixels as values."""
    return Rule(
        lambda value: isinstance(value, dict)
        and tuple(sorted(value)) in forms
        and all(map(_SIDE.accepts, value.values())),
        " or ".join("{" + ", ".join(form) + "}" for form in forms),
    )


_OPTIONS = {
    "do_convert_rgb": flag(),
    "do_resize": flag(),
    "size": either(_SIDE, _sizes(("shortest_edge",), _SQUARE)),
    "resample": integer(0, 5),
    "do_center_crop": flag(),
    "crop_size": either(_SIDE, _sizes(_SQUARE)),
    "do_rescale": flag(),
    "rescale_factor": positive(1000),
    "do_normalize": flag(),
    "image_mean": numbers(3, number(-1000, 1000)),
    "image_std": numbers(3, positive(1000)),
}
_DEFAULT_SIDE = 224  # pixels; CLIP's default for absent sizes


def read_image_processor(file: Path, image_size: int, pads: bool) -> dict[str, Any]:
    """Read the known options of an image processor, with sizes in the format of transformers 5.

    Args:
        file: path of `preprocessor_config.json`.
        image_size: height and width of the tower's images, in pixels.
        pads: whether images are padded to squares first (`image_aspect_ratio: pad`).

    Raises:
        [`InvalidCheckpointError`]: the file is not a JSON object.
        [`UnsupportedCheckpointError`]: an option has an invalid value, or the processed images do not fit the tower.
    """
    values = read_json(file)
    settings = {name: values[name] for name in _OPTIONS if values.get(name) is not None}
    if problems := broken_options(settings):
        raise UnsupportedCheckpointError(f"{file} has invalid options: {'; '.join(problems)}.")
    for name in ("size", "crop_size"):  # CLIP's own repositories still use plain numbers
        if isinstance(side := settings.get(name), int):
            settings[name] = {"shortest_edge": side} if name == "size" else {"height": side, "width": side}
    output = _output_size(settings, pads)
    if output != (image_size, image_size):
        found = "of any size" if output is None else f"of {output[1]} x {output[0]} pixels"
        raise UnsupportedCheckpointError(
            f"{file} makes images {found} (do_resize, size, do_center_crop, crop_size), but the vision tower expects "
            f"{image_size} x {image_size} (image_size). Take both files from the same repository."
        )
    return settings


def broken_options(settings: dict[str, Any]) -> list[str]:
    """A phrase for each option of an image processor that has no meaning. Options that are absent or not known are
    left out.
    """
    return broken_rules(settings, {name: rule for name, rule in _OPTIONS.items() if settings.get(name) is not None})


def _output_size(settings: dict[str, Any], pads: bool) -> tuple[int, int] | None:
    """Return height and width of the processed images, in pixels; `None` if they depend on the image."""
    if settings.get("do_center_crop", True):
        size = settings.get("crop_size", {"height": _DEFAULT_SIDE, "width": _DEFAULT_SIDE})
    elif settings.get("do_resize", True):
        size = settings.get("size", {"shortest_edge": _DEFAULT_SIDE})
    else:
        return None
    if "shortest_edge" in size:
        return (size["shortest_edge"],) * 2 if pads else None
    return size["height"], size["width"]
