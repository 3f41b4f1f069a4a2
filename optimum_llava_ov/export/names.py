"""Names of the graph's nodes. GenAI looks for them when it applies a LoRA adapter."""

from __future__ import annotations

import openvino


_TRACED = "__module."  # the traced module, in names that OpenVINO's frontend gives


def name_after_module(graph: openvino.Model, module: str) -> None:
    """Let nodes tell that the traced module is a submodule of the whole model.

    GenAI applies an adapter's tensor to a matrix multiplication whose name contains the name of the tensor. PEFT names a tensor
    `transformer.blocks.0.attn.Wqkv` for the original code's class and for transformers' MPT, and
    `language_model.transformer.blocks.0.attn.Wqkv` for [`LlavaMptForConditionalGeneration`]. Both are in the new name.

    Args:
        module: name of the submodule, such as `language_model`.
    """
    for node in graph.get_ops():
        name = node.get_friendly_name()
        if name.startswith(_TRACED):
            node.set_friendly_name(f"{_TRACED}{module}.{name.removeprefix(_TRACED)}")
