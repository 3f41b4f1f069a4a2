"""Project image features to the width of the language model. After LLaVA's `multimodal_projector/builder.py`."""

from __future__ import annotations

import re

from torch import nn

from optimum_llava_ov.errors import UnsupportedCheckpointError


def build_projector(projector_type: str, vision_size: int, text_size: int) -> nn.Module:
    """
    Args:
        projector_type (`str`): `linear`, `identity` or `mlp<N>x_gelu` (N linear layers with GELU between them).
        vision_size, text_size (`int`): `hidden_size` of the vision tower and of the language model.

    Raises:
        [`UnsupportedCheckpointError`]: there is no such type.
    """
    if projector_type == "identity":
        return nn.Identity()
    if projector_type == "linear":
        return nn.Linear(vision_size, text_size)
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if mlp is None:
        raise UnsupportedCheckpointError(
            f"The projector type {projector_type!r} is not supported. Expected identity, linear or mlp<N>x_gelu."
        )
    layers: list[nn.Module] = [nn.Linear(vision_size, text_size)]
    for _ in range(int(mlp.group(1)) - 1):
        layers += [nn.GELU(), nn.Linear(text_size, text_size)]
    return nn.Sequential(*layers)
