"""What turns embeddings into logits and keeps keys and values meanwhile: one request of the compiled language model, and its cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import openvino


class Decoder(Protocol):
    """
    Attributes:
        request: what runs the graph.
        first_piece, piece: how many tokens to give in one call when a prompt is processed piece by piece, so that it can be cancelled.
    """

    request: openvino.InferRequest
    first_piece: int
    piece: int

    def __init__(self, compiled: openvino.CompiledModel) -> None: ...

    def begin(self, batch_size: int) -> None:
        """Forget all tokens; so many rows will come."""

    def free(self) -> None:
        """Forget all tokens, and give their memory back, where that is possible."""

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of every row, at least one."""

    def __call__(self, inputs_embeds: np.ndarray, mask: np.ndarray, rows: np.ndarray, wanted: int) -> np.ndarray:
        """Process tokens behind those that are in the cache.

        Args:
            inputs_embeds: `(batch, tokens, d_model)` float32.
            mask: `(batch, past + tokens)` int64, 0 for padding.
            rows: `(batch,)`, behind which row of the last call each row goes on.
            wanted: for how many last positions logits are wanted.

        Returns:
            `(batch, wanted, vocab_size)` float32. Those of padding mean nothing.
        """
