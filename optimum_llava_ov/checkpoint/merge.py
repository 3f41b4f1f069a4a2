"""Merge what a fine-tune has trained into the weights of its base, one tensor at a time.

A fine-tune consists of overlays: one for each of its files. An overlay has an update for each tensor that it changes.
The original code merges in fp16: it loads all weights in fp16, adds in float32 and rounds each sum to fp16. The result
here has the same bits. A model in float32 gets the exact sum instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from optimum_llava_ov.checkpoint.names import original_name
from optimum_llava_ov.errors import InvalidCheckpointError
from optimum_llava_ov.system.memory import empty_tensor


MIN_BYTES = 1 << 20  # smaller tensors stay in memory
_SHOWN = 8  # number of problems in a message
_BLOCK = 64  # rows of a product that are computed at a time
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Parts of a LLaVA that a language model does not have
_MULTIMODAL = re.compile(r"(?:model|transformer)\.(?:(?:mm_projector|vision_tower\.vision_tower)\..+|image_newline)")
# Tables with a row for each token. A tokenizer with added tokens needs more rows than the base has.
EMBEDDING_TABLES = ("embed_tokens.weight", "wte.weight")
_TABLES = (*EMBEDDING_TABLES, "lm_head.weight")


class Update(Protocol):
    """Change one tensor of the base."""

    def problem(self, name: str, shape: torch.Size | None) -> str | None:
        """Return why the update does not fit a tensor of this shape; `None` if it fits.

        Args:
            name: name of the tensor in the original's checkpoints.
            shape: shape of the tensor, `None` if the base does not have it.
        """

    def shape(self, shape: torch.Size | None) -> torch.Size:
        """Return the shape of the result."""

    def apply(self, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the result in `dtype`. `weight` is the base's tensor, of the same dtype."""


@dataclass(frozen=True)
class Replacement:
    """Replace a tensor: the projector, and modules that were trained as a whole.

    A table that has less than half of the base's rows replaces nothing. Its rows are those of added tokens, and follow
    the base's.
    """

    tensor: torch.Tensor

    def problem(self, name: str, shape: torch.Size | None) -> str | None:
        if shape is None or shape == self.tensor.shape or _same_width(name, shape, self.tensor.shape):
            return _not_float(self.tensor)
        return f"{name} is {_text(self.tensor.shape)}, and {_text(shape)} in the base"

    def shape(self, shape: torch.Size | None) -> torch.Size:
        rows = self._rows_before(shape)
        return torch.Size([rows + len(self.tensor), *self.tensor.shape[1:]]) if rows else self.tensor.shape

    def apply(self, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.tensor.to(dtype)
        return torch.cat([weight, tensor]) if weight is not None and self._rows_before(weight.shape) else tensor

    def _rows_before(self, shape: torch.Size | None) -> int:
        if shape is None or shape == self.tensor.shape or len(shape) < 2 or 2 * len(self.tensor) >= shape[0]:
            return 0
        return shape[0]


@dataclass(frozen=True)
class LowRank:
    """Add the product of two matrices (LoRA): `weight + (b @ a) * scale`.

    Attributes:
        a: `(rank, in_features)`.
        b: `(out_features, rank)`.
        scale: factor of the product.
        transposed: whether the product is transposed, as for an embedding table.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False

    def problem(self, name: str, shape: torch.Size | None) -> str | None:
        if shape is None:
            return f"{name} is not in the base"
        if self.a.shape[0] != self.b.shape[1]:
            return f"{name} has lora_A {_text(self.a.shape)} and lora_B {_text(self.b.shape)}, which have no product"
        if self.shape(shape) != shape:
            return f"{name} is changed by {_text(self.shape(shape))}, and is {_text(shape)} in the base"
        return _not_float(self.a) or _not_float(self.b)

    def shape(self, shape: torch.Size | None) -> torch.Size:
        size = (self.b.shape[0], self.a.shape[1])
        return torch.Size(size[::-1] if self.transposed else size)

    def apply(self, weight: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the result in `dtype`. `out` is memory for it, which saves the system's time for new memory."""
        assert weight is not None  # see `problem`
        a, b = self.a.float(), self.b.float()
        if self.transposed or not _is_equal_in_blocks(len(b), *a.shape):
            product = b @ a
            product = product.T if self.transposed else product
            return product.mul_(self.scale).add_(weight).to(dtype)
        result = torch.empty(weight.shape, dtype=dtype) if out is None else out.view(weight.shape)
        # Two blocks of memory for all rows. An addition of fp16 to float32 would take new memory each time.
        products, weights = torch.empty(2, _BLOCK, a.shape[1])
        for start in range(0, len(b), _BLOCK):
            rows = slice(start, start + _BLOCK)
            length = len(b[rows])
            product = torch.matmul(b[rows], a, out=products[:length]).mul_(self.scale)
            result[rows] = product.add_(weights[:length].copy_(weight[rows]))
        return result


@dataclass(frozen=True)
class Difference:
    """Add a tensor (delta weights). A part that the base does not have is taken as it is.

    The tensor may have more rows than the base: those of added tokens, which are whole.
    """

    tensor: torch.Tensor

    def problem(self, name: str, shape: torch.Size | None) -> str | None:
        if shape is None or shape == self.tensor.shape:
            return _not_float(self.tensor)
        if _same_width(name, shape, self.tensor.shape) and len(self.tensor) > shape[0]:
            return _not_float(self.tensor)
        return f"{name} is {_text(self.tensor.shape)}, and {_text(shape)} in the base"

    def shape(self, shape: torch.Size | None) -> torch.Size:
        return self.tensor.shape

    def apply(self, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if weight is None:
            return self.tensor.to(dtype)
        total = self.tensor.to(dtype).to(torch.float32, copy=True)
        total[: len(weight)] += weight
        return total.to(dtype)


@dataclass(frozen=True)
class Overlay:
    """
    Attributes:
        source (`str`): where the updates are from, for messages.
        updates (`dict[str, Update]`): by the name of the tensor, as the trained model had it.
    """

    source: str
    updates: Mapping[str, Update]

    def fitted(self, shapes: Mapping[str, torch.Size]) -> dict[str, Update]:
        """Return the updates by the names of the base's tensors.

        Args:
            shapes: shape of each tensor of the base, by its name in the original's checkpoints.

        Raises:
            [`InvalidCheckpointError`]: an update is for a tensor that the base does not have, or does not fit it;
                lists these.
        """
        fitted: dict[str, Update] = {}
        problems = []
        for name, update in self.updates.items():
            known = original_name(name, shapes)
            if known is None and isinstance(update, LowRank):
                problems.append(f"{name} is not in the base")
                continue
            known = known or original_name(name, _MULTIMODAL)
            if known is None:
                problems.append(f"{name} is not in the base")
            elif known in fitted:
                problems.append(f"{name} is there twice, as {known}")
            elif problem := update.problem(known, shapes.get(known)):
                problems.append(problem)
            else:
                fitted[known] = update
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise InvalidCheckpointError(
                f"{self.source} does not fit the base model: {'; '.join(problems[:_SHOWN])}{more}. It was trained on "
                "another model, or with another architecture. Name its base: --model-kwargs "
                '\'{"base_model": "<folder or model id>"}\'. Nothing was converted.'
            )
        return fitted


@lru_cache(maxsize=64)
def _is_equal_in_blocks(rows: int, rank: int, columns: int) -> bool:
    """Return whether a product of this size has the same bits if it is computed in blocks of rows, on this processor.

    Blocks stay in the processor's cache, which takes half of the time.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
    blocks = torch.cat([b[start : start + _BLOCK] @ a for start in range(0, rows, _BLOCK)])
    return torch.equal(blocks, b @ a)


def check_fit(overlays: Sequence[Overlay], shapes: Mapping[str, torch.Size]) -> None:
    """Check that overlays fit a base, one after the other. Reads no tensor of the base.

    Raises:
        [`InvalidCheckpointError`]: see [`Overlay.fitted`].
    """
    shapes = dict(shapes)
    for overlay in overlays:
        shapes |= {name: update.shape(shapes.get(name)) for name, update in overlay.fitted(shapes).items()}


def without_low_rank(
    overlays: Sequence[Overlay], shapes: Mapping[str, torch.Size], is_separate: Callable[[str], bool]
) -> tuple[list[Overlay], dict[str, list[LowRank]]]:
    """Separate low-rank updates from the others, which can be merged without them.

    Args:
        overlays: in the order in which they would be merged.
        shapes: shape of each tensor of the base.
        is_separate: whether to separate the updates of the tensor with this name.

    Returns:
        The overlays without these updates, and these updates by the name of their tensor. If a later overlay replaces
        the tensor, they have no effect and are left out.

    Raises:
        [`InvalidCheckpointError`]: see [`Overlay.fitted`].
    """
    shapes = dict(shapes)
    kept: list[Overlay] = []
    separate: dict[str, list[LowRank]] = {}
    for overlay in overlays:
        others: dict[str, Update] = {}
        for name, update in overlay.fitted(shapes).items():
            shapes[name] = update.shape(shapes.get(name))
            if isinstance(update, LowRank) and is_separate(name):
                separate.setdefault(name, []).append(update)
            else:
                others[name] = update
                if isinstance(update, Replacement):
                    separate.pop(name, None)
        kept.append(Overlay(overlay.source, others))
    return kept, separate


def merge(
    tensors: Mapping[str, torch.Tensor],
    overlays: Sequence[Overlay],
    dtype: torch.dtype | None = None,
    workspace: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Merge overlays into the tensors of a base, in their order.

    Tensors that no overlay changes are returned as they are, but those in bf16 become fp16, as in the original. New
    tensors need memory: with a `workspace`, each is written to a file there and mapped from it, so that only one is in
    memory at a time.

    Args:
        tensors: the base's tensors by name.
        overlays: what to merge.
        dtype: `torch.float16` for the weights of the original code, `torch.float32` for exact ones. If `None`, weights
            that are stored in float32 stay in float32, and all others become fp16.
        workspace: folder of the files. They have no names, and are deleted with their tensors.

    Raises:
        [`InvalidCheckpointError`]: see [`Overlay.fitted`].
        `OSError`: the disk is full.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    updates: dict[str, list[Update]] = {}
    for overlay in overlays:
        for name, update in overlay.fitted(shapes).items():
            updates.setdefault(name, []).append(update)
            shapes[name] = update.shape(shapes.get(name))
    merged = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 and name not in updates:
            merged[name] = _spilled(tensor.half(), workspace)
    for name, changes in updates.items():
        merged[name] = _spilled(_changed(tensors.get(name), changes, dtype), workspace)
    return merged


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a table with this number of rows. New ones are the mean of the others, as when a training adds tokens."""
    if len(table) >= rows:
        return table[:rows]
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _changed(weight: torch.Tensor | None, updates: Sequence[Update], dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        stored = weight if weight is not None else getattr(updates[0], "tensor", None)
        dtype = torch.float32 if stored is not None and stored.dtype == torch.float32 else torch.float16
    weight = None if weight is None else weight.to(dtype)
    for update in updates:
        weight = update.apply(weight, dtype)
    assert weight is not None
    return weight


def _spilled(tensor: torch.Tensor, workspace: Path | None) -> torch.Tensor:
    if workspace is None or tensor.nbytes < MIN_BYTES:
        return tensor.contiguous()
    return empty_tensor(tensor.shape, tensor.dtype, workspace).copy_(tensor)


def _same_width(name: str, shape: torch.Size, other: torch.Size) -> bool:
    """Return whether both shapes are of a table that may have any number of rows."""
    return name.endswith(_TABLES) and len(shape) == len(other) == 2 and shape[1] == other[1] and other[0] > 0


def _not_float(tensor: torch.Tensor) -> str | None:
    return None if tensor.dtype in _FLOATS else f"a tensor is {tensor.dtype}, expected fp16, bf16 or fp32"


def _text(shape: torch.Size) -> str:
    return str(tuple(shape))
