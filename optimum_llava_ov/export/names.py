"""Name the nodes of a graph, so that GenAI finds them when it applies a LoRA adapter."""

from __future__ import annotations

import openvino


_TRACED = "__module."  # prefix for the traced module, in names from OpenVINO's frontend


def name_after_module(graph: openvino.Model, module: str) -> None:
    """Add the name of the traced submodule to the names of its nodes.

    GenAI applies a tensor of an adapter to a matrix multiplication whose name contains the name of the tensor. PEFT
    names a tensor `transformer.blocks.0.attn.Wqkv` for the original code's class and for transformers' MPT, and
    `language_model.transformer.blocks.0.attn.Wqkv` for our torch model. The new name contains both.

    Args:
        graph: graph of the submodule.
        module: name of the submodule, such as `language_model`.
    """
    for node in graph.get_ops():
        name = node.get_friendly_name()
        if name.startswith(_TRACED):
            node.set_friendly_name(f"{_TRACED}{module}.{name.removeprefix(_TRACED)}")
