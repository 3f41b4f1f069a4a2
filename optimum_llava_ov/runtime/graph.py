"""Rewrite the language model's graph for `generate`. The computation stays the same.

Each function returns a copy that shares the weights. The loaded graph does not change, so that it can be saved and
compressed.
"""

from __future__ import annotations

import logging

import numpy as np
import openvino
from openvino import opset8 as ops
from openvino._offline_transformations import paged_attention_transformation


logger = logging.getLogger(__name__)

LOGIT_POSITIONS = "logit_positions"
POSITION_IDS = "position_ids"
# Operations of a block after its attention that process each position separately
POSITIONWISE = ("Add", "Convert", "Divide", "Gelu", "MVN", "MatMul", "Multiply", "Power", "Sqrt", "Swish")
_ALIBI_SLOPES = 11  # input of PagedAttention; openvino/core/dev_api/openvino/op/paged_attention.hpp


def paged(model: openvino.Model) -> openvino.Model | None:
    """Return the graph with paged attention, as GenAI's default backend uses it. Its cache is a set of inputs.

    Sequences of any lengths are concatenated: `inputs_embeds` is `(tokens, hidden_size)`, `logits` is
    `(tokens, 1, vocab_size)`.

    Returns:
        `None` if OpenVINO does not recognize this graph's attention, or if it drops ALiBi, which it does silently.
    """
    needs_alibi = not uses_position_ids(model)
    model = model.clone()
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        logger.debug("No paged attention: %s", error)
        return None
    attentions = [node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    has_alibi = all(list(node.get_input_shape(_ALIBI_SLOPES)) != [0] for node in attentions)
    return model if attentions and (has_alibi or not needs_alibi) and not model.get_sinks() else None


def uses_position_ids(model: openvino.Model) -> bool:
    """Return whether the graph reads the positions of tokens. A model with ALiBi only has the input."""
    return any(port.get_target_inputs() for port in model.inputs if POSITION_IDS in port.get_names())


def with_logit_positions(model: openvino.Model, axis: int) -> openvino.Model:
    """Return a graph that computes logits of some positions only.

    The new input `logit_positions`, `(positions,)` int64, names the positions along `axis`. At 7B the output matrix
    has 200 million numbers and the logits of one position take 200 KB, and `generate` needs one of the thousands of
    positions of a prompt. The last block after its attention is also computed for these positions only. Inputs that no
    node uses (`position_ids`) are removed.
    """
    model = model.clone()
    positions = ops.parameter([-1], np.int64, name=LOGIT_POSITIONS)
    positions.output(0).get_tensor().set_names({LOGIT_POSITIONS})
    gathered: dict[str, openvino.Node] = {}
    tail = _positionwise_tail(model)
    for node in tail.values():
        for port in node.inputs():
            source = port.get_source_output()
            name = source.get_node().get_friendly_name()
            if name not in tail and _has_positions(source):
                gathered[name] = gathered.get(name) or ops.gather(source, positions, ops.constant(np.array(axis)))
                port.replace_source_output(gathered[name].output(0))
    model.add_parameters([positions])
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _positionwise_tail(model: openvino.Model) -> dict[str, openvino.Node]:
    """Return nodes, by name, that process each position separately and whose results are used by the logits only."""
    tail = {node.get_friendly_name(): node for node in model.get_results()}
    for node in reversed(model.get_ordered_ops()):
        if _is_positionwise(node) and _has_positions(node.output(0)):
            consumers = {port.get_node().get_friendly_name() for port in node.output(0).get_target_inputs()}
            if consumers <= tail.keys():
                tail[node.get_friendly_name()] = node
    return tail


def _is_positionwise(node: openvino.Node) -> bool:
    if node.get_type_name() == "ReduceMean":  # of RMSNorm, over the features of a position
        axes, rank = node.input_value(1).get_node(), node.input_value(0).get_partial_shape().rank.get_length()
        return axes.get_type_name() == "Constant" and [axis % rank for axis in axes.data.ravel()] == [rank - 1]
    return node.get_type_name() in POSITIONWISE


def _has_positions(output: openvino.Output) -> bool:
    """Return whether the output depends on the inputs. The shapes of what depends on weights alone are static."""
    return output.get_partial_shape().is_dynamic
