"""The interface of decoders: a request of the compiled language model, and its cache of keys and values."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import openvino


class Decoder(Protocol):
    """Compute logits from embeddings, and keep keys and values.

    Attributes:
        attention_backend (`str`): `"PA"` (paged attention) or `"SDPA"` (the attention of the bundle's graph).
        request (`openvino.InferRequest`): Runs the graph.
        first_chunk_size, chunk_size (`int`): Number of tokens to give in one call when a prompt is processed in
            chunks.
    """

    attention_backend: str
    request: openvino.InferRequest
    first_chunk_size: int
    chunk_size: int

    def __init__(self, compiled: openvino.CompiledModel) -> None: ...

    def begin(self, batch_size: int) -> None:
        """Forget all tokens, and expect a new batch."""

    def free(self) -> None:
        """Forget all tokens, and free their memory where that is possible."""

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens of each sequence, at least one."""

    def __call__(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, beam_idx: np.ndarray, logits_to_keep: int
    ) -> np.ndarray:
        """Process tokens after those that are in the cache.

        Args:
            inputs_embeds: `(batch, tokens, hidden_size)` float32.
            attention_mask: `(batch, past + tokens)` int64, 0 for padding.
            beam_idx: `(batch,)`. For each sequence, the sequence of the previous call that it continues.
            logits_to_keep: Number of last positions to compute logits for.

        Returns:
            `(batch, logits_to_keep, vocab_size)` float32. Logits of padding are undefined.
        """
