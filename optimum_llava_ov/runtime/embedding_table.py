"""Read embeddings of single tokens directly from the table.

A call of OpenVINO for one token takes a hundred times as long as the lookup itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino


SAMPLE = 16  # tokens whose embeddings are compared with OpenVINO's


class EmbeddingTable:
    """Look up embeddings of tokens.

    Args:
        weights: `(vocab_size, hidden_size)`, as the graph stores them.
        scale, zero_point: `(vocab_size, 1)`, for weights in 8 bits.
    """

    def __init__(self, weights: np.ndarray, scale: np.ndarray | None = None, zero_point: np.ndarray | None = None):
        self.weights, self.scale, self.zero_point = weights, scale, zero_point

    @classmethod
    def of(cls, model: openvino.Model, embed: Callable[[np.ndarray], np.ndarray]) -> EmbeddingTable | None:
        """Find the table in a graph.

        Args:
            embed: The compiled graph: `(1, tokens)` int64 -> `(1, tokens, hidden_size)` float32.

        Returns:
            `None` if the graph has another form, or if the results are not bit for bit those of the compiled graph.
        """
        table = _find(model)
        if table is None:
            return None
        sample = np.linspace(0, len(table.weights) - 1, SAMPLE).astype(np.int64)[None]
        return table if np.array_equal(table(sample), embed(sample)) else None

    def __call__(self, input_ids: np.ndarray) -> np.ndarray:
        """Return embeddings `(batch, tokens, hidden_size)` float32 of `(batch, tokens)` ids."""
        embeddings = self.weights[input_ids].astype(np.float32)
        if self.zero_point is not None:
            embeddings -= self.zero_point[input_ids].astype(np.float32)
        if self.scale is not None:
            embeddings *= self.scale[input_ids].astype(np.float32)
        return embeddings


def _find(model: openvino.Model) -> EmbeddingTable | None:
    """Find the form that NNCF and Optimum write: `Gather((Constant - Constant) * Constant)`, with any conversions."""
    gather = _source(model.outputs[0].get_node().input_value(0))
    if gather.get_type_name() != "Gather":
        return None
    node, scale, zero_point = _source(gather.input_value(0)), None, None
    if node.get_type_name() == "Multiply":
        node, scale = (_source(value) for value in node.input_values())
    if node.get_type_name() == "Subtract":
        node, zero_point = (_source(value) for value in node.input_values())
    constants = [constant for constant in (node, scale, zero_point) if constant is not None]
    if any(constant.get_type_name() != "Constant" for constant in constants):
        return None
    if node.get_element_type().get_type_name() not in ("f32", "f16", "i8", "u8") or len(node.get_output_shape(0)) != 2:
        return None
    vocab_size = node.get_output_shape(0)[0]
    if any(list(constant.get_output_shape(0)) != [vocab_size, 1] for constant in constants[1:]):
        return None
    return EmbeddingTable(
        node.data,
        None if scale is None else scale.data,
        None if zero_point is None else zero_point.data,
    )


def _source(value: openvino.Output) -> openvino.Node:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node
