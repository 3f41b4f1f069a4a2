"""What is compiled in place of the language model's graph: the same computation, arranged for `generate`.

Each function gives a copy that shares the weights. The graph that was loaded stays as it is, for saving and compressing.
"""

from __future__ import annotations

import logging

import numpy as np
import openvino
from openvino import opset8 as ops
from openvino._offline_transformations import paged_attention_transformation


logger = logging.getLogger(__name__)

LOGIT_POSITIONS = "logit_positions"
POSITIONWISE = ("Add", "Convert", "Gelu", "MVN", "MatMul", "Multiply")  # all that a block has after its attention
_ALIBI_SLOPES = 11  # input of PagedAttention; openvino/core/dev_api/openvino/op/paged_attention.hpp


def paged(model: openvino.Model) -> openvino.Model | None:
    """The graph with paged attention, whose cache is a set of inputs, as GenAI's default backend has it.

    Sequences of any lengths come one behind the other: `inputs_embeds` is `(tokens, d_model)`, `logits` `(tokens, 1, vocab_size)`.

    Returns:
        `None` where OpenVINO does not know this graph's attention, or would leave out its ALiBi, which it does without a word.
    """
    model = model.clone()
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        logger.debug("No paged attention: %s", error)
        return None
    attentions = [node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    has_alibi = all(list(node.get_input_shape(_ALIBI_SLOPES)) != [0] for node in attentions)
    return model if attentions and has_alibi and not model.get_sinks() else None


def with_logit_positions(model: openvino.Model, axis: int) -> openvino.Model:
    """Logits of some positions only: those in the new input `logit_positions`, `(positions,)` int64, along an axis.

    The last matrix is 200 million numbers at 7B, and a row of logits is 200 KB; `generate` needs one row of a prompt's thousands.
    What else serves these logits alone, the last block after its attention, is computed for these positions alone, too.
    An input that nothing consumes, `position_ids`, is left out.
    """
    model = model.clone()
    positions = ops.parameter([-1], np.int64, name=LOGIT_POSITIONS)
    positions.output(0).get_tensor().set_names({LOGIT_POSITIONS})
    cut: dict[str, openvino.Node] = {}
    tail = _positionwise_tail(model)
    for node in tail.values():
        for port in node.inputs():
            source = port.get_source_output()
            name = source.get_node().get_friendly_name()
            if name not in tail and _has_positions(source):
                cut[name] = cut.get(name) or ops.gather(source, positions, ops.constant(np.array(axis)))
                port.replace_source_output(cut[name].output(0))
    model.add_parameters([positions])
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _positionwise_tail(model: openvino.Model) -> dict[str, openvino.Node]:
    """Nodes, by name, that treat every position by itself and whose results go into the logits and nowhere else."""
    tail = {node.get_friendly_name(): node for node in model.get_results()}
    for node in reversed(model.get_ordered_ops()):
        if node.get_type_name() in POSITIONWISE and _has_positions(node.output(0)):
            consumers = {port.get_node().get_friendly_name() for port in node.output(0).get_target_inputs()}
            if consumers <= tail.keys():
                tail[node.get_friendly_name()] = node
    return tail


def _has_positions(output: openvino.Output) -> bool:
    """Whether it is made of what comes in, not of weights alone: their shapes are known."""
    return output.get_partial_shape().is_dynamic
