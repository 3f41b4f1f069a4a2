"""Encode images for the language model: CLIP patches, reduced, projected, between `<im_start>` and `<im_end>`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class ClipFeatures(nn.Module):
    """One hidden layer of a CLIP vision tower, without the layers after it.

    Args:
        config ([`CLIPVisionConfig`]): of the whole tower.
        select_layer (`int`): which hidden state: 0 is the embedding, -1 the output of the last layer, -2 the one
            before.
        select_feature (`str`): `patch` drops the class token, `cls_patch` keeps it.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int, select_feature: str):
        super().__init__()
        num_layers = select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer
        used = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": num_layers})
        used._attn_implementation = "sdpa"
        tower = CLIPVisionModel(used).vision_model
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm
        self.encoder = tower.encoder
        self.first_token = 1 if select_feature == "patch" else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, height, width)` float -> `(images, tokens, vision_size)` float."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            output = layer(hidden_states, None)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return hidden_states[:, self.first_token :]


class ImageEncoder(nn.Module):
    """Vision tower, reduction of its patches, projector and borders of the image.

    The borders are part of the encoder's output because GenAI and Model Server expand one `<image>` of the prompt
    themselves, and do not support `<im_start>`. So the prompt contains only `<image>`.
    """

    def __init__(
        self,
        features: ClipFeatures,
        projector: nn.Module,
        text_size: int,
        num_borders: int,
        reduction: nn.Module | None = None,
    ):
        super().__init__()
        self.features = features
        self.reduction = reduction
        self.projector = projector
        # (2, text_size), or `None`: embeddings of <im_start> and <im_end>
        self.borders = nn.Parameter(torch.empty(num_borders, text_size), requires_grad=False) if num_borders else None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, height, width)` float -> `(images, borders + tokens, text_size)` float."""
        features = self.features(pixel_values)
        if self.reduction is not None:
            num_class_tokens = 1 - self.features.first_token
            class_token, patches = features[:, :num_class_tokens], features[:, num_class_tokens:]
            features = torch.cat([class_token, self.reduction(patches)], dim=1)
        image_features = self.projector(features)
        if self.borders is None:
            return image_features
        borders = (
            self.borders.to(image_features.dtype).unsqueeze(1).expand(-1, image_features.shape[0], -1).unsqueeze(2)
        )
        return torch.cat([borders[0], image_features, borders[1]], dim=1)
