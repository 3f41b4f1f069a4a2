"""Call private functions of Optimum and NNCF. Only this module and `registration/hooks.py` use private names.

`tests/test_host.py` lists these names. If a new version of Optimum moves one, the tests fail and say what to do.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from importlib.metadata import version

from packaging.specifiers import SpecifierSet


logger = logging.getLogger(__name__)

SUPPORTED_OPTIMUM_INTEL = ">=2.2,<2.3"


def is_supported() -> bool:
    """Return whether the installed version of optimum-intel is supported. Log what to install if it is not."""
    found = version("optimum-intel")
    if SpecifierSet(SUPPORTED_OPTIMUM_INTEL).contains(found, prereleases=True):
        return True
    logger.warning(
        "optimum-llava-ov %s does not support optimum-intel %s, so LLaVA checkpoints cannot be exported. "
        'Install a supported version: pip install "optimum-intel%s"',
        version("optimum-llava-ov"),
        found,
        SUPPORTED_OPTIMUM_INTEL,
    )
    return False


def compress_weights(model, config, dataset=None):
    """Compress weights with NNCF as Optimum does. This also sets the runtime options of the graph."""
    from optimum.intel.openvino.quantization import _weight_only_quantization

    return _weight_only_quantization(model, config, dataset, verify_not_optimized=False)


@contextlib.contextmanager
def compressing(keep, changed, value=lambda constant: None):
    """Let NNCF save memory in this context.

    Args:
        keep: takes and returns each OpenVINO `Constant` that NNCF makes.
        changed: takes NNCF's function that compresses a weight, and returns the one to call instead.
        value: takes each `Constant` whose weight NNCF reads, and returns an `openvino.Tensor` that it reads instead;
            `None` if it should read the constant.
    """
    from nncf.quantization.algorithms.weight_compression import openvino_backend as backend

    names = "create_ov_const_from_tensor", "compress_weight", "get_const_value_as_ov_tensor"
    make_constant, compress_weight, read = originals = [getattr(backend, name) for name in names]

    def read_value(constant):
        tensor = value(constant)
        return read(constant) if tensor is None else tensor

    backend.create_ov_const_from_tensor = lambda *args, **kwargs: keep(make_constant(*args, **kwargs))
    backend.compress_weight = changed(compress_weight)
    backend.get_const_value_as_ov_tensor = read_value
    try:
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(backend, name, original)


@contextlib.contextmanager
def exporting(transform=None, save_model=None):
    """Let Optimum skip the second trace and pass each graph to `transform` before it writes the graph.

    Optimum traces twice to compare both graphs. This takes half of the export's time at 7B, and graphs without
    branches are always equal.

    Args:
        transform: function that takes and returns an `openvino.Model`.
        save_model: function that writes the graph, instead of `openvino.save_model`.
    """
    from optimum.exporters.openvino import convert

    originals = convert._save_model, convert.allow_skip_tracing_check, convert.save_model
    # Optimum gives transformers' masks an old argument, of which transformers warns
    masks = logging.getLogger("transformers.masking_utils")
    level = masks.level
    masks.setLevel(logging.ERROR)

    @functools.wraps(convert._save_model)
    def save(model, *args, **kwargs):
        return originals[0](transform(model) if transform else model, *args, **kwargs)

    convert._save_model, convert.allow_skip_tracing_check = save, lambda *args: True
    convert.save_model = save_model or convert.save_model
    try:
        yield
    finally:
        convert._save_model, convert.allow_skip_tracing_check, convert.save_model = originals
        masks.setLevel(level)


def named_datasets() -> dict[str, dict]:
    """Return Optimum's data sets for vision-language models: name -> `id`, `split` and `inputs` (columns)."""
    from optimum.intel.openvino.utils import PREDEFINED_VISUAL_LM_DATASETS

    return PREDEFINED_VISUAL_LM_DATASETS
