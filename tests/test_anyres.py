"""The tiles of LLaVA-1.6: grid, rows and pixels are those of the original code for every size of an image."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import Golden
from PIL import Image
from safetensors.torch import load_file

from optimum_llava_ov.bundle.tiling import build_tiling_processor
from optimum_llava_ov.checkpoint.image_processor import read_image_processor
from optimum_llava_ov.checkpoint.tiling import grid_problems, processor_problems, read_pinpoints, tiling_problems
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


@pytest.fixture(scope="module")
def image_processor():
    settings = read_image_processor(GOLDEN.folder / "clip" / "preprocessor_config.json", 56, pads=False)
    return build_tiling_processor(settings, TINY)


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiles_step_by_step(image: Image.Image, tiling: Tiling, resize=Image.Image.resize) -> np.ndarray:
    """The base, and the tiles row by row: `(tiles, 3, side, side)` uint8."""
    side, (columns, rows) = tiling.tile_size, rows_step_by_step(tiling, *image.size)[0]
    across, down = columns * side, rows * side
    scale_x, scale_y = across / image.width, down / image.height
    if scale_x < scale_y:
        resized = resize(image, (across, min(math.ceil(image.height * scale_x), down)))
    else:
        resized = resize(image, (min(math.ceil(image.width * scale_y), across), down))
    black = Image.new("RGB", (across, down))
    black.paste(resized, ((across - resized.width) // 2, (down - resized.height) // 2))
    corners = [(x, y) for y in range(0, down, side) for x in range(0, across, side)]
    tiles = [resize(image, (side, side)), *(black.crop((x, y, x + side, y + side)) for x, y in corners)]
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


def resize_tall_by_rows_first(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize as Pillow 13 does, with any Pillow. Before, columns always came first, and were rounded to 8 bits in between."""
    if image.height <= image.width:
        return image.resize(size)
    return image.transpose(Image.Transpose.TRANSPOSE).resize(size[::-1]).transpose(Image.Transpose.TRANSPOSE)


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_of_the_golden_images(image_processor, name):
    """The golden outputs were computed with Pillow 13. An earlier one gives tall images up to four grey levels more or less."""
    image, golden = GOLDEN.image(name), GOLDEN.arrays[f"pixel_values/{name}"]
    mean, std = (np.array(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std))
    grey = np.rint((golden * std + mean) * 255)
    np.testing.assert_array_equal(tiles_step_by_step(image, TINY, resize_tall_by_rows_first), grey)

    inputs = image_processor(image, return_tensors="np")
    assert inputs["image_sizes"].tolist() == [[image.height, image.width]]
    if image.height <= image.width:
        np.testing.assert_allclose(inputs["pixel_values"][0], golden, atol=1e-6, rtol=0)


def test_pixels_of_random_sizes(image_processor):
    """Half of the sizes are below the tile's, where all resolutions of two tiles are equally good and their order decides."""
    for size in [*sizes(150, 400), *sizes(150, 60, seed=1)]:
        image = noise(size)
        tiles = image_processor(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(tiles, tiles_step_by_step(image, TINY))


def test_resolutions_are_read_from_a_list_or_its_text():
    expected = ((336, 672), (672, 336))
    assert read_pinpoints([[336, 672], [672, 336]]) == expected
    assert read_pinpoints("[(336, 672), (672, 336)]") == expected
    for value in ("(1x1),...,(6x6)", "[[336]]", [], [[336, 0]], [[336.0, 672]], [[336, 672, 1]], "[" * 9999, 7, None):
        assert read_pinpoints(value) is None


def test_what_the_tiles_cannot_be_is_named():
    anyres = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672]],
        "mm_patch_merge_type": "spatial_unpad",
    }
    assert tiling_problems(anyres) == []
    for wrong, text in {
        "mm_patch_merge_type='spatial_maxpool2x2'": "supported: absent, flat, spatial, spatial_unpad",
        "image_grid_pinpoints='(1x1),...,(6x6)'": "supported: a list of 1 to 64 resolutions [width, height] in pixels",
    }.items():
        name, value = wrong.split("=")
        assert tiling_problems(anyres | {name: value.strip("'")}) == [f"{wrong} ({text})"]
        assert tiling_problems({**anyres, name: value, "image_aspect_ratio": "pad"}) == []
    assert tiling_problems({"image_aspect_ratio": "anyres"}) == [
        "image_aspect_ratio='anyres' without image_grid_pinpoints"
    ]
    assert len(tiling_problems(anyres | {"mm_use_im_start_end": True, "mm_vision_select_feature": "cls_patch"})) == 2

    assert grid_problems(((336, 672), (672, 336)), 336) == []
    assert len(grid_problems(((336, 600), (336 * 9, 336 * 8)), 336)) == 2
    square = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    assert processor_problems(square, 336) == []
    assert processor_problems(square | {"size": {"shortest_edge": 224}}, 336) == [
        "size={'shortest_edge': 224} (expected 336 pixels, as image_size of the vision tower)"
    ]
