"""Load the torch model's weights from a checkpoint without copying them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import InvalidCheckpointError
from optimum_llava_ov.models.mpt import head_bias


if TYPE_CHECKING:
    from optimum_llava_ov.models.llava_mpt import LlavaMptForConditionalGeneration

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_weights(model: LlavaMptForConditionalGeneration, checkpoint: OriginalCheckpoint) -> None:
    """Set the parameters of a model on the `meta` device to the memory-mapped tensors of a checkpoint.

    Only the embedding table is copied, to append a row for `<image>` (412 MB at 7B in fp16). The head shares the copy.

    Raises:
        [`InvalidCheckpointError`]: a tensor is missing, is not expected, is not of a float type, or its shape does not
            fit the configuration.
    """
    state_dict = _language_tensors(checkpoint)
    state_dict.update(_vision_tensors(checkpoint, model))
    _check_tensors(checkpoint, model, state_dict)
    model.load_state_dict(state_dict, assign=True)
    _materialize_buffers(model)


def _language_tensors(checkpoint: OriginalCheckpoint) -> dict[str, torch.Tensor]:
    config, head = checkpoint.config, "language_model.lm_head"
    state_dict = {}
    for name, tensor in checkpoint.tensors().items():
        short = name.removeprefix("transformer.")
        if short.startswith("mm_projector."):
            state_dict[f"image_encoder.projector.{short.removeprefix('mm_projector.')}"] = tensor
        elif short == "wte.weight":
            is_padded = tensor.shape[:1] == (config.padded_vocab_size,)
            state_dict[f"{head}.weight"] = tensor[: config.image_token_id] if is_padded else tensor
        else:
            state_dict[f"language_model.transformer.{short}"] = tensor

    table = state_dict.get(f"{head}.weight")
    if table is not None and table.shape == (config.image_token_id, config.d_model):
        if config.num_border_tokens:
            state_dict["image_encoder.borders"] = table[[config.im_start_token_id, config.im_end_token_id]]
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        state_dict |= {
            "embed_tokens.weight": table,
            f"{head}.weight": table,
            f"{head}.bias": head_bias(len(table), table.dtype),
        }
    return state_dict


def _vision_tensors(
    checkpoint: OriginalCheckpoint, model: LlavaMptForConditionalGeneration
) -> dict[str, torch.Tensor]:
    expected = dict(model.image_encoder.features.named_parameters())
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in checkpoint.vision_tensors().items()}
    # The layers after the selected one are not part of the model.
    return {f"image_encoder.features.{name}": tensor for name, tensor in tensors.items() if name in expected}


def _check_tensors(checkpoint: OriginalCheckpoint, model: LlavaMptForConditionalGeneration, state_dict: dict) -> None:
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


def _materialize_buffers(model: LlavaMptForConditionalGeneration) -> None:
    """Non-persistent buffers are not in a checkpoint. CLIP has one: the positions 0, 1, 2, ..."""
    embeddings = model.image_encoder.features.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).unsqueeze(0)
