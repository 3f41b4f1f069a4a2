"""Images into the sequence of embeddings, and checks of what they are put into."""

from __future__ import annotations

from collections.abc import Collection

import torch


def merge_image_features(
    input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """Replace the embeddings of `<image>` by the rows of the images, in order.

    Args:
        input_ids: `(batch, tokens)`.
        inputs_embeds: `(batch, tokens, d_model)` float.
        image_features: `(images, rows, d_model)` float.

    Raises:
        `ValueError`: the prompts have places for another number of images.
    """
    is_image = input_ids == image_token_id
    check_image_count(is_image, image_features)
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_features.to(inputs_embeds.dtype))


def check_image_count(is_image: torch.Tensor, image_features: torch.Tensor) -> None:
    """
    Args:
        is_image: `(batch, tokens)` bool, true where a row of an image goes.
        image_features: `(images, rows, d_model)`.

    Raises:
        `ValueError`: says how many images there are places for, and how many were given.
    """
    num_tokens, (num_images, rows) = int(is_image.sum()), image_features.shape[:2]
    if num_tokens == num_images * rows:
        return
    places = f"{num_tokens // rows}" if num_tokens % rows == 0 else f"{num_tokens / rows:.2f}"
    raise ValueError(
        f"The prompt has places for {places} image(s), but {num_images} image(s) were given. Write `<image>` once for "
        "each image, "
        "and let the processor see the prompt and the images together: `processor(text=prompt, images=images, "
        "return_tensors='pt')`."
    )


def check_token_ids(input_ids: torch.Tensor, num_embeddings: int, others: Collection[int] = ()) -> None:
    """
    Args:
        input_ids: `(batch, tokens)`.
        num_embeddings: rows of the embedding table.
        others: ids that are understood too.

    Raises:
        `ValueError`: an id has no row in the table. Says which id, and which ids there are.
    """
    if not input_ids.numel():
        return
    lowest, highest = input_ids.aminmax()
    if int(lowest) >= 0 and int(highest) < num_embeddings:  # all there is to do in a step of `generate`
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
