"""Reduce the number of patches of an image before the projector, inside the graph that every engine runs.

Two methods:

- `merge`: patches that are most similar are merged into their mean, in several rounds, as in "Token Merging" (Bolya et
  al., 2023, https://arxiv.org/abs/2210.09461), but after the tower instead of inside. What is rare in an image keeps
  patches of its own, and the background loses them.
- `pool`: the mean of neighbours in a regular grid, the baseline.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from optimum_llava_ov.checkpoint.image_tokens import POOL, ImageTokens


# A round merges at most this share of the tokens. The next one compares what was merged.
_SHARE_PER_ROUND = 0.25


def build_reduction(image_tokens: ImageTokens, num_patches: int) -> nn.Module:
    """Build the module that reduces `(images, num_patches, width)` to `(images, image_tokens.count, width)`."""
    if image_tokens.count == num_patches:
        return nn.Identity()
    if image_tokens.method == POOL:
        return Pooled(image_tokens.count)
    return Merged(image_tokens.count, num_patches)


class Pooled(nn.Module):
    """Average neighbours.

    Args:
        num_tokens: a square.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.side = math.isqrt(num_tokens)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(images, patches, width)` float -> `(images, num_tokens, width)` float."""
        side = math.isqrt(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        return functional.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)


class Merged(nn.Module):
    """Merge the patches that are most similar.

    In each round, every second token is compared with all others. The pairs with the largest cosine similarity are
    merged into their mean, which counts each patch once. The tokens stay in the order of their patches.

    Args:
        num_tokens, num_patches: number of tokens after and before.
    """

    def __init__(self, num_tokens: int, num_patches: int):
        super().__init__()
        self.rounds = _rounds(num_tokens, num_patches)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(images, patches, width)` float -> `(images, num_tokens, width)` float."""
        dtype, tokens = features.dtype, features.float()
        sizes = torch.ones_like(tokens[..., :1])
        positions = sizes.cumsum(1)
        for merged in self.rounds:
            tokens, sizes, positions = _merge_round(tokens, sizes, positions, merged)
        return tokens.to(dtype)


def _rounds(num_tokens: int, num_patches: int) -> list[int]:
    """Return how many tokens each round removes."""
    rounds, remaining = [], num_patches
    while remaining > num_tokens:
        rounds.append(min(remaining - num_tokens, max(1, int(remaining * _SHARE_PER_ROUND))))
        remaining -= rounds[-1]
    return rounds


def _merge_round(
    tokens: torch.Tensor, sizes: torch.Tensor, positions: torch.Tensor, merged: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge `merged` tokens with even index into the most similar tokens with odd index.

    Args:
        tokens: `(images, tokens, width)` float.
        sizes, positions: `(images, tokens, 1)` float, number of patches of a token, and its place.
    """
    state = torch.cat([tokens, sizes, positions], dim=2)
    sources, targets = state[:, ::2], state[:, 1::2]
    unit = functional.normalize(tokens, dim=2)
    similarity, target = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=2)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    leaving, staying = order[:, :merged], order[:, merged:]

    def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index.unsqueeze(2).expand(-1, -1, values.shape[2]))

    into = functional.one_hot(target.gather(1, leaving), targets.shape[1]).to(tokens.dtype)
    moved = take(sources, leaving)
    old, weight = targets[..., -2:-1], moved[..., -2:-1]
    new = old + into.transpose(1, 2) @ weight
    mean = (targets[..., :-2] * old + into.transpose(1, 2) @ (moved[..., :-2] * weight)) / new
    result = torch.cat([take(sources, staying), torch.cat([mean, new, targets[..., -1:]], dim=2)], dim=1)
    result = take(result, result[..., -1].argsort(dim=1))
    return result[..., :-2], result[..., -2:-1], result[..., -1:]
