"""The tiles of LLaVA-1.6: grid, rows and pixels are those of the original code for every size of an image."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from conftest import Golden
from safetensors.torch import load_file

from optimum_llava_ov.models.anyres import Tiling, resized_size, select_best_resolution


GOLDEN = Golden("llava16_mistral_anyres")
IMAGES = sorted(path.stem for path in (GOLDEN.folder / "images").iterdir())
CONFIG = json.loads((GOLDEN.checkpoint / "config.json").read_text())
TINY = Tiling(tuple(map(tuple, CONFIG["image_grid_pinpoints"])), tile_size=56, patches_per_side=4)
RELEASED = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), tile_size=336, patches_per_side=24)


def rows_step_by_step(tiling: Tiling, width: int, height: int) -> tuple[tuple[int, int], int]:
    """The algorithm as it is described, one step after the other: grid of tiles, and number of rows."""
    best, most, least = None, 0, math.inf
    for grid_width, grid_height in tiling.pinpoints:
        scale = min(grid_width / width, grid_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (grid_width, grid_height), shown, wasted
    columns, rows = best[0] // tiling.tile_size, best[1] // tiling.tile_size
    across, down = columns * tiling.patches_per_side, rows * tiling.patches_per_side
    if width / height > across / down:
        kept = int(height * (across / width))
        margin = (down - kept) // 2
        down = len(range(down)[margin : down - margin])
    else:
        kept = int(width * (down / height))
        margin = (across - kept) // 2
        across = len(range(across)[margin : across - margin])
    return (columns, rows), tiling.patches_per_side**2 + down * (across + 1)


def sizes(number: int, largest: int, seed: int = 0) -> list[tuple[int, int]]:
    """Random widths and heights, half of them small, a tenth of them very wide or tall."""
    draw = random.Random(seed)
    result = []
    for index in range(number):
        width, height = (draw.randint(1, largest if index % 2 else largest // 8) for _ in range(2))
        result.append((width, max(1, height // 40)) if index % 20 == 0 else (width, height))
    return [size[::-1] if index % 3 == 0 else size for index, size in enumerate(result)]


@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_the_golden_images(name):
    """Two of them are decided by the last bit: `unpad_float` (376 x 94) and `best_res_float` (142 x 285)."""
    image = GOLDEN.image(name)
    assert TINY.num_tiles(image.size) == len(GOLDEN.arrays[f"pixel_values/{name}"])
    assert TINY.num_image_tokens(image.size) == GOLDEN.arrays[f"image_features/{name}"].shape[1]


def test_features_are_packed_as_by_the_original():
    tensors = {}
    for file in sorted(GOLDEN.checkpoint.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    projector = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    prefix = "model.mm_projector."
    projector.load_state_dict({name.removeprefix(prefix): tensors[name] for name in tensors if prefix in name})
    for name in IMAGES:
        with torch.no_grad():
            features = projector(torch.from_numpy(GOLDEN.arrays[f"vision_features/{name}"]))
        packed = TINY.pack(features, GOLDEN.image(name).size, tensors["model.image_newline"])
        expected = GOLDEN.arrays[f"image_features/{name}"][0]
        torch.testing.assert_close(packed, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_rows_of_100_000_sizes():
    """Against the algorithm step by step, for the resolutions of the released models and of the golden one."""
    for tiling, number, largest in ((RELEASED, 100_000, 4000), (TINY, 10_000, 600)):
        for width, height in sizes(number, largest):
            grid, rows = rows_step_by_step(tiling, width, height)
            assert (tiling.grid((width, height)), tiling.num_image_tokens((width, height))) == (grid, rows)


def test_packed_features_have_the_number_of_rows_that_is_announced():
    for merge_type in ("spatial_unpad", "spatial", "flat"):
        tiling = Tiling(TINY.pinpoints, 56, 4, merge_type)
        for size in sizes(300, 600):
            features = torch.zeros(tiling.num_tiles(size), 16, 1)
            assert len(tiling.pack(features, size, torch.zeros(1))) == tiling.num_image_tokens(size)


def test_order_of_the_patches():
    """Two tiles of 2 x 2 patches beside each other. Patches are numbered as they lie in the image."""
    base = [100, 101, 102, 103]
    left, right = [0, 1, 4, 5], [2, 3, 6, 7]
    features = torch.tensor([base, left, right], dtype=torch.float32).unsqueeze(-1)
    pinpoints = ((56, 112), (112, 56))
    newline = torch.tensor([-1.0])
    packed = {
        merge_type: Tiling(pinpoints, 56, 2, merge_type).pack(features, (112, 56), newline).flatten().tolist()
        for merge_type in ("spatial_unpad", "spatial", "flat")
    }
    assert packed == {
        "spatial_unpad": [*base, 0, 1, 2, 3, -1, 4, 5, 6, 7, -1],
        "spatial": [*base, 0, 1, 2, 3, 4, 5, 6, 7],
        "flat": [*base, *left, *right],
    }
    # 400 x 100 fills one of the two rows of patches: half a row of padding above and below is not left out.
    # 800 x 100 does not fill a row: only the base is left.
    assert Tiling(pinpoints, 56, 2).padding((400, 100)) == (0, 0)
    assert Tiling(pinpoints, 56, 2).padding((800, 100)) == (0, 1)
    assert Tiling(pinpoints, 56, 2).pack(features, (800, 100), newline).flatten().tolist() == base


def test_wrong_number_of_tiles_is_named():
    with pytest.raises(ValueError, match="An image of 112 x 56 pixels has 3 tiles, but 2 were given"):
        TINY.pack(torch.zeros(2, 16, 1), (112, 56), torch.zeros(1))


def test_the_first_of_equal_resolutions_wins():
    """An image not larger than a tile fits whole into all resolutions of two tiles, and wastes the same in each."""
    assert select_best_resolution((50, 40), TINY.pinpoints) == (56, 112)
    assert select_best_resolution((50, 40), TINY.pinpoints[1:]) == (112, 56)


def test_size_inside_a_resolution():
    assert resized_size((300, 200), (112, 112)) == (112, 75)
    assert resized_size((64, 480), (56, 168)) == (23, 168)
    assert resized_size((1000, 1), (112, 56)) == (112, 1)
