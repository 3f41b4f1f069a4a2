"""Rewrite prompts from every form that LLaVA code has used to the one that the model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch


# What the original code and the OpenVINO notebook write for an image (`IMAGE_TOKEN_INDEX` in `llava/constants.py`)
ORIGINAL_IMAGE_TOKEN_ID = -200

# From the runs of image tokens in all prompts, each with its token and its length, to the lengths of the images that
# each run stands for. `None` for a run that is left unchanged.
CountImages = Callable[[list[tuple[int, int]]], "list[list[int] | None]"]


def canonical_prompts(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    image_token_id: int,
    count_images: CountImages,
    border_ids: tuple[int, int] | None,
    pad_token_id: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Write each image as one `<image>` for each of its rows, without border tokens, and pad on the left.

    Accepts -200 for an image, one `<image>` for an image, and padding on either side. `<im_start>` and `<im_end>`
    around an image are removed, because the image features include them. Canonical prompts are returned unchanged.

    Args:
        input_ids, attention_mask: `(batch, tokens)`.
        count_images: [`equal_images`] or [`tiled_images`], with its first arguments.
        border_ids: Ids of `<im_start>` and `<im_end>`, if the model has them.

    Returns:
        `input_ids` and `attention_mask`, `(batch, tokens of the longest sequence)`.
    """
    sequences = [
        [(token, len(list(run))) for token, run in groupby(ids[mask.bool()].tolist())]
        for ids, mask in zip(input_ids, attention_mask)
    ]
    is_image = {image_token_id, ORIGINAL_IMAGE_TOKEN_ID}.__contains__
    images = iter(count_images([run for runs in sequences for run in runs if is_image(run[0])]))
    written = [
        _canonical_sequence(
            [(token, next(images) if is_image(token) else None, count) for token, count in runs],
            image_token_id,
            border_ids,
        )
        for runs in sequences
    ]
    length = max(len(sequence) for sequence in written)
    ids = torch.tensor([[pad_token_id] * (length - len(sequence)) + sequence for sequence in written])
    mask = torch.tensor([[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in written])
    return ids, mask


def equal_images(length: int, runs: Sequence[tuple[int, int]]) -> list[list[int] | None]:
    """Count images that all have `length` rows."""
    return [
        [length] * (count // length if token != ORIGINAL_IMAGE_TOKEN_ID and count % length == 0 else count)
        for token, count in runs
    ]


def tiled_images(
    lengths: Sequence[int], written: Sequence[int], runs: Sequence[tuple[int, int]]
) -> list[list[int] | None]:
    """Count images that are cut into tiles, from the last to the first.

    Runs before those of the given images are left unchanged: these images are in the cache. So are all runs if they do
    not stand for the given images; the error is raised where the images are merged.

    Args:
        lengths: Number of rows of each image.
        written: Number of `<image>` that the processor of transformers writes for each image, which may differ.
    """
    result: list[list[int] | None] = [None] * len(runs)
    end = len(lengths)
    for index in reversed(range(len(runs))):
        if end == 0:
            break
        token, count = runs[index]
        ones = [1] * len(lengths)
        ways = (ones,) if token == ORIGINAL_IMAGE_TOKEN_ID else (lengths, written, ones)
        start = next((start for way in ways if (start := _start_of_run(way[:end], count)) is not None), None)
        if start is None:
            break
        result[index] = list(lengths[start:end])
        end = start
    return result if end == 0 else [None] * len(runs)


def _start_of_run(lengths: Sequence[int], count: int) -> int | None:
    """Return from which image on the lengths add up to `count`; `None` if they do not."""
    start = len(lengths)
    while count > 0 and start > 0:
        start -= 1
        count -= lengths[start]
    return start if count == 0 else None


def _canonical_sequence(
    runs: Sequence[tuple[int, list[int] | None, int]], image_token_id: int, border_ids: tuple[int, int] | None
) -> list[int]:
    tokens: list[int | list[int]] = []  # a list stands for one whole image
    for token, images, count in runs:
        tokens += [token] * count if images is None else [[image_token_id] * length for length in images]

    canonical: list[int] = []
    for index, token_or_image in enumerate(tokens):
        if isinstance(token_or_image, list):
            canonical += token_or_image
        elif not _is_border_token(tokens, index, border_ids):
            canonical.append(token_or_image)
    return canonical


def _is_border_token(tokens: list[int | list[int]], index: int, border_ids: tuple[int, int] | None) -> bool:
    if border_ids is None:
        return False
    if tokens[index] == border_ids[0]:
        window = tokens[index : index + 3]
    elif tokens[index] == border_ids[1]:
        window = tokens[max(index - 2, 0) : index + 1]
    else:
        return False
    return len(window) == 3 and (window[0], window[2]) == border_ids and isinstance(window[1], list)
