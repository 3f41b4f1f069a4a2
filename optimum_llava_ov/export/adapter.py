"""Write the LoRA of a fine-tune to a file that OpenVINO GenAI adds to a bundle at run time."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optimum_llava_ov.checkpoint.merge import LowRank
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, check_checkpoint_options
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import UnsupportedCheckpointError


_PREFIX = "base_model.model."  # GenAI removes it, and looks for the rest in the names of the graph's nodes


def export_adapter(
    name_or_path: str | Path | Repository, output: str | Path, model_kwargs: dict[str, Any] | None = None, **kwargs
) -> int:
    """Write the LoRA of a fine-tune's language model to a safetensors file for `openvino_genai.Adapter`.

    GenAI does not read a scale, so the matrices contain it: the weight of the adapter is 1. The file belongs to a
    bundle that was exported with `lora="separate"`, which holds all else that was trained.

    Args:
        name_or_path: folder or model id of the fine-tune.
        output: file to write. It must not exist.
        model_kwargs: options of the fine-tune, as for [`main_export`].
        kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

    Returns:
        The number of layers that the adapter changes.

    Raises:
        `FileExistsError`: the file exists already.
        [`UnsupportedCheckpointError`]: there is no LoRA in the language model.
        [`InvalidCheckpointError`], [`HubError`]: as for [`main_export`].
    """
    check_checkpoint_options(model_kwargs)
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already. Choose another name, or delete it first.")
    checkpoint = OriginalCheckpoint.open(name_or_path, **(model_kwargs or {}), **kwargs)
    if not checkpoint.separate_lora:
        raise UnsupportedCheckpointError(
            f"{checkpoint.repository.name!r} has no LoRA of a language model, which is all that GenAI adds at run "
            "time. Export it as a whole: optimum-cli export openvino."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, updates in checkpoint.separate_lora.items():
        # The graph's head has a row more, for `<image>`
        rows = checkpoint.config.vocab_size if name == "lm_head.weight" else None
        a, b = _joined(updates, rows)
        module = f"{_PREFIX}{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    partial = output.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return len(checkpoint.separate_lora)


def _joined(updates: Sequence[LowRank], rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices whose product is the sum of the updates, each with its scale.

    They stay in 16 bits if this loses nothing: a scale that is a power of two only changes exponents.

    Args:
        rows: number of rows of the product; zeros are added.
    """
    a = torch.cat([update.a.float() for update in updates])
    b = torch.cat([update.scale * update.b.float() for update in updates], dim=1)
    if rows is not None and rows > len(b):
        b = torch.cat([b, b.new_zeros(rows - len(b), b.shape[1])])
    for dtype in {update.a.dtype for update in updates} - {torch.float32}:
        if torch.equal(a, a.to(dtype).float()) and torch.equal(b, b.to(dtype).float()):
            return a.to(dtype).contiguous(), b.to(dtype).contiguous()
    return a.contiguous(), b.contiguous()
