"""Embeddings of single tokens, straight from the table: a call of OpenVINO for one row costs a hundred times what the row costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino


SAMPLE = 16  # rows that are compared


class EmbeddingTable:
    """
    Args:
        weights: `(vocab_size, d_model)`, as the graph stores them.
        scale, zero_point: of each row, `(vocab_size, 1)` or less, for weights in 8 bits.
    """

    def __init__(self, weights: np.ndarray, scale: np.ndarray | None = None, zero_point: np.ndarray | None = None):
        self.weights, self.scale, self.zero_point = weights, scale, zero_point

    @classmethod
    def of(cls, model: openvino.Model, embed: Callable[[np.ndarray], np.ndarray]) -> EmbeddingTable | None:
        """The table in a graph, if it is of a kind known here, and gives bit for bit what the compiled graph gives.

        Args:
            embed: the compiled graph: `(1, tokens)` int64 -> `(1, tokens, d_model)` float32.
        """
        table = _find(model)
        if table is None:
            return None
        sample = np.linspace(0, len(table.weights) - 1, SAMPLE).astype(np.int64)[None]
        return table if np.array_equal(table(sample), embed(sample)) else None

    def __call__(self, input_ids: np.ndarray) -> np.ndarray:
        """`(batch, tokens)` -> `(batch, tokens, d_model)` float32."""
        rows = self.weights[input_ids].astype(np.float32)
        if self.zero_point is not None:
            rows -= self.zero_point[input_ids].astype(np.float32)
        if self.scale is not None:
            rows *= self.scale[input_ids].astype(np.float32)
        return rows


def _find(model: openvino.Model) -> EmbeddingTable | None:
    """What NNCF and Optimum make of an embedding: `Gather((Constant - Constant) * Constant)`, with conversions anywhere."""
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
    rows = node.get_output_shape(0)[0]
    if any(list(constant.get_output_shape(0)) != [rows, 1] for constant in constants[1:]):
        return None
    return EmbeddingTable(*(constant if constant is None else constant.data for constant in (node, scale, zero_point)))


def _source(value: openvino.Output) -> openvino.Node:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node
