"""Compress large tables to 8 bits in blocks of rows.

NNCF compresses a weight as a whole, and computes in float32. The tables of Yi 34B have 64,000 rows of 7,168 numbers,
for which it takes 4 GB. Each row has a scale of its own, so blocks of rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino


BLOCK = 1 << 25  # numbers; 128 MB in float32


def by_rows(compress_weight: Callable[..., Any]) -> Callable[..., Any]:
    """Return NNCF's `compress_weight`, changed so that it compresses a table of more than [`BLOCK`] numbers in blocks.

    Only matrices with 8 bits and one scale for each row are compressed so. Weights with 4 bits are smaller, and NNCF
    returns them in another form.
    """

    def compress(weight: Any, reduction_axes: Any, config: Any, precomputed: Any = None) -> Any:
        axes = (reduction_axes,) if isinstance(reduction_axes, int) else tuple(reduction_axes or ())
        is_table = len(weight.shape) == 2 and axes in ((1,), (-1,)) and precomputed is None
        if not is_table or not config.is_integer or config.num_bits != 8 or config.group_size != -1:
            return compress_weight(weight, reduction_axes, config, precomputed)
        rows, columns = weight.shape
        step = max(1, BLOCK // columns)
        if step >= rows:
            return compress_weight(weight, reduction_axes, config, precomputed)
        blocks = [
            compress_weight(type(weight)(_rows(weight.data, start, min(start + step, rows))), reduction_axes, config)
            for start in range(0, rows, step)
        ]
        result = blocks[0]
        for name in ("tensor", "scale", "zero_point"):
            if getattr(result, name) is not None:
                parts = [getattr(block, name).data for block in blocks]
                setattr(result, name, type(weight)(np.concatenate(parts)))
        return result

    return compress


def _rows(data: np.ndarray | openvino.Tensor, start: int, stop: int) -> np.ndarray | openvino.Tensor:
    if isinstance(data, np.ndarray):
        return data[start:stop]
    return openvino.Tensor(data, [start, 0], [stop, data.shape[1]])  # a view
