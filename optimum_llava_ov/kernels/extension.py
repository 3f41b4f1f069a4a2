"""Build the operation of `matmul.cpp` into a graph.

On processors with AVX2 and without VNNI (desktops of Intel up to the 10th generation, Zen 1 to 3 of AMD), OpenVINO's
kernels unpack weights to float and multiply in float. `matmul.cpp` rounds activations to 8 bits and multiplies bytes,
as llama.cpp does. OpenVINO runs it as an extension. Where the library was not built, or the processor has VNNI, the
kernels of OpenVINO run.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino
from openvino.utils.node_factory import NodeFactory

from optimum_llava_ov.system.machine import cpu_features


logger = logging.getLogger(__name__)

MATMUL_KERNEL = "MATMUL_KERNEL"
AUTO, OPENVINO, AVX2 = KERNELS = ("auto", "openvino", "avx2")
LIBRARY = Path(__file__).parent / "matmul.so"
_OPERATION = "CompressedMatMul"
_BITS = {openvino.Type.u4: 4, openvino.Type.i4: 4, openvino.Type.u8: 8, openvino.Type.i8: 8}
_SIGNED = (openvino.Type.i4, openvino.Type.i8)
_MULTIPLE = 32  # of the columns of a group: what the kernel multiplies at once


class _Weights(NamedTuple):
    constants: list[openvino.Node]  # values, scales and, if the values are unsigned, zero points
    rows: int
    bits: int
    group_size: int


def uses_extension(kernel: str, device: str, ov_config: dict[str, str]) -> bool:
    """Return whether the operation of this package multiplies compressed weights.

    Args:
        kernel: "avx2" (this package's), "openvino", or "auto": this package's where it is faster.
        ov_config: Options of OpenVINO. Those that ask for exact activations choose OpenVINO's kernel.

    Raises:
        `ValueError`: There is no such kernel, or "avx2" cannot run here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"{MATMUL_KERNEL} is {kernel!r}. Expected one of {', '.join(map(repr, KERNELS))}.")
    if kernel == AVX2 and (problem := why_not() or _why_not_on(device)):
        raise ValueError(f"{MATMUL_KERNEL} is {AVX2!r}, but {problem}. Use {OPENVINO!r} or {AUTO!r}.")
    if kernel != AUTO:
        return kernel == AVX2
    is_exact = str(ov_config.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == "0" or str(
        ov_config.get("EXECUTION_MODE_HINT")
    ).upper().endswith("ACCURACY")
    return not is_exact and is_faster() and not _why_not_on(device)


def is_faster() -> bool:
    """Return whether this package's kernel can run, and OpenVINO has no kernel for this processor that is as fast."""
    return lacks_fast_kernel() and why_not() is None


def lacks_fast_kernel() -> bool:
    """Return whether the processor has AVX2, but nothing that OpenVINO multiplies bytes with."""
    features = cpu_features()
    return "avx2" in features and not any("vnni" in name or name.startswith("amx") for name in features)


@functools.cache
def why_not() -> str | None:
    """Return why this package's kernel cannot run on this machine; `None` if it can."""
    if "avx2" not in cpu_features():
        return "the processor does not have AVX2"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built when this package was installed, which needs a C++ compiler and Linux"
    try:
        _factory()
    except (OSError, RuntimeError) as error:
        return f"OpenVINO cannot load {LIBRARY.name}: {error}"
    return None


def _why_not_on(device: str) -> str | None:
    return None if device.upper() == "CPU" else f"it runs on CPU, and the device is {device}"


@functools.cache
def _factory() -> NodeFactory:
    """Load the library. It finds OpenVINO and oneTBB in this process, whatever their patch version is."""
    libraries = Path(openvino.__file__).parent / "libs"
    for name in ("libopenvino.so.*", "libtbb.so.*"):
        ctypes.CDLL(str(next(libraries.glob(name), name)), mode=ctypes.RTLD_GLOBAL)
    factory = NodeFactory()
    factory.add_extension(str(LIBRARY))
    return factory


def with_compressed_matmuls(model: openvino.Model) -> openvino.Model:
    """Return a graph in which this package's operation multiplies with compressed weights.

    Its activations are rounded to 8 bits in groups of up to 128, as OpenVINO does on processors with VNNI. The weights
    are those of `model`, not copies. Matrices that the kernel cannot read are left as they are.
    """
    source, model = model, model.clone()
    count = 0
    for node in model.get_ops():
        weights = _weights_of(node) if node.get_type_name() == "MatMul" else None
        if weights is None:
            continue
        inputs = [node.input_value(0), *(_bytes(constant, weights.rows) for constant in weights.constants)]
        attributes = {"bits": weights.bits, "group_size": weights.group_size}
        product = _factory().create(_OPERATION, inputs, attributes)
        product.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(product.output(0))
        count += 1
    model.validate_nodes_and_infer_types()
    logger.info("%d matrices are multiplied by %s.", count, LIBRARY.name)
    return model if count else source


def _weights_of(matmul: openvino.Node) -> _Weights | None:
    """Return the compressed weights of a multiplication `x @ weights.T`, if the kernel can read them."""
    attributes = matmul.get_attributes()
    if attributes["transpose_a"] or not attributes["transpose_b"]:
        return None
    node = _without(matmul.input_value(1).get_node(), "Convert", "Reshape")
    if node.get_type_name() != "Multiply" or matmul.input_value(0).get_element_type() != openvino.Type.f32:
        return None
    values, scales, zero_points = node.input_value(0).get_node(), _constant(node.input_value(1)), None
    if values.get_type_name() == "Subtract":
        zero_points = _constant(_without(values.input_value(1).get_node(), "Convert").output(0))
        values = values.input_value(0).get_node()
        if zero_points is None:
            return None
    values = _constant(_without(values, "Convert").output(0))
    shape = matmul.input_value(1).get_partial_shape()
    if values is None or scales is None or shape.is_dynamic or len(shape) != 2:
        return None
    rows, columns = (size.get_length() for size in shape)
    *outer, group_size = values.get_output_shape(0)
    kind = values.get_output_element_type(0)
    is_known = (
        kind in _BITS
        and (kind in _SIGNED) == (zero_points is None)
        and (zero_points is None or zero_points.get_output_element_type(0) == kind)
        and scales.get_output_element_type(0) == openvino.Type.f16
        and all(list(one.get_output_shape(0)) == [*outer, 1] for one in (scales, zero_points) if one is not None)
        and [*outer, group_size] in ([rows, columns], [rows, columns // group_size, group_size])
        and group_size % _MULTIPLE == 0
    )
    constants = [one for one in (values, scales, zero_points) if one is not None]
    return _Weights(constants, rows, _BITS[kind], group_size) if is_known else None


def _without(node: openvino.Node, *types: str) -> openvino.Node:
    """Skip operations of these types, from a node to its first input."""
    while node.get_type_name() in types:
        node = node.input_value(0).get_node()
    return node


def _constant(output: openvino.Output) -> openvino.Node | None:
    node = output.get_node()
    return node if node.get_type_name() == "Constant" else None


def _bytes(constant: openvino.Node, rows: int) -> openvino.Output:
    """Return the bytes of a constant, `(rows, bytes of a row)` uint8. OpenVINO would convert other types.

    With an odd number of zero points in 4 bits, two rows share a byte: then the shape is `(1, bytes)`.
    """
    array = np.asarray(_Memory(constant))
    shape = (rows if array.size % rows == 0 else 1, -1)
    return openvino.op.Constant(array.reshape(shape), shared_memory=True).output(0)


class _Memory:
    """The memory of a constant, without its type. OpenVINO shares only arrays that numpy takes for writable."""

    def __init__(self, constant: openvino.Node):
        self._constant = constant  # owns the memory
        data = constant.data
        address, _ = data.__array_interface__["data"]
        self.__array_interface__ = {"shape": (data.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
