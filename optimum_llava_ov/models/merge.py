"""Merge images into the sequence of embeddings, and check images and token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch


def merge_image_features(
    input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: Sequence[torch.Tensor], image_token_id: int
) -> torch.Tensor:
    """Replace the embeddings of `<image>` by the image features, in order.

    Args:
        input_ids: `(batch, tokens)`.
        inputs_embeds: `(batch, tokens, hidden_size)` float.
        image_features: `(num_image_tokens, hidden_size)` float for each image.

    Raises:
        `ValueError`: the prompts expect another number of images.
    """
    is_image = input_ids == image_token_id
    check_image_count(is_image, image_features)
    rows = torch.cat(list(image_features)) if len(image_features) else inputs_embeds.new_empty(0)
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), rows.to(inputs_embeds.dtype))


def check_image_count(is_image: torch.Tensor, image_features: Sequence[torch.Tensor]) -> None:
    """
    Args:
        is_image: `(batch, tokens)` bool, true for `<image>`.
        image_features: `(num_image_tokens, hidden_size)` float for each image.

    Raises:
        `ValueError`: other images were given than the prompts expect. The message says both.
    """
    num_tokens, num_features = int(is_image.sum()), sum(len(image) for image in image_features)
    if num_tokens == num_features:
        return
    places, given = f"{num_tokens} image tokens", f"{len(image_features)} image(s) with {num_features}"
    if isinstance(image_features, torch.Tensor):  # all images have the same number of tokens
        num_image_tokens, given = image_features.shape[1], f"{len(image_features)} image(s)"
        is_whole = num_tokens % num_image_tokens == 0
        number = f"{num_tokens // num_image_tokens}" if is_whole else f"{num_tokens / num_image_tokens:.2f}"
        places = f"{number} image(s)"
    raise ValueError(
        f"The prompt has places for {places}, but {given} were given. Write `<image>` once for each image, and let "
        "the processor see the prompt and the images together: `processor(text=prompt, images=images, "
        "return_tensors='pt')`."
    )


def check_token_ids(input_ids: torch.Tensor, num_embeddings: int, others: Collection[int] = ()) -> None:
    """
    Args:
        input_ids: `(batch, tokens)`.
        num_embeddings: number of rows of the embedding table.
        others: ids that are allowed too.

    Raises:
        `ValueError`: an id is not in the table. The message says which id, and which ids are expected.
    """
    if not input_ids.numel():
        return
    lowest, highest = input_ids.aminmax()
    if int(lowest) >= 0 and int(highest) < num_embeddings:  # the only check in most steps of `generate`
        return
    is_wrong = (input_ids < 0) | (input_ids >= num_embeddings)
    for other in others:
        is_wrong &= input_ids != other
    if not is_wrong.any():
        return
    row, column = is_wrong.nonzero()[0].tolist()
    also = f", or {', '.join(map(str, others))} for an image" if others else ""
    raise ValueError(
        f"input_ids has {int(input_ids[row, column])} at position {column} of row {row}. Expected ids from 0 to "
        f"{num_embeddings - 1}{also}. Make the prompt with the processor of the same model."
    )
