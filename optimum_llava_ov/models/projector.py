"""From the vision tower's space to the language model's. After LLaVA's `multimodal_projector/builder.py`."""

from __future__ import annotations

from torch import nn


def build_projector(projector_type: str, vision_size: int, text_size: int) -> nn.Module:
    """
    Args:
        projector_type (`str`): `linear`, `identity` or `mlp<N>x_gelu` (N linear layers with GELU between them).
        vision_size, text_size (`int`): width of the vision tower and of the language model.
    """
    if projector_type == "identity":
        return nn.Identity()
    if projector_type == "linear":
        return nn.Linear(vision_size, text_size)
    depth = int(projector_type.removeprefix("mlp").removesuffix("x_gelu"))
    layers: list[nn.Module] = [nn.Linear(vision_size, text_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_size, text_size)]
    return nn.Sequential(*layers)
