"""Say how many tokens an image becomes, if they are fewer than its patches, and how the patches are reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimum_llava_ov.errors import UnsupportedCheckpointError


MERGE, POOL = "merge", "pool"
METHODS = (MERGE, POOL)


@dataclass(frozen=True)
class ImageTokens:
    """
    Attributes:
        count: number of tokens that the patches of an image become.
        method: `merge` merges the patches that are most similar, `pool` averages neighbours in a regular grid.
    """

    count: int
    method: str = MERGE

    def check(self, num_patches: int, has_tiles: bool) -> None:
        """Check that the patches of an image can be reduced.

        Args:
            num_patches: number of patches that the vision tower gives.
            has_tiles: whether images are cut into tiles.

        Raises:
            [`UnsupportedCheckpointError`]: they cannot; says which numbers are possible.
        """
        if has_tiles:
            raise UnsupportedCheckpointError(
                f"image_tokens={self.count}, but this checkpoint cuts images into tiles. All engines compute the "
                "number of tokens of such an image from its patches, so it cannot change. Leave the option out."
            )
        if not 1 <= self.count <= num_patches:
            raise UnsupportedCheckpointError(
                f"image_tokens={self.count}, but the vision tower gives {num_patches} patches. Expected 1 to "
                f"{num_patches}."
            )
        if self.method not in METHODS:
            raise UnsupportedCheckpointError(
                f"The image_token_method {self.method!r} does not exist. Expected one of {', '.join(METHODS)}."
            )
        if self.method == POOL and math.isqrt(self.count) ** 2 != self.count:
            squares = (str(side**2) for side in range(math.isqrt(num_patches), 0, -1))
            raise UnsupportedCheckpointError(
                f"image_tokens={self.count} is not a square, as the method {POOL!r} needs. Expected one of "
                f"{', '.join(squares)}, or the method {MERGE!r}."
            )
