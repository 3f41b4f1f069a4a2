"""Find the precisions of the weights in a graph, in bytes and as NNCF counts them in its bit width distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import openvino


# Types of the layers that NNCF compresses, and its names of precisions with and without a zero point
_LAYERS = ("MatMul", "Gather", "Convolution")
_ON_THE_WAY = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
_NNCF_NAMES = {"u8": "int8_asym", "i8": "int8_sym", "u4": "int4_asym", "i4": "int4_sym", "f4e2m1": "mxfp4"}
_FLOATS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
_COMPRESSED = (*_NNCF_NAMES, "nf4", "f8e4m3", "f8e5m2")


@dataclass(frozen=True)
class WeightShare:
    """Count the weights of one precision.

    Attributes:
        mode (`str`): precision as NNCF names it, such as `int4_asym, group size 128`; `fp16` for weights that are not
            compressed.
        parameters (`int`): number of weights.
        layers (`int`): number of layers.
    """

    mode: str
    parameters: int
    layers: int


def weight_shares(model: openvino.Model) -> list[WeightShare]:
    """Count the weights of matrix multiplications, convolutions and embedding tables by precision.

    Returns:
        The shares, the largest first.
    """
    parameters: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for constant, precision in _weights(model):
        if sum(side > 1 for side in constant.shape) >= 2 and _is_weight(constant):
            mode = _mode(precision, list(constant.shape))
            parameters[mode] += _size(constant)
            layers[mode] += 1
    return [WeightShare(mode, count, layers[mode]) for mode, count in parameters.most_common()]


def precision_of(shares: Sequence[WeightShare]) -> str:
    """Return the 4-bit precision of a model if it has one, else the precision of most weights, such as "int8"."""
    modes = [share.mode for share in shares]
    narrow = [mode for mode in modes if mode.startswith(("int4", "nf4", "mxfp4"))]
    return (narrow or modes or ["fp32"])[0].split(",")[0].split("_")[0]


def weight_bytes(model: openvino.Model) -> dict[str, int]:
    """Return the bytes of weights by precision, such as `{"u4": 1234, "u8": 567}`.

    Scales, zero points and small constants are not counted.
    """
    sizes: Counter[str] = Counter()
    for constant, precision in _weights(model):
        if constant.get_byte_size() >= 256:
            sizes[precision] += constant.get_byte_size()
    return dict(sizes)


def matmul_groups(model: openvino.Model) -> set[int]:
    """Return the group sizes of compressed matrix multiplications: numbers of weights that share a scale.

    Without groups, this is the length of a row.
    """
    return {
        constant.shape[-1]
        for constant, precision in _weights(model)
        if precision in _COMPRESSED and _is_weight(constant, ("MatMul",))
    }


def _weights(model: openvino.Model) -> Iterator[tuple[openvino.Node, str]]:
    """Yield constants that may be weights, with their precisions. Scales and zero points are skipped."""
    for op in model.get_ops():
        if op.get_type_name() == "Constant" and len(op.shape) >= 2 and not _is_scale(op):
            precision = op.get_element_type().get_type_name()
            if precision in _COMPRESSED or precision in _FLOATS:
                yield op, precision


def _mode(precision: str, shape: list[int]) -> str:
    if precision in _FLOATS:
        return _FLOATS[precision]
    # With groups, the shape is (rows, groups, columns of a group)
    grouping = f"group size {shape[-1]}" if len(shape) == 3 else "per-channel"
    return f"{_NNCF_NAMES.get(precision, precision)}, {grouping}"


def _size(constant: openvino.Node) -> int:
    size = 1
    for side in constant.shape:
        size *= side
    return size


def _is_scale(constant: openvino.Node) -> bool:
    """Return whether a constant is a scale or a zero point: their last dimension is 1."""
    return constant.shape[-1] == 1


def _is_weight(node: openvino.Node, layers: tuple[str, ...] = _LAYERS) -> bool:
    """Return whether a node is the weight of a layer, directly or through operations that decompress it."""
    for target in node.output(0).get_target_inputs():
        consumer = target.get_node()
        if consumer.get_type_name() in layers or (
            consumer.get_type_name() in _ON_THE_WAY and _is_weight(consumer, layers)
        ):
            return True
    return False
