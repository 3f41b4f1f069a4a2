"""One part, from the traced graph to compressed weights, through NNCF."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nncf
import openvino

from optimum_llava_ov import host
from optimum_llava_ov.bundle.precision import matmul_groups, weight_bytes
from optimum_llava_ov.errors import BundleError


if TYPE_CHECKING:
    from optimum.intel import OVWeightQuantizationConfig


# How many numbers of a layer's input share a scale when OpenVINO multiplies them, as integers, with compressed weights. Its own
# choice on CPU is 32. Larger groups are up to 1.4 times as fast, and what they lose is far less than what the weights have lost
# (docs/performance.md). Groups that do not divide those of the weights are worse than none: OpenVINO then computes in floats.
ACTIVATION_GROUPS = (128, 64)


def compress(
    model: openvino.Model, config: OVWeightQuantizationConfig, dataset: nncf.Dataset | None = None
) -> openvino.Model:
    """Compress the weights of one part, in place.

    Args:
        dataset: inputs of this part, for methods that look at activations.

    Raises:
        [`BundleError`]: the weights are compressed already.
        `ValueError`: NNCF cannot compress this model so, such as in groups of a size that does not divide its layers' inputs.
    """
    if has_compressed_weights(model):
        raise BundleError(
            "These weights are compressed already, and compressing them again would lose quality without saving space. Start from the "
            "original checkpoint, or from a bundle exported with --weight-format fp16."
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
    """Written into the graph, so that every engine profits. Who loads it can choose otherwise, in `ov_config`."""
    groups = matmul_groups(model)
    fitting = [size for size in ACTIVATION_GROUPS if all(group % size == 0 for group in groups)]
    if groups and fitting:
        model.set_rt_info(str(fitting[0]), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def has_compressed_weights(model: openvino.Model) -> bool:
    """Whether NNCF, or another tool, has compressed this model's weights."""
    return model.has_rt_info(["nncf", "weight_compression"]) or any(
        name not in ("f32", "f16", "bf16") for name in weight_bytes(model)
    )
