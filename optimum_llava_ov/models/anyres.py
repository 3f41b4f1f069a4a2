"""Compute the tiles of an image, and its rows in the language model. After LLaVA-1.6's `mm_utils.py`.

An image of any size becomes several images of the vision tower's size: first the base, which is the whole image
squashed to a square, then the tiles, which are cut row by row from the image in one of several resolutions
(pinpoints). The language model gets the base, then the patches of the tiles. With `spatial_unpad`, patches that show
only padding are left out, and `image_newline` follows each row of patches.

All sizes are computed in the original's arithmetic, in double precision with `int()` where it has `int()`. It differs
from exact arithmetic: an image of 376 x 94 pixels has a row of patches less, one of 142 x 285 another grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


FLAT, SPATIAL, SPATIAL_UNPAD = MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def select_best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the resolution that keeps the most pixels of the image, with the least padding. The first wins a tie.

    Args:
        size: width and height of the image, in pixels.
        pinpoints: widths and heights to choose from, in pixels. The order matters.
    """
    width, height = size
    keys = []
    for best_width, best_height in pinpoints:
        scale = min(best_width / width, best_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        keys.append((effective, effective - best_width * best_height))
    return pinpoints[keys.index(max(keys))]


def resized_size(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the image inside `resolution`, in pixels. The rest of `resolution` is black."""
    (width, height), (best_width, best_height) = size, resolution
    scale_width, scale_height = best_width / width, best_height / height
    if scale_width < scale_height:
        return best_width, min(math.ceil(height * scale_width), best_height)
    return min(math.ceil(width * scale_height), best_width), best_height


@dataclass(frozen=True)
class Tiling:
    """Cut images into tiles, and pack the features of the tiles.

    Attributes:
        pinpoints: widths and heights of the resolutions, in pixels, in the original's order. All are multiples of
            `tile_size`.
        tile_size: height and width of a tile, in pixels.
        patches_per_side: number of patches in a row of a tile.
        merge_type: `spatial_unpad`, `spatial` or `flat`.
        num_additional_tokens: tokens of each tile that are not patches. It is 0 unless `merge_type` is `flat`.
        rounds: whether the number of patches to keep is rounded to 7 digits before it is cut off, as in transformers
            and not in the original.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    patches_per_side: int
    merge_type: str = SPATIAL_UNPAD
    num_additional_tokens: int = 0
    rounds: bool = False

    @property
    def tokens_per_tile(self) -> int:
        return self.patches_per_side**2 + self.num_additional_tokens

    @property
    def max_tiles(self) -> int:
        """Return the largest number of tiles of an image, with the base."""
        return 1 + max(width * height for width, height in self.pinpoints) // self.tile_size**2

    @property
    def max_image_tokens(self) -> int:
        """Return the largest number of rows of an image: of one that fills a resolution."""
        return max(map(self.num_image_tokens, self.pinpoints))

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Return the number of columns and of rows of tiles of each resolution."""
        return [(width // self.tile_size, height // self.tile_size) for width, height in self.pinpoints]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the number of columns and of rows of tiles. `size`: width and height of the image, in pixels."""
        width, height = select_best_resolution(size, self.pinpoints)
        return width // self.tile_size, height // self.tile_size

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Return the number of tiles, with the base. `size`: width and height of the image, in pixels."""
        columns, rows = self.grid(size)
        return 1 + columns * rows

    def padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return how many columns of patches are left out on the left and on the right, and how many rows above and
        below. `size`: width and height of the image, in pixels.

        One of the two is 0. If the number of patches to leave out is odd, one is kept.
        """
        return self._padding(size) if self.merge_type == SPATIAL_UNPAD else (0, 0)

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of rows of the image in the language model.

        Args:
            size: width and height of the image, in pixels.
        """
        if self.merge_type == SPATIAL_UNPAD:
            return self._num_unpadded(size, self._padding(size))
        return self.num_tiles(size) * self.tokens_per_tile

    def num_placeholders(self, size: tuple[int, int]) -> int:
        """Return how many `<image>` the processor of transformers writes for an image.

        It knows `spatial_unpad` only, and rounds to 7 digits where the original does not.

        Args:
            size: width and height of the image, in pixels.
        """
        return self._num_unpadded(size, self._padding(size, rounds=True))

    def patches(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the number of columns and of rows of patches of the tiles, without those that are left out.

        One of the two is 0 if the image is very long. `size`: width and height of the image, in pixels.
        """
        return self._patches(size, self.padding(size))

    def _patches(self, size: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
        columns, rows = self.grid(size)
        return columns * self.patches_per_side - 2 * padding[0], rows * self.patches_per_side - 2 * padding[1]

    def _num_unpadded(self, size: tuple[int, int], padding: tuple[int, int]) -> int:
        columns, rows = self._patches(size, padding)
        return self.tokens_per_tile + rows * (columns + 1)

    def _padding(self, size: tuple[int, int], rounds: bool | None = None) -> tuple[int, int]:
        def whole(patches: float) -> int:
            return int(round(patches, 7)) if (self.rounds if rounds is None else rounds) else int(patches)

        width, height = size
        columns, rows = (side * self.patches_per_side for side in self.grid(size))
        if width / height > columns / rows:
            return 0, (rows - whole(height * (columns / width))) // 2
        return (columns - whole(width * (rows / height))) // 2, 0

    def pack(
        self, features: torch.Tensor, size: tuple[int, int], image_newline: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Put the features of an image in the order of the language model.

        Args:
            features: `(tiles, tokens_per_tile, hidden_size)`, the base first.
            size: width and height of the image, in pixels.
            image_newline: `(hidden_size,)`, for `spatial_unpad`.

        Returns:
            `(num_image_tokens, hidden_size)`.

        Raises:
            `ValueError`: an image of this size has another number of tiles.
        """
        if len(features) != self.num_tiles(size):
            raise ValueError(
                f"An image of {size[0]} x {size[1]} pixels has {self.num_tiles(size)} tiles, but {len(features)} were "
                "given. Give `pixel_values` and `image_sizes` as the processor of the same model returned them."
            )
        if self.merge_type == FLAT:
            return features.flatten(0, 1)
        (columns, rows), (left, above) = self.grid(size), self.padding(size)
        side, base, tiles = self.patches_per_side, features[0], features[1:]
        patches = tiles.unflatten(0, (rows, columns)).unflatten(2, (side, side))
        patches = patches.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, hidden_size) of patches
        if self.merge_type == SPATIAL_UNPAD and image_newline is not None:
            patches = patches[above : len(patches) - above, left : patches.shape[1] - left]
            patches = torch.cat([patches, image_newline.to(patches).expand(len(patches), 1, -1)], dim=1)
        return torch.cat([base, patches.flatten(0, 1)])
