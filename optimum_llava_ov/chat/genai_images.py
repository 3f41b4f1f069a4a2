"""Give GenAI images whose tiles are those of the original.

GenAI computes the tiles of an image in float32, where the original has float64. For 12 of 10,000 sizes it
resizes the image to a side that is one pixel longer or shorter. For a few of these it takes another grid, or counts
other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, product

import numpy as np
from PIL import Image

from optimum_llava_ov.models.anyres import Tiling, resized_size, select_best_resolution


_NEAR = 4  # pixels
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def fit_to_genai(image: Image.Image, tiling: Tiling) -> Image.Image:
    """Return an image for which GenAI makes the original's tiles.

    This is the image itself for most sizes. For the others it is resized as inside its tiles, so that GenAI need not
    resize it again: then grid, tiles and number of rows are the original's, but the base, the squashed image, is
    resampled twice. Where that is not enough, because the number of rows depends on the last bit, it is resized to the
    nearest size with the original's grid and rows.
    """
    expected = original_geometry(image.size, tiling)
    candidates = chain([image.size, expected[1]], _near(image.size))
    size = next((size for size in candidates if genai_geometry(size, tiling) == expected), image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _near(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Return sizes that differ by a few pixels, the nearest first."""
    steps = sorted(product(range(-_NEAR, _NEAR + 1), repeat=2), key=lambda step: abs(step[0]) + abs(step[1]))
    for x, y in steps:
        if min(size[0] + x, size[1] + y) > 0:
            yield size[0] + x, size[1] + y


def original_geometry(size: tuple[int, int], tiling: Tiling) -> Geometry:
    """Return the resolution, width and height of the image in it, and the padding in patches, as the original."""
    resolution = select_best_resolution(size, tiling.pinpoints)
    return resolution, resized_size(size, resolution), tiling.padding(size)


def genai_geometry(size: tuple[int, int], tiling: Tiling) -> Geometry:
    """Return the same as GenAI 2026.4 computes it.

    See `select_best_resolution` and `resize_and_pad_image` in its `clip.cpp`, `unpad_image` in its
    `llava_next/classes.cpp`.
    """
    width, height = (np.float32(side) for side in size)
    keys = []
    for best_width, best_height in tiling.pinpoints:
        scale = min(np.float32(best_width) / width, np.float32(best_height) / height)
        effective = min(int(width * scale) * int(height * scale), size[0] * size[1])
        keys.append((effective, effective - best_width * best_height))
    resolution = best_width, best_height = tiling.pinpoints[keys.index(max(keys))]

    scale_width, scale_height = np.float32(best_width) / width, np.float32(best_height) / height
    if scale_width < scale_height:
        resized = best_width, min(math.ceil(height * scale_width), best_height)
    else:
        resized = min(math.ceil(width * scale_height), best_width), best_height

    columns, rows = (np.float32(side // tiling.tile_size * tiling.patches_per_side) for side in resolution)
    if width / height > columns / rows:
        padding = 0, (int(rows) - int(height * (columns / width))) // 2
    else:
        padding = (int(columns) - int(width * (rows / height))) // 2, 0
    return resolution, resized, padding
