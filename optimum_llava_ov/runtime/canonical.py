"""Rewrite prompts from every form that LLaVA code has used to the one that the model takes."""

from __future__ import annotations

from itertools import groupby

import torch


# What the original code and the OpenVINO notebook write for an image (`IMAGE_TOKEN_INDEX` in `llava/constants.py`)
ORIGINAL_IMAGE_TOKEN_ID = -200


def canonical_prompts(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    image_token_id: int,
    image_seq_length: int,
    border_ids: tuple[int, int] | None,
    pad_token_id: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Write each image as `image_seq_length` times `<image>`, without border tokens, and pad on the left.

    Accepts -200 for an image, one `<image>` for an image, and padding on either side. `<im_start>` and `<im_end>`
    around an image are removed, because the image features include them. Canonical prompts are returned unchanged.

    Args:
        input_ids, attention_mask: `(batch, tokens)`.
        border_ids: Ids of `<im_start>` and `<im_end>`, if the model has them.

    Returns:
        `input_ids` and `attention_mask`, `(batch, tokens of the longest sequence)`.
    """
    sequences = [
        _canonical_sequence(ids[mask.bool()].tolist(), image_token_id, image_seq_length, border_ids)
        for ids, mask in zip(input_ids, attention_mask)
    ]
    length = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[pad_token_id] * (length - len(sequence)) + sequence for sequence in sequences])
    mask = torch.tensor([[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    return ids, mask


def _canonical_sequence(
    sequence: list[int], image_token_id: int, image_seq_length: int, border_ids: tuple[int, int] | None
) -> list[int]:
    tokens: list[int | None] = []  # None stands for one whole image
    for token, run in groupby(sequence):
        count = len(list(run))
        if token == ORIGINAL_IMAGE_TOKEN_ID:
            tokens += [None] * count
        elif token == image_token_id:
            tokens += [None] * (count // image_seq_length if count % image_seq_length == 0 else count)
        else:
            tokens += [token] * count

    canonical: list[int] = []
    for index, token_or_image in enumerate(tokens):
        if token_or_image is None:
            canonical += [image_token_id] * image_seq_length
        elif not _is_border_token(tokens, index, border_ids):
            canonical.append(token_or_image)
    return canonical


def _is_border_token(tokens: list[int | None], index: int, border_ids: tuple[int, int] | None) -> bool:
    if border_ids is None:
        return False
    if tokens[index] == border_ids[0]:
        window = tokens[index : index + 3]
    elif tokens[index] == border_ids[1]:
        window = tokens[max(index - 2, 0) : index + 1]
    else:
        return False
    return window == [border_ids[0], None, border_ids[1]]
