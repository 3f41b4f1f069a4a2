"""Keys and values of any number of rows, in blocks of tokens. Rows that began alike share blocks, until one of them writes there.

Method: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import openvino


BLOCK = 32  # tokens; OpenVINO's CPU plugin has no other
_ALIGNMENT = 64  # bytes


class PagedCache:
    """
    Args:
        request: of a graph with paged attention. The cache is a set of its inputs, which it writes into.

    Attributes:
        lengths: tokens of each row, `(rows,)` int32.
        ref_counts: number of sequences that use each block, `(blocks,)` int64.
        block_bytes: what a block takes in all layers, scales of its numbers included.

    Raises:
        `RuntimeError`: the graph has blocks of another length.
    """

    def __init__(self, request: openvino.InferRequest):
        self._request = request
        self._ports = [port for port in request.model_inputs if "_cache." in port.get_any_name()]
        for port in self._ports:  # keys have more behind the tokens: the scales of 8 bits
            if port.get_any_name().startswith("value") and port.get_partial_shape()[2] != BLOCK:
                raise RuntimeError(
                    f"{port.get_any_name()} is {port.get_partial_shape()}, not in blocks of {BLOCK} tokens."
                )
        self._shapes = [[side.get_length() for side in list(port.get_partial_shape())[1:]] for port in self._ports]
        self._sizes = [
            math.prod(shape) * port.get_element_type().bitwidth // 8 for port, shape in zip(self._ports, self._shapes)
        ]
        self.block_bytes = sum(self._sizes)
        self._arrays: list[np.ndarray | None] = [None] * len(self._ports)  # (blocks, bytes)
        self.ref_counts = np.zeros(0, dtype=np.int64)
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Forget all tokens. The memory is kept for what comes next."""
        self._tables: list[list[int]] = [[] for _ in range(rows)]
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.ref_counts[:] = 0

    def free(self) -> None:
        """Forget all tokens, and give the memory back."""
        self.begin(0)
        self._allocate(1)

    def reorder(self, rows: np.ndarray) -> None:
        """Let row `i` go on from where row `rows[i]` is, for all `i`."""
        if len(rows) == len(self._tables) and np.array_equal(rows, np.arange(len(rows))):
            return
        self._tables = [list(self._tables[row]) for row in rows]
        self.lengths = self.lengths[rows]
        self._count_refs()

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens of each sequence."""
        self.lengths = np.maximum(self.lengths - tokens, 0).astype(np.int32)
        self._tables = [table[: _blocks(length)] for table, length in zip(self._tables, self.lengths.tolist())]
        self._count_refs()

    def extend(self, row: int, tokens: int) -> None:
        """Make room for tokens behind a row's, in blocks that are this row's alone."""
        table, length = self._tables[row], int(self.lengths[row])
        if length % BLOCK and self.ref_counts[table[-1]] > 1:
            shared, own = table[-1], self._take(1)[0]
            for array in self._arrays:
                array[own] = array[shared]
            self.ref_counts[shared] -= 1
            table[-1] = own
        if missing := _blocks(length + tokens) - len(table):
            table += self._take(missing)
        self.lengths[row] = length + tokens

    def blocks(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of rows, one row behind the other, and where each begins and the last ends; int32."""
        tables = [self._tables[row] for row in rows]
        indices = np.fromiter((block for table in tables for block in table), dtype=np.int32)
        return indices, np.cumsum([0, *map(len, tables)], dtype=np.int32)

    def _take(self, count: int) -> list[int]:
        free = np.flatnonzero(self.ref_counts == 0)[:count]
        if len(free) < count:
            self._allocate(max(2 * len(self.ref_counts), len(self.ref_counts) + count))
            free = np.flatnonzero(self.ref_counts == 0)[:count]
        self.ref_counts[free] = 1
        return free.tolist()

    def _allocate(self, blocks: int) -> None:
        """Have so many blocks. One tensor at a time, so that there is not all of the cache twice."""
        kept = np.flatnonzero(self.ref_counts[:blocks])
        ref_counts = np.zeros(blocks, dtype=np.int64)
        ref_counts[kept] = self.ref_counts[kept]
        # The request does not hold the memory that it works on. If this is interrupted, all of it is made anew before the next call.
        self.ref_counts = ref_counts[:0]
        for number, port in enumerate(self._ports):
            array, shape = _zeros(blocks, self._sizes[number]), openvino.Shape([blocks, *self._shapes[number]])
            if len(kept):
                array[kept] = self._arrays[number][kept]
            self._request.set_tensor(port, openvino.Tensor(array, shape, port.get_element_type()))
            self._arrays[number] = array
        self.ref_counts = ref_counts

    def _count_refs(self) -> None:
        used = [block for table in self._tables for block in table]
        self.ref_counts = np.bincount(np.array(used, dtype=np.int64), minlength=len(self.ref_counts))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _zeros(blocks: int, size: int) -> np.ndarray:
    """Memory that is zero until it is written, and takes none until then. OpenVINO multiplies what is behind the last token by zero,
    which must not meet a NaN.
    """
    buffer = np.zeros(blocks * size + _ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + blocks * size].reshape(blocks, size)
