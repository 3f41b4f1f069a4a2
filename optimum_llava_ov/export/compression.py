"""One part, from the traced graph to compressed weights, through NNCF."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openvino

from optimum_llava_ov import host
from optimum_llava_ov.bundle.weights import weight_bytes
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
