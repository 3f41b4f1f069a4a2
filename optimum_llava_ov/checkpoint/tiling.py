"""Check the options of `image_aspect_ratio: anyres`, with which an image is cut into tiles (LLaVA-1.6)."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from optimum_llava_ov.checkpoint.options import Rule, broken_rules, integer, numbers, one_of, shown


ANYRES = "anyres"
MAX_PINPOINTS = 64
MAX_SIDE_OF_GRID = 32_768  # pixels
MAX_TILES = 64  # of one image; the released models have up to 4

_SIDES = numbers(2, integer(1, MAX_SIDE_OF_GRID))


def read_pinpoints(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Return widths and heights of the resolutions in pixels, in their order.

    Args:
        value: `image_grid_pinpoints`: a list, or a string with the list, which the original evaluates as a literal.

    Returns:
        `None` if `value` is something else.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_PINPOINTS:
        return None
    pairs = [list(pair) if isinstance(pair, tuple) else pair for pair in value]
    return tuple((pair[0], pair[1]) for pair in pairs) if all(map(_SIDES.accepts, pairs)) else None


TILING_OPTIONS = {
    "mm_patch_merge_type": one_of(None, "flat", "spatial", "spatial_unpad"),
    "image_grid_pinpoints": Rule(
        lambda value: read_pinpoints(value) is not None,
        f"a list of 1 to {MAX_PINPOINTS} resolutions [width, height] in pixels",
    ),
}


def tiling_problems(values: Mapping[str, Any]) -> list[str]:
    """Describe each option of a `config.json` with which the tiles of an image cannot be computed as in the original.

    Without `image_aspect_ratio: anyres` the original does not read these options.
    """
    if values.get("image_aspect_ratio") != ANYRES:
        return []
    if values.get("image_grid_pinpoints") is None:
        return [f"image_aspect_ratio={ANYRES!r} without image_grid_pinpoints"]
    problems = broken_rules(values, TILING_OPTIONS)
    if values.get("mm_use_im_start_end"):
        problems.append("mm_use_im_start_end=True together with image_aspect_ratio='anyres'")
    if values.get("mm_vision_select_feature") == "cls_patch" and values.get("mm_patch_merge_type") not in (
        None,
        "flat",
    ):
        problems.append("mm_vision_select_feature='cls_patch' together with a spatial mm_patch_merge_type")
    return problems


def grid_problems(pinpoints: Any, tile_size: int) -> list[str]:
    """Describe each resolution that cannot be cut into tiles of `tile_size` x `tile_size` pixels.

    Args:
        pinpoints: a valid `image_grid_pinpoints`.
    """
    return [
        f"image_grid_pinpoints has {shown([width, height])}, which is not a grid of up to {MAX_TILES} tiles of "
        f"{tile_size} x {tile_size} pixels"
        for width, height in read_pinpoints(pinpoints) or ()
        if width % tile_size or height % tile_size or width * height > MAX_TILES * tile_size**2
    ]


def processor_problems(settings: Mapping[str, Any], tile_size: int) -> list[str]:
    """Describe each size in an image processor's options with which a tile or the base would not fit the tower.

    The original cuts tiles of `crop_size`, and squashes the whole image to a square of `size`.
    """
    expected = {"shortest_edge": tile_size, "height": tile_size, "width": tile_size}
    return [
        f"{name}={shown(settings.get(name))} (expected {tile_size} pixels, as image_size of the vision tower)"
        for name in ("size", "crop_size")
        if not (sides := settings.get(name) or {}) or any(expected[side] != sides[side] for side in sides)
    ]
