"""What a bundle says about tiles, in the words and the order of each reader."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.image_utils import PILImageResampling
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from optimum_llava_ov.models.anyres import Tiling


class LlavaNextProcessor(transformers.LlavaNextProcessor):
    """transformers' processor, with the number of image tokens that the original computes.

    It is saved under the name of transformers' own class, which loads it from a bundle. [`OVModelForLlava`] corrects
    the prompts of that class where they differ.
    """

    tiling: Tiling

    @classmethod
    def like(cls, processor: transformers.LlavaNextProcessor, tiling: Tiling) -> LlavaNextProcessor:
        """Return a processor with the parts of another one, which counts as the original does."""
        options = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "chat_template")
        other = cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            image_token=processor.image_token,
            **{name: getattr(processor, name) for name in options},
        )
        other.tiling = tiling
        return other

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        return self.tiling.num_image_tokens((orig_width, orig_height))


def transposed(tiling: Tiling) -> list[list[int]]:
    """Return the resolutions as transformers and optimum-intel expect them: height before width.

    The order matters. An image that is not larger than a tile has the same rank in all resolutions of two tiles.
    The first one wins.
    """
    return [[height, width] for width, height in tiling.pinpoints]


def original_order(tiling: Tiling) -> dict[str, Any]:
    """Return the option of `preprocessor_config.json`, where GenAI and Model Server expect width before height.

    transformers 5 reads `processor_config.json` instead.
    """
    return {"image_grid_pinpoints": [list(pinpoint) for pinpoint in tiling.pinpoints]}


def tiling_options(tiling: Tiling, image_newline: torch.Tensor | None) -> dict[str, Any]:
    """Return the options of `config.json`. Readers other than this package know only `spatial_unpad`."""
    options = {
        "image_grid_pinpoints": transposed(tiling),
        "mm_patch_merge_type": tiling.merge_type,
        "num_additional_image_tokens": tiling.num_additional_tokens,
    }
    return options if image_newline is None else {**options, "image_newline": image_newline.tolist()}


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
        "image_grid_pinpoints": transposed(tiling),
    }
    return LlavaNextImageProcessorPil(**{**settings, **geometry})
