"""Keep the keys and values of a batch: what transformers calls `past_key_values`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch


if TYPE_CHECKING:
    from optimum_llava_ov.runtime.decoder import Decoder
    from optimum_llava_ov.runtime.prefix import Key


class DecoderCache:
    """Keep the cache of one batch, inside a request of the compiled language model.

    `generate` and `forward` take it as `past_key_values`, and continue after its tokens. It has the methods of
    [`~transformers.Cache`] that `generate` calls.

    Args:
        decoder ([`Decoder`]): Owns the request. No other cache may use it.

    Attributes:
        lock (`threading.RLock`): Held while a thread computes with the cache.
    """

    is_compileable = False

    def __init__(self, decoder: Decoder):
        self.lock = threading.RLock()
        self._decoder: Decoder | None = decoder
        self._length = self._batch_size = 0
        self._beam_idx: np.ndarray | None = None
        self._keys: list[Key] = []

    @property
    def keys(self) -> list[Key]:
        """Return what the tokens in the cache are: ids, and digests of images.

        Empty if it is not known, or if the cache has several sequences. See [`runtime/prefix.py`].
        """
        is_known = self._batch_size == 1 and self._beam_idx is None and len(self._keys) == self._length
        return self._keys if is_known else []

    @property
    def decoder(self) -> Decoder:
        """Return the decoder.

        Raises:
            `ValueError`: The request computes another batch now.
        """
        if self._decoder is None:
            raise ValueError(
                "past_key_values belong to an earlier prompt, and the model has begun another prompt since. Leave out "
                "past_key_values and give the whole prompt. Or give each conversation its own cache, as "
                "model.new_cache() and model.chat() do."
            )
        return self._decoder

    def replaced(self, length: int = 0) -> DecoderCache:
        """Return a cache on the same request with the first `length` tokens. This cache cannot be used any more.

        Args:
            length: up to the number of [`keys`].
        """
        other = DecoderCache(self.decoder)
        other.lock = self.lock
        if length:
            other._length, other._batch_size, other._keys = self._length, self._batch_size, self._keys
            other.crop(length)
        self._decoder = None
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens in each sequence, padding included. It is the same for all layers."""
        _ = self.decoder  # raises an error if the request computes another batch now
        return self._length

    @property
    def chunk_size(self) -> int:
        """Return how many tokens the next call should process.

        A long prompt is processed in chunks, so that it can be cancelled between two of them.
        """
        return self.decoder.chunk_size if self._length else self.decoder.first_chunk_size

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens of each sequence, padding included."""
        if max_length < self.get_seq_length():
            self.decoder.crop(self._length - max_length)
            self._length = max_length
            del self._keys[max_length:]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Continue sequence `beam_idx[i]` as sequence `i` from the next call on.

        Args:
            beam_idx: `(batch,)`.
        """
        self._keys = []  # of several sequences
        self._beam_idx = np.asarray(beam_idx)
        self._batch_size = len(self._beam_idx)

    def begin(self, batch_size: int) -> None:
        """Forget all tokens, and expect a new batch."""
        self.decoder.begin(batch_size)
        self._length, self._batch_size, self._beam_idx, self._keys = 0, batch_size, None, []

    def reset(self) -> None:
        """Forget all tokens, and free their memory."""
        self.decoder.free()
        self._length, self._batch_size, self._beam_idx, self._keys = 0, 0, None, []

    def extend(self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, logits_to_keep: int) -> np.ndarray:
        """Process tokens after those that are in the cache. Arguments and result are those of [`Decoder`].

        Raises:
            `ValueError`: The batch size differs from that of the cache.
        """
        batch_size, length = inputs_embeds.shape[:2]
        if batch_size != self._batch_size:
            raise ValueError(
                f"The cache has {self._batch_size} sequence(s), but new tokens of {batch_size} sequence(s) were given."
            )
        beam_idx = np.arange(batch_size) if self._beam_idx is None else self._beam_idx
        logits = self.decoder(inputs_embeds, attention_mask, beam_idx, logits_to_keep)
        self._length, self._beam_idx = self._length + length, None
        return logits

    def name_tokens(self, keys: Sequence[Key]) -> None:
        """Say what the tokens in the cache are, from the first one on, for [`keys`]."""
        self._keys = list(keys[: self._length])
