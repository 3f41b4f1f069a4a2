"""Adapters to names of Optimum and NNCF that are not public. `registration/hooks.py` has the rest: what replaces something there.

`tests/test_host.py` names each of these and fails with what to do when a new version of Optimum has moved one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from importlib.metadata import version


logger = logging.getLogger(__name__)

SUPPORTED_OPTIMUM_INTEL = ">=2.2,<2.3"


def is_supported() -> bool:
    """Whether this version of optimum-intel is one we know. Says what to install if not."""
    from packaging.specifiers import SpecifierSet

    found = version("optimum-intel")
    if SpecifierSet(SUPPORTED_OPTIMUM_INTEL).contains(found, prereleases=True):
        return True
    logger.warning(
        "optimum-llava-ov %s does not know optimum-intel %s and stays out of its way: LLaVA-MPT checkpoints cannot be exported. "
        'Install a version it knows: pip install "optimum-intel%s"',
        version("optimum-llava-ov"),
        found,
        SUPPORTED_OPTIMUM_INTEL,
    )
    return False


def compress_weights(model, config, dataset=None):
    """NNCF's weight compression as Optimum configures it, runtime options of the graph included."""
    from optimum.intel.openvino.quantization import _weight_only_quantization

    return _weight_only_quantization(model, config, dataset, verify_not_optimized=False)


@contextlib.contextmanager
def compressing(keep):
    """While NNCF compresses, put each constant it makes through `keep`, which takes and returns an OpenVINO `Constant`."""
    from nncf.quantization.algorithms.weight_compression import openvino_backend as backend

    original = backend.create_ov_const_from_tensor
    backend.create_ov_const_from_tensor = lambda *args, **kwargs: keep(original(*args, **kwargs))
    try:
        yield
    finally:
        backend.create_ov_const_from_tensor = original


@contextlib.contextmanager
def exporting(transform=None, save_model=None):
    """While Optimum exports, skip the second trace and give each graph to `transform` before it is written.

    The second trace compares with the first: half of the export's time at 7B, and for graphs without branches no news.

    Args:
        transform: takes and returns an `openvino.Model`.
        save_model: writes it, in place of `openvino.save_model`.
    """
    from optimum.exporters.openvino import convert

    originals = convert._save_model, convert.allow_skip_tracing_check, convert.save_model

    @functools.wraps(convert._save_model)
    def save(model, *args, **kwargs):
        return originals[0](transform(model) if transform else model, *args, **kwargs)

    convert._save_model, convert.allow_skip_tracing_check = save, lambda *args: True
    convert.save_model = save_model or convert.save_model
    try:
        yield
    finally:
        convert._save_model, convert.allow_skip_tracing_check, convert.save_model = originals


def named_datasets() -> dict[str, dict]:
    """Data sets for vision-language models that Optimum knows by name: for each `id`, `split`, and `inputs` with its columns."""
    from optimum.intel.openvino.utils import PREDEFINED_VISUAL_LM_DATASETS

    return PREDEFINED_VISUAL_LM_DATASETS
