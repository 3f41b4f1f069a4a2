"""The language model on paged attention: no padding is computed, no row twice, and of a prompt only the half of the scores that is seen.

With a mask for ALiBi, OpenVINO's other attention does not know that it is causal. On CPU; GenAI's default backend is the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import sha256

import numpy as np
import openvino

from optimum_llava_ov.runtime.graph import LOGIT_POSITIONS
from optimum_llava_ov.runtime.paged_cache import BLOCK, PagedCache


# What is computed on the way to the logits takes memory for so many tokens. All of 2,000 tokens at once are 1 % faster and take 0.1 GB
# more, at 1.3B.
TOKENS_PER_CALL = 1024


class PagedDecoder:
    """
    Args:
        compiled: of [`paged`] and [`with_logit_positions`] along axis 0.
    """

    attention_backend = "PA"  # GenAI's name
    first_chunk_size = chunk_size = 512  # 2 % slower than all at once

    def __init__(self, compiled: openvino.CompiledModel):
        self.request = compiled.create_infer_request()
        self._cache = PagedCache(self.request)
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
        sequences = list(inputs_embeds) if is_whole else [row[tokens] for row, tokens in zip(inputs_embeds, is_token)]
        skipped = is_token[:, : length - logits_to_keep].sum(axis=1)
        run = self._run if past.any() or batch_size == 1 else self._run_alike
        logits = run(sequences, skipped)
        if is_whole:
            return np.stack(logits) if batch_size > 1 else logits[0][None]
        padded = np.zeros((batch_size, logits_to_keep, self._vocab_size), dtype=np.float32)
        for row, values in enumerate(logits):
            padded[row, is_token[row, length - logits_to_keep :]] = values
        return padded

    def _run_alike(self, sequences: Sequence[np.ndarray], skipped: np.ndarray) -> list[np.ndarray]:
        """Sequences that begin, without doing anything twice: rows that are equal, as those of beams, and what all rows begin with."""
        which = _numbered((sha256(sequence).digest(), int(count)) for sequence, count in zip(sequences, skipped))
        _, first = np.unique(which, return_index=True)
        sequences, skipped = [sequences[row] for row in first], skipped[first]
        if shared := min(_common_length(sequences), *skipped) // BLOCK * BLOCK if len(sequences) > 1 else 0:
            self._cache.begin(1)
            self._run([sequences[0][:shared]], np.array([shared]))
            self._cache.reorder(np.zeros(len(sequences), dtype=np.int64))
            sequences, skipped = [sequence[shared:] for sequence in sequences], skipped - shared
        else:
            self._cache.begin(len(sequences))
        logits = self._run(sequences, skipped)
        self._cache.reorder(which)
        return [logits[number] for number in which]

    def _run(self, sequences: Sequence[np.ndarray], skipped: np.ndarray) -> list[np.ndarray]:
        """Process `(tokens, d_model)` of every row. Logits, without those of the first `skipped` tokens."""
        nothing = np.empty((0, self._vocab_size), dtype=np.float32)
        logits: list[list[np.ndarray]] = [[] for _ in sequences]
        for pieces in _pieces([len(sequence) for sequence in sequences]):
            inputs_embeds = [sequences[row][start:stop] for row, start, stop in pieces]
            begins = np.cumsum([0, *map(len, inputs_embeds)], dtype=np.int32)
            wanted = [
                np.arange(begin + max(skipped[row] - start, 0), end)
                for (row, start, _), begin, end in zip(pieces, begins, begins[1:])
            ]
            values = self._infer(
                np.concatenate(inputs_embeds), [row for row, _, _ in pieces], begins, np.concatenate(wanted)
            )
            for (row, _, _), part in zip(
                pieces, np.split(values, np.cumsum([len(positions) for positions in wanted])[:-1])
            ):
                if len(part):
                    logits[row].append(part)
        return [parts[0] if len(parts) == 1 else np.concatenate([nothing, *parts]) for parts in logits]

    def _infer(
        self, inputs_embeds: np.ndarray, rows: Sequence[int], begins: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """One call. `inputs_embeds` are those of rows, one behind the other; logits `(positions, vocab_size)` are of its positions."""
        past = self._cache.lengths[rows]
        for row, tokens in zip(rows, np.diff(begins)):
            self._cache.extend(row, int(tokens))
        blocks, block_begins = self._cache.blocks(rows)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "past_lens": past,
            "subsequence_begins": begins,
            "block_indices": blocks,
            "block_indices_begins": block_begins,
            "max_context_len": self._cache.lengths[rows].max(),
            LOGIT_POSITIONS: positions if len(positions) else np.zeros(1, dtype=np.int64),
        }
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        logits = self.request.get_tensor("logits").data
        return logits.reshape(-1, logits.shape[-1])[
            : len(positions)
        ].copy()  # the request overwrites its output at the next call


def _pieces(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Parts of sequences, as `(row, start, stop)`, at most `TOKENS_PER_CALL` tokens at a time."""
    pieces, room = [], TOKENS_PER_CALL
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            pieces.append((row, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], TOKENS_PER_CALL
    if pieces:
        yield pieces


def _numbered(values: Iterable[Hashable]) -> np.ndarray:
    """Each value's number: the same for equal ones, counted in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _common_length(sequences: Sequence[np.ndarray]) -> int:
    """How many first elements all have in common."""
    first, *others = sequences
    shortest = min(map(len, sequences))
    differs = np.zeros(shortest, dtype=bool)
    for other in others:
        differs |= (first[:shortest] != other[:shortest]).any(axis=1)
    return int(differs.argmax()) if differs.any() else shortest
