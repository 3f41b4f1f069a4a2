"""Load the torch model's weights from a checkpoint without copying them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import InvalidCheckpointError
from optimum_llava_ov.models.head import head_bias
from optimum_llava_ov.models.language import compute_buffers
from optimum_llava_ov.system.memory import empty_tensor


if TYPE_CHECKING:
    from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration

_TABLE, _HEAD, _BIAS = "embed_tokens.weight", "language_model.lm_head.weight", "language_model.lm_head.bias"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_weights(model: OriginalLlavaForConditionalGeneration, checkpoint: OriginalCheckpoint) -> None:
    """Set the parameters of a model on the `meta` device to the memory-mapped tensors of a checkpoint.

    Only the embedding table and the head are copied, to append a row for `<image>` (262 MB each for LLaMA 7B in fp16,
    918 MB for Yi 34B). With a `workspace` of the checkpoint, the copies are in mapped files there. A tied head shares
    the table's copy.

    Raises:
        [`InvalidCheckpointError`]: a tensor is missing, is not expected, is not of a float type, or its shape does not
            fit the configuration.
    """
    state_dict = _language_tensors(checkpoint)
    if model.image_newline is None:  # stored, but the original does not use it
        state_dict.pop("image_newline", None)
    state_dict.update(_vision_tensors(checkpoint, model))
    _check_tensors(checkpoint, model, state_dict)
    model.load_state_dict(state_dict, assign=True)
    compute_buffers(model.language_model)
    # A non-persistent buffer of CLIP: the positions 0, 1, 2, ...
    embeddings = model.image_encoder.features.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).unsqueeze(0)


def _language_tensors(checkpoint: OriginalCheckpoint) -> dict[str, torch.Tensor]:
    config = checkpoint.config
    state_dict: dict[str, torch.Tensor] = {}
    is_tied = config.text_config.tie_word_embeddings
    for name, tensor in checkpoint.tensors().items():
        short = name.removeprefix(config.prefix)
        if short.startswith("mm_projector."):
            state_dict[f"image_encoder.projector.{short.removeprefix('mm_projector.')}"] = tensor
        elif short == "image_newline":
            state_dict[short] = tensor
        elif short == config.table:
            state_dict[_TABLE] = tensor
        elif name == "lm_head.weight":
            state_dict[_HEAD] = tensor
        else:
            state_dict[f"language_model.{config.prefix}{short}"] = tensor
    if config.num_border_tokens and _is_table(state_dict.get(_TABLE), config):
        state_dict["image_encoder.borders"] = state_dict[_TABLE][[config.im_start_token_id, config.im_end_token_id]]
    for name in (_TABLE,) if is_tied else (_TABLE, _HEAD):
        if (table := state_dict.get(name)) is not None and _is_table(table, config):
            state_dict[name] = _resized(table[: config.num_known_tokens], config.vocab_size, checkpoint.workspace)
    if is_tied and _TABLE in state_dict:  # a stored head is not used
        state_dict[_HEAD] = state_dict[_TABLE]
    if (head := state_dict.get(_HEAD)) is not None:
        state_dict[_BIAS] = head_bias(config.vocab_size, config.num_known_tokens, head.dtype)
    return state_dict


def _resized(table: torch.Tensor, rows: int, workspace: Path | None) -> torch.Tensor:
    """Copy a table, and append rows of zeros. With a `workspace`, the copy is in a mapped file there."""
    shape = torch.Size([rows, table.shape[1]])
    copy = empty_tensor(shape, table.dtype, workspace)
    copy[: len(table)] = table
    copy[len(table) :] = 0
    return copy


def _is_table(tensor: torch.Tensor | None, config: OriginalLlavaConfig) -> bool:
    """Return whether a tensor has a row for each token, padding included or not."""
    return tensor is not None and tensor.shape in (
        (config.padded_vocab_size, config.text_config.hidden_size),
        (config.num_known_tokens, config.text_config.hidden_size),
    )


def _vision_tensors(
    checkpoint: OriginalCheckpoint, model: OriginalLlavaForConditionalGeneration
) -> dict[str, torch.Tensor]:
    expected = dict(model.image_encoder.features.named_parameters())
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in checkpoint.vision_tensors().items()}
    # The layers after the selected one are not part of the model.
    return {f"image_encoder.features.{name}": tensor for name, tensor in tensors.items() if name in expected}


def _check_tensors(
    checkpoint: OriginalCheckpoint, model: OriginalLlavaForConditionalGeneration, state_dict: dict
) -> None:
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    problems = [f"missing: {name}" for name in expected if name not in state_dict]
    problems += [f"not expected: {name}" for name in state_dict if name not in expected]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    problems += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected fp16, bf16 or fp32"
        for name, tensor in state_dict.items()
        if tensor.dtype not in DTYPES
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InvalidCheckpointError(
            f"The weights of {checkpoint.repository.name!r} (vision tower: {checkpoint.vision_repository.name!r}) do "
            f"not fit their configuration: {shown}. Check that all files come from the same checkpoint and the same "
            "revision."
        )
