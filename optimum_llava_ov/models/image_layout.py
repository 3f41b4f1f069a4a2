"""Encode the images of prompts, and count their rows in the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaNextProcessor, PretrainedConfig

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.tiling import ANYRES, read_pinpoints
from optimum_llava_ov.models.anyres import FLAT, SPATIAL_UNPAD, Tiling


@dataclass(frozen=True)
class ImageLayout:
    """
    Attributes:
        num_tokens: number of rows of an image that is not cut into tiles.
        tiling: how images are cut into tiles; `None` if they are not.
        image_newline: `(hidden_size,)`, the row after each row of patches, if there is one.
    """

    num_tokens: int
    tiling: Tiling | None = None
    image_newline: torch.Tensor | None = None

    @classmethod
    def of_original(cls, config: OriginalLlavaConfig, image_newline: torch.Tensor | None = None) -> ImageLayout:
        """Read the layout of an original checkpoint.

        Args:
            config: with `vision_config` filled in.
        """
        vision = config.vision_config
        pinpoints = read_pinpoints(config.image_grid_pinpoints) if config.image_aspect_ratio == ANYRES else None
        if pinpoints is None:
            return cls(config.num_patches + config.num_additional_image_tokens)
        tiling = Tiling(
            pinpoints,
            tile_size=vision.image_size,
            patches_per_side=vision.image_size // vision.patch_size,
            merge_type=config.mm_patch_merge_type or FLAT,
            num_additional_tokens=config.num_additional_image_tokens,
        )
        return cls(tiling.tokens_per_tile, tiling, image_newline)

    @classmethod
    def of_bundle(cls, config: PretrainedConfig) -> ImageLayout:
        """Read the layout of a bundle, where resolutions are height before width.

        The bundle of a model of transformers, which others made, has the arithmetic of transformers. It leaves out
        other rows at few sizes.

        Args:
            config (`LlavaConfig` or `LlavaNextConfig`): the bundle's configuration.
        """
        if config.model_type != "llava_next":
            return cls(config.image_seq_length)
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        tiling = Tiling(
            pinpoints=_turned(config.image_grid_pinpoints),
            tile_size=vision.image_size,
            patches_per_side=side,
            merge_type=getattr(config, "mm_patch_merge_type", SPATIAL_UNPAD),
            num_additional_tokens=getattr(config, "num_additional_image_tokens", 0),
            rounds=not hasattr(config, "converted_from"),
        )
        newline = getattr(config, "image_newline", None)
        return cls(tiling.tokens_per_tile, tiling, None if newline is None else torch.tensor(newline))

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of rows of an image. `size`: width and height, in pixels."""
        return self.num_tokens if self.tiling is None else self.tiling.num_image_tokens(size)

    def features(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: Any, image_sizes: Any = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode images.

        Args:
            encode: from `(images, 3, height, width)` to `(images, num_tokens, hidden_size)`.
            pixel_values: `(images, 3, height, width)`; with tiles `(images, tiles, 3, height, width)`, filled up with
                tiles that are not used, or a list with `(tiles, 3, height, width)` for each image.
            image_sizes: `(images, 2)`, height and width of each image in pixels; only with tiles.

        Returns:
            `(images, num_tokens, hidden_size)`; with tiles a list of `(num_image_tokens, hidden_size)` for each image.

        Raises:
            `ValueError`: `image_sizes` is missing or does not fit `pixel_values`.
        """
        if self.tiling is None:
            return encode(pixel_values)
        images = self._tiles(pixel_values, image_sizes)
        features = encode(torch.cat([tiles for tiles, _ in images])).split([len(tiles) for tiles, _ in images])
        return [self.tiling.pack(image, size, self.image_newline) for image, (_, size) in zip(features, images)]

    def images(self, pixel_values: Any, image_sizes: Any = None) -> list[tuple[torch.Tensor, tuple[int, int] | None]]:
        """Return pixels and size of each image.

        Args:
            pixel_values, image_sizes: as for [`features`].

        Returns:
            `(3, height, width)` and `None`; with tiles `(tiles, 3, height, width)`, only those that are used, and the
            image's width and height.

        Raises:
            `ValueError`: see [`features`].
        """
        if self.tiling is None:
            return [(image, None) for image in pixel_values]
        return [*self._tiles(pixel_values, image_sizes)]

    def _tiles(self, pixel_values: Any, image_sizes: Any) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        assert self.tiling is not None
        sizes = widths_and_heights(image_sizes)
        if len(sizes) != len(pixel_values):
            raise ValueError(
                f"image_sizes has {len(sizes)} sizes for {len(pixel_values)} image(s). This model cuts an image into "
                "tiles by its size: pass on all that the processor returns, `generate(**inputs)`."
            )
        return [(image[: self.tiling.num_tiles(size)], size) for image, size in zip(pixel_values, sizes)]


def tiling_of(processor: LlavaNextProcessor) -> Tiling:
    """Return how a processor of transformers cuts images into tiles. It knows `spatial_unpad` only."""
    image_processor = processor.image_processor
    tile_size = image_processor.size["shortest_edge"]
    return Tiling(_turned(image_processor.image_grid_pinpoints), tile_size, tile_size // processor.patch_size)


def _turned(pinpoints: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((width, height) for height, width in pinpoints)


def widths_and_heights(image_sizes: Any) -> list[tuple[int, int]]:
    """Return width and height of each image, in pixels.

    Args:
        image_sizes: `(images, 2)`, height and width, as the processor of transformers returns them, or `None`.
    """
    sizes = [] if image_sizes is None else torch.as_tensor(image_sizes).reshape(-1, 2).tolist()
    return [(width, height) for height, width in sizes]


def images_per_sequence(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return how many images each sequence has.

    Args:
        rows: number of image tokens of each sequence.
        lengths: number of image tokens of each image, in the order of the sequences. Their sum is that of `rows`.
    """
    counts, image = [], 0
    for remaining in rows:
        first = image
        while remaining > 0 and image < len(lengths):
            remaining -= lengths[image]
            image += 1
        counts.append(image - first)
    return counts
