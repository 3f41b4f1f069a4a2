"""Compress the weights of one part with NNCF."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nncf
import openvino

from optimum_llava_ov import host
from optimum_llava_ov.bundle.precision import matmul_groups, weight_bytes
from optimum_llava_ov.errors import BundleError


if TYPE_CHECKING:
    from optimum.intel import OVWeightQuantizationConfig


# Group sizes for dynamic quantization: OpenVINO quantizes a layer's input to integers, and each group has one scale.
# The default on CPU is 32. Larger groups are up to 1.4 times as fast, and their error is far smaller than the error of
# compressed weights (docs/performance.md). The size must divide the group size of the weights, or else OpenVINO
# computes in floats.
ACTIVATION_GROUPS = (128, 64)


def compress(
    model: openvino.Model, config: OVWeightQuantizationConfig, dataset: nncf.Dataset | None = None
) -> openvino.Model:
    """Compress the weights of one part, in place.

    Args:
        model: graph of the part.
        config: options of the compression.
        dataset: inputs of the part, for data-aware methods.

    Raises:
        [`BundleError`]: the weights are compressed already.
        `ValueError`: NNCF cannot compress the model with these options. For example, the group size does not divide
            the width of a layer.
    """
    if has_compressed_weights(model):
        raise BundleError(
            "These weights are compressed already. Compressing them again would lose quality without saving space. "
            "Start from the original checkpoint, or from a bundle exported with --weight-format fp16."
        )
    if dataset is not None:
        config = config.clone()
        config.num_samples = dataset.get_length()
    try:
        model = host.compress_weights(model, config, dataset)
    except (nncf.InvalidGroupSizeError, nncf.ParameterNotSupportedError, nncf.ValidationError) as error:
        raise ValueError(f"NNCF cannot compress the weights with these options: {error}") from error
    if config.dq_group_size is None:
        _choose_activation_groups(model)
    return model


def _choose_activation_groups(model: openvino.Model) -> None:
    """Write the largest fitting group size into the graph, for every engine. `ov_config` overrides it at load time."""
    groups = matmul_groups(model)
    fitting = [size for size in ACTIVATION_GROUPS if all(group % size == 0 for group in groups)]
    if groups and fitting:
        model.set_rt_info(str(fitting[0]), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def has_compressed_weights(model: openvino.Model) -> bool:
    """Return whether NNCF or another tool has compressed the weights of a model."""
    return model.has_rt_info(["nncf", "weight_compression"]) or any(
        name not in ("f32", "f16", "bf16") for name in weight_bytes(model)
    )
