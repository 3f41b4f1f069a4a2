"""Run the language model with paged attention, on CPU. GenAI's default backend is the same.

Padding is not computed, equal sequences are computed once, and of a prompt's attention scores only the causal half.
OpenVINO's other attention computes both halves, because it cannot see that a mask with ALiBi is causal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import sha256

import numpy as np
import openvino

from optimum_llava_ov.runtime.graph import LOGIT_POSITIONS, POSITION_IDS
from optimum_llava_ov.runtime.paged_cache import BLOCK, PagedCache


# Limits the memory of a call. At 1.3B, 2,000 tokens in one call are 1 % faster and take 0.1 GB more.
TOKENS_PER_CALL = 1024


class PagedDecoder:
    """Compute logits with paged attention. See [`Decoder`].

    Args:
        compiled: The graph that [`paged`] and [`with_logit_positions`] along axis 0 return.
    """

    attention_backend = "PA"  # GenAI's name
    first_chunk_size = chunk_size = 512  # 2 % slower than all at once

    def __init__(self, compiled: openvino.CompiledModel):
        self.request = compiled.create_infer_request()
        self._cache = PagedCache(self.request)
        self._has_positions = any(POSITION_IDS in port.get_names() for port in compiled.inputs)
        self._vocab_size = compiled.output("logits").get_partial_shape()[-1].get_length()

    def begin(self, batch_size: int) -> None:
        self._cache.begin(batch_size)

    def free(self) -> None:
        self._cache.free()

    def crop(self, tokens: int) -> None:
        self._cache.crop(tokens)

    def __call__(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, beam_idx: np.ndarray, logits_to_keep: int
    ) -> np.ndarray:
        batch_size, length = inputs_embeds.shape[:2]
        is_token = attention_mask != 0
        past, cached = is_token[:, :-length].sum(axis=1), self._cache.lengths[beam_idx]
        if not np.array_equal(past, cached):
            raise ValueError(
                f"attention_mask shows {past.tolist()} earlier tokens, but the cache holds {cached.tolist()}."
            )
        self._cache.reorder(beam_idx)
        is_token = is_token[:, -length:]
        is_whole = is_token.all()
        sequences = (
            list(inputs_embeds)
            if is_whole
            else [sequence[tokens] for sequence, tokens in zip(inputs_embeds, is_token)]
        )
        num_without_logits = is_token[:, : length - logits_to_keep].sum(axis=1)
        run = self._run if past.any() or batch_size == 1 else self._run_without_repeats
        logits = run(sequences, num_without_logits)
        if is_whole:
            return np.stack(logits) if batch_size > 1 else logits[0][None]
        padded = np.zeros((batch_size, logits_to_keep, self._vocab_size), dtype=np.float32)
        for index, values in enumerate(logits):
            padded[index, is_token[index, length - logits_to_keep :]] = values
        return padded

    def _run_without_repeats(
        self, sequences: Sequence[np.ndarray], num_without_logits: np.ndarray
    ) -> list[np.ndarray]:
        """Process new sequences. Compute equal sequences (beams) once, and the common beginning of all once."""
        which = _number(
            (sha256(sequence.data).digest(), int(count)) for sequence, count in zip(sequences, num_without_logits)
        )
        _, first = np.unique(which, return_index=True)
        sequences, num_without_logits = [sequences[index] for index in first], num_without_logits[first]
        shared = 0
        if len(sequences) > 1:
            shared = min(_common_length(sequences), *num_without_logits) // BLOCK * BLOCK
        if shared:
            self._cache.begin(1)
            self._run([sequences[0][:shared]], np.array([shared]))
            self._cache.reorder(np.zeros(len(sequences), dtype=np.int64))
            sequences = [sequence[shared:] for sequence in sequences]
            num_without_logits = num_without_logits - shared
        else:
            self._cache.begin(len(sequences))
        logits = self._run(sequences, num_without_logits)
        self._cache.reorder(which)
        return [logits[number] for number in which]

    def _run(self, sequences: Sequence[np.ndarray], num_without_logits: np.ndarray) -> list[np.ndarray]:
        """Process `(tokens, hidden_size)` of each sequence.

        Returns:
            Logits `(tokens, vocab_size)` of each sequence, without those of its first `num_without_logits` tokens.
        """
        no_logits = np.empty((0, self._vocab_size), dtype=np.float32)
        logits: list[list[np.ndarray]] = [[] for _ in sequences]
        for pieces in _pieces([len(sequence) for sequence in sequences]):
            inputs_embeds = [sequences[index][start:stop] for index, start, stop in pieces]
            begins = np.cumsum([0, *map(len, inputs_embeds)], dtype=np.int32)
            positions = [
                np.arange(begin + max(num_without_logits[index] - start, 0), end)
                for (index, start, _), begin, end in zip(pieces, begins, begins[1:])
            ]
            indices = [index for index, _, _ in pieces]
            values = self._infer(np.concatenate(inputs_embeds), indices, begins, np.concatenate(positions))
            parts = np.split(values, np.cumsum([len(part) for part in positions])[:-1])
            for index, part in zip(indices, parts):
                if len(part):
                    logits[index].append(part)
        return [parts[0] if len(parts) == 1 else np.concatenate([no_logits, *parts]) for parts in logits]

    def _infer(
        self, inputs_embeds: np.ndarray, indices: Sequence[int], begins: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Run the graph once.

        Args:
            inputs_embeds: `(tokens, hidden_size)`, the new tokens of several sequences, concatenated.
            indices: Which sequences these are.
            begins: Position at which the tokens of each sequence begin, and the end of the last.
            positions: Positions to compute logits for.

        Returns:
            Logits `(positions, vocab_size)`.
        """
        past = self._cache.lengths[indices]
        for index, tokens in zip(indices, np.diff(begins)):
            self._cache.extend(index, int(tokens))
        blocks, block_begins = self._cache.blocks(indices)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "past_lens": past,
            "subsequence_begins": begins,
            "block_indices": blocks,
            "block_indices_begins": block_begins,
            "max_context_len": self._cache.lengths[indices].max(),
            LOGIT_POSITIONS: positions if len(positions) else np.zeros(1, dtype=np.int64),
        }
        if self._has_positions:
            new = [np.arange(start, self._cache.lengths[index]) for start, index in zip(past, indices)]
            inputs[POSITION_IDS] = np.concatenate(new).astype(np.int64)
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        logits = self.request.get_tensor("logits").data
        # Copy, because the request overwrites its output in the next call
        return logits.reshape(-1, logits.shape[-1])[: len(positions)].copy()


def _pieces(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Split sequences into pieces `(index, start, stop)`, and yield up to `TOKENS_PER_CALL` tokens at a time."""
    pieces, room = [], TOKENS_PER_CALL
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            pieces.append((index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], TOKENS_PER_CALL
    if pieces:
        yield pieces


def _number(values: Iterable[Hashable]) -> np.ndarray:
    """Number values in the order of their first occurrence. Equal values get the same number."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _common_length(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the longest common prefix."""
    first, *others = sequences
    shortest = min(map(len, sequences))
    differs = np.zeros(shortest, dtype=bool)
    for other in others:
        differs |= (first[:shortest] != other[:shortest]).any(axis=1)
    return int(differs.argmax()) if differs.any() else shortest
