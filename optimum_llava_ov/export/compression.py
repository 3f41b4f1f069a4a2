"""One part, from the traced graph to compressed weights, through NNCF."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import openvino

from optimum_llava_ov import host
from optimum_llava_ov.errors import BundleError


if TYPE_CHECKING:
    import nncf
    from optimum.intel import OVWeightQuantizationConfig


def compress(model: openvino.Model, config: OVWeightQuantizationConfig, dataset: nncf.Dataset | None = None) -> openvino.Model:
    """Compress the weights of one part, in place.

    Args:
        dataset: inputs of this part, for methods that look at activations.

    Raises:
        [`BundleError`]: the weights are compressed already.
    """
    if has_compressed_weights(model):
        raise BundleError(
            "These weights are compressed already, and compressing them again would lose quality without saving space. Start from the "
            "original checkpoint, or from a bundle exported with --weight-format fp16."
        )
    if dataset is not None:
        config = config.clone()
        config.num_samples = dataset.get_length()
    return host.compress_weights(model, config, dataset)


def has_compressed_weights(model: openvino.Model) -> bool:
    """Whether NNCF, or another tool, has compressed this model's weights."""
    return model.has_rt_info(["nncf", "weight_compression"]) or any(
        name not in ("f32", "f16", "bf16") for name in weight_bytes(model)
    )


def weight_bytes(model: openvino.Model) -> dict[str, int]:
    """Bytes of weights by precision, such as `{"u4": 1234, "u8": 567}`. Scales, zero points and small constants are left out."""
    sizes: Counter[str] = Counter()
    for op in model.get_ops():
        if op.get_type_name() != "Constant" or len(op.shape) < 2:
            continue
        precision = op.get_element_type().get_type_name()
        if precision in _WEIGHT_PRECISIONS and op.get_byte_size() >= 256 and not _is_scale(op):
            sizes[precision] += op.get_byte_size()
    return dict(sizes)


_WEIGHT_PRECISIONS = ("f32", "f16", "bf16", "i8", "u8", "i4", "u4", "nf4", "f4e2m1", "f8e4m3", "f8e5m2")


def _is_scale(constant: openvino.Node) -> bool:
    """Scales and zero points reach the weight through Subtract or Multiply with a last dimension of 1."""
    return constant.shape[-1] == 1
