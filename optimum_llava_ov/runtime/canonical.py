"""Prompts in every spelling that LLaVA code has used, brought to the one the model runs on."""

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
    """Rows in which each image is `image_seq_length` times `<image>`, without borders around, padded on the left.

    Understands: -200 for an image; one `<image>` for an image; `<im_start>` and `<im_end>` spelled out, which are part of the
    image's rows already; padding on either side. Rows that are canonical come back unchanged.

    Args:
        input_ids, attention_mask: `(batch, tokens)`.
        border_ids: ids of `<im_start>` and `<im_end>`, if the model has them.

    Returns:
        `input_ids` and `attention_mask`, `(batch, longest row)`.
    """
    rows = [
        _canonical_row(ids[mask.bool()].tolist(), image_token_id, image_seq_length, border_ids)
        for ids, mask in zip(input_ids, attention_mask)
    ]
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _canonical_row(
    row: list[int], image_token_id: int, image_seq_length: int, border_ids: tuple[int, int] | None
) -> list[int]:
    tokens: list[int | None] = []  # None is one whole image
    for token, run in groupby(row):
        count = len(list(run))
        if token == ORIGINAL_IMAGE_TOKEN_ID:
            tokens += [None] * count
        elif token == image_token_id:
            tokens += [None] * (count // image_seq_length if count % image_seq_length == 0 else count)
        else:
            tokens += [token] * count

    canonical: list[int] = []
    for index, token in enumerate(tokens):
        if token is None:
            canonical += [image_token_id] * image_seq_length
        elif not _is_spelled_border(tokens, index, border_ids):
            canonical.append(token)
    return canonical


def _is_spelled_border(tokens: list[int | None], index: int, border_ids: tuple[int, int] | None) -> bool:
    if border_ids is None:
        return False
    if tokens[index] == border_ids[0]:
        window = tokens[index : index + 3]
    elif tokens[index] == border_ids[1]:
        window = tokens[max(index - 2, 0) : index + 1]
    else:
        return False
    return window == [border_ids[0], None, border_ids[1]]
