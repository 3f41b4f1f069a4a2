"""Compare prompts with what is in a cache, so that only the rest of a prompt is computed.

A prompt is compared by its keys: for each position, the id of the token, or the digest of the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence

import torch


Key = int | str


def prompt_keys(
    input_ids: Sequence[int], image_token_id: int, lengths: Sequence[int], digests: Sequence[str]
) -> list[Key] | None:
    """Return the keys of a prompt.

    Args:
        input_ids: one `<image>` for each row of each image.
        lengths: number of rows of each image.
        digests: digest of each image.

    Returns:
        `None` if the prompt has another number of rows.
    """
    if sum(lengths) != sum(token == image_token_id for token in input_ids):
        return None
    rows = _repeated(digests, lengths)
    return [next(rows) if token == image_token_id else token for token in input_ids]


def _repeated(digests: Sequence[str], lengths: Sequence[int]) -> Iterator[str]:
    for digest, length in zip(digests, lengths):
        yield from [digest] * length


def digest_of(pixel_values: torch.Tensor, size: Hashable = None) -> str:
    """Return a hash of the pixels of an image, or of its tiles and its size."""
    values = pixel_values.float().contiguous().numpy()
    digest = hashlib.sha256(repr((values.shape, size)).encode())
    digest.update(values)
    return digest.hexdigest()


def common_prefix(first: Sequence, second: Sequence) -> int:
    """Return the number of leading items that are the same in both sequences."""
    pairs = enumerate(zip(first, second))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def reusable(cached: Sequence[Key], prompt: Sequence[Key]) -> int:
    """Return how many cached tokens a prompt can continue. It does not end inside an image, and one token is left."""
    return start_of_image(prompt, min(common_prefix(cached, prompt), len(prompt) - 1))


def start_of_image(keys: Sequence[Key], position: int) -> int:
    """Return `position`, or the first position of an image that contains it."""
    while 0 < position < len(keys) and _continues_image(keys, position):
        position -= 1
    return position


def end_of_image(keys: Sequence[Key], position: int) -> int:
    """Return `position`, or the first position after an image that contains it."""
    while position < len(keys) and _continues_image(keys, position):
        position += 1
    return position


def _continues_image(keys: Sequence[Key], position: int) -> bool:
    return isinstance(keys[position], str) and keys[position] == keys[position - 1]
