"""Run original-format LLaVA checkpoints on OpenVINO, through Optimum.

Importing this package registers it with transformers and Optimum. The import is fast: heavy modules are imported only
when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from optimum_llava_ov.registration import activation


if TYPE_CHECKING:
    from optimum_llava_ov.checkpoint.families.mpt import LlavaMptConfig
    from optimum_llava_ov.errors import (
        BundleError,
        HubError,
        HubUnreachableError,
        ImageError,
        InvalidCheckpointError,
        UnsupportedCheckpointError,
    )
    from optimum_llava_ov.export.pipeline import main_export
    from optimum_llava_ov.images import ImageLimits
    from optimum_llava_ov.modeling import OVModelForLlava, OVModelForLlavaMPT
    from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration, OriginalLlavaForConditionalGeneration

_MODULE_OF = {
    "BundleError": "errors",
    "HubError": "errors",
    "HubUnreachableError": "errors",
    "ImageError": "errors",
    "ImageLimits": "images",
    "InvalidCheckpointError": "errors",
    "LlavaMptConfig": "checkpoint.families.mpt",
    "LlavaMptForConditionalGeneration": "models.llava",
    "OVModelForLlava": "modeling",
    "OVModelForLlavaMPT": "modeling",
    "OriginalLlavaForConditionalGeneration": "models.llava",
    "UnsupportedCheckpointError": "errors",
    "main_export": "export.pipeline",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


activation.activate()
