"""Build the image processor that cuts images into tiles, and save it as each reader expects it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.image_utils import PILImageResampling
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from optimum_llava_ov.bundle.settings import write_json
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.models.anyres import Tiling


def transposed(pinpoints: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """Return the resolutions as transformers and optimum-intel expect them: height before width.

    The order matters. An image that is not larger than a tile has the same rank in all resolutions of two tiles.
    The first one wins.
    """
    return [[height, width] for width, height in pinpoints]


def build_tiling_processor(settings: dict[str, Any], tiling: Tiling) -> LlavaNextImageProcessorPil:
    """Build the image processor, which prepares images with PIL as the original does.

    Args:
        settings: options of `preprocessor_config.json` of the vision tower.
    """
    geometry = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": tiling.tile_size},
        "resample": PILImageResampling.BICUBIC,  # in the original, whatever the settings say
        "do_center_crop": True,
        "crop_size": {"height": tiling.tile_size, "width": tiling.tile_size},
        "image_grid_pinpoints": transposed(tiling.pinpoints),
    }
    return LlavaNextImageProcessorPil(**{**settings, **geometry})


def write_original_order(folder: Path, tiling: Tiling) -> None:
    """Write width before height in `preprocessor_config.json`, which GenAI and Model Server read as the original does.

    transformers reads `processor_config.json` instead.
    """
    file = folder / "preprocessor_config.json"
    write_json(file, {**read_json(file), "image_grid_pinpoints": [list(pinpoint) for pinpoint in tiling.pinpoints]})
