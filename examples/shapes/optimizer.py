"""Optimizers of the example model."""

from __future__ import annotations

import math

import torch
from torch import nn


class Optimizers:
    """Use Muon for the matrices of the layers and AdamW for all other parameters, with one schedule."""

    def __init__(
        self, parameters: list[tuple[str, nn.Parameter]], matrix_peak: float, peak: float = 1e-3, warmup: int = 50
    ):
        parameters = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in parameters]
        self.warmup = warmup
        self.optimizers = []
        is_matrix = [
            (".layers." in name or "blocks." in name) and parameter.ndim == 2 for name, parameter in parameters
        ]
        matrices = [parameter for (_, parameter), is_muon in zip(parameters, is_matrix, strict=True) if is_muon]
        others = [parameter for (_, parameter), is_muon in zip(parameters, is_matrix, strict=True) if not is_muon]
        self.optimizers.append((Muon(matrices, lr=matrix_peak), matrix_peak))
        self.optimizers.append((torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.02), peak))

    def step(self, loss: torch.Tensor, step: int, progress: float) -> None:
        """Update the parameters. The learning rate falls to zero as a cosine while `progress` goes from 0 to 1."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1, progress)))
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()


class Muon(torch.optim.Optimizer):
    """Optimize with Muon (https://kellerjordan.github.io/posts/muon) in float32, all matrices of one shape at once.

    `torch.optim.Muon` works in bfloat16 and processes one matrix after the other, which is slow for tiny matrices on a
    CPU.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parts: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                # Query, key and value are separate matrices
                count = 3 if parameter.shape[0] == 3 * parameter.shape[1] else 1
                for weight, change in zip(parameter.chunk(count), update.chunk(count), strict=True):
                    parts.setdefault(weight.shape, []).append((weight, change))
            for shape, pairs in parts.items():
                changes = (
                    _orthogonal(torch.stack([change for _, change in pairs])) * max(1, shape[0] / shape[1]) ** 0.5
                )
                for (weight, _), change in zip(pairs, changes, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Approximate the nearest orthogonal matrices with five Newton-Schulz iterations and Muon's coefficients."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x
