"""Keep keys and values of any number of sequences in blocks of tokens.

Sequences with the same beginning share blocks until one of them writes to a shared block.

Method: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import openvino


BLOCK = 32  # tokens; OpenVINO's CPU plugin supports no other size
_ALIGNMENT = 64  # bytes


class PagedCache:
    """Manage the blocks of a batch.

    Args:
        request: A request of a graph with paged attention. The cache is a set of its inputs, which it writes to.

    Attributes:
        lengths: Number of tokens of each sequence, `(batch,)` int32.
        ref_counts: Number of sequences that use each block, `(blocks,)` int64.
        block_bytes: Size of a block in all layers, quantization scales included.

    Raises:
        `RuntimeError`: The graph has blocks of another length.
    """

    def __init__(self, request: openvino.InferRequest):
        self._request = request
        self._ports = [port for port in request.model_inputs if "_cache." in port.get_any_name()]
        for port in self._ports:  # blocks of keys are longer: the scales of 8-bit keys follow the tokens
            if port.get_any_name().startswith("value") and port.get_partial_shape()[2] != BLOCK:
                raise RuntimeError(
                    f"{port.get_any_name()} has shape {port.get_partial_shape()}. Expected blocks of {BLOCK} tokens."
                )
        self._shapes = [[side.get_length() for side in list(port.get_partial_shape())[1:]] for port in self._ports]
        self._sizes = [
            math.prod(shape) * port.get_element_type().bitwidth // 8 for port, shape in zip(self._ports, self._shapes)
        ]
        self.block_bytes = sum(self._sizes)
        self._arrays = [np.zeros((0, size), dtype=np.uint8) for size in self._sizes]  # (blocks, bytes)
        self.ref_counts = np.zeros(0, dtype=np.int64)
        self.begin(0)

    def begin(self, batch_size: int) -> None:
        """Forget all tokens, and expect a new batch. Keep the memory for it."""
        self._tables: list[list[int]] = [[] for _ in range(batch_size)]
        self.lengths = np.zeros(batch_size, dtype=np.int32)
        self.ref_counts[:] = 0

    def free(self) -> None:
        """Forget all tokens, and free their memory."""
        self.begin(0)
        self._allocate(1)

    def reorder(self, beam_idx: np.ndarray) -> None:
        """Continue sequence `beam_idx[i]` as sequence `i`, for all `i`."""
        if len(beam_idx) == len(self._tables) and np.array_equal(beam_idx, np.arange(len(beam_idx))):
            return
        self._tables = [list(self._tables[index]) for index in beam_idx]
        self.lengths = self.lengths[beam_idx]
        self._count_refs()

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens of each sequence."""
        self.lengths = np.maximum(self.lengths - tokens, 0).astype(np.int32)
        self._tables = [table[: _blocks(length)] for table, length in zip(self._tables, self.lengths.tolist())]
        self._count_refs()

    def extend(self, index: int, tokens: int) -> None:
        """Make room for `tokens` more tokens of a sequence, in blocks that no other sequence uses."""
        table, length = self._tables[index], int(self.lengths[index])
        if length % BLOCK and self.ref_counts[table[-1]] > 1:
            shared, own = table[-1], self._take(1)[0]
            for array in self._arrays:
                array[own] = array[shared]
            self.ref_counts[shared] -= 1
            table[-1] = own
        if missing := _blocks(length + tokens) - len(table):
            table += self._take(missing)
        self.lengths[index] = length + tokens

    def blocks(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks of some sequences, concatenated.

        Returns:
            `(blocks,)` int32, the blocks, and `(sequences + 1,)` int32, where each sequence begins and the last ends.
        """
        tables = [self._tables[index] for index in indices]
        blocks = np.fromiter((block for table in tables for block in table), dtype=np.int32)
        return blocks, np.cumsum([0, *map(len, tables)], dtype=np.int32)

    def _take(self, count: int) -> list[int]:
        free = np.flatnonzero(self.ref_counts == 0)[:count]
        if len(free) < count:
            self._allocate(max(2 * len(self.ref_counts), len(self.ref_counts) + count))
            free = np.flatnonzero(self.ref_counts == 0)[:count]
        self.ref_counts[free] = 1
        return free.tolist()

    def _allocate(self, blocks: int) -> None:
        """Resize the cache, one tensor at a time, so that the whole cache is never in memory twice."""
        kept = np.flatnonzero(self.ref_counts[:blocks])
        ref_counts = np.zeros(blocks, dtype=np.int64)
        ref_counts[kept] = self.ref_counts[kept]
        # The request does not own its tensors' memory. If this is interrupted, the next call allocates all of it
        # again.
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
    """Return aligned zeros `(blocks, size)` uint8, which the system provides only when they are written.

    OpenVINO multiplies the values after the last token by zero, so there must not be a NaN.
    """
    buffer = np.zeros(blocks * size + _ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + blocks * size].reshape(blocks, size)
