"""Run `OVModelForLlava` on the bundle.

It does not see that features of the processor are hidden (`engines.py --avx2`), so it is told the kernel.
"""

from __future__ import annotations

import os

from transformers import AutoProcessor

from contenders import Job
from contenders.transformers_style import TransformersContender
from optimum_llava_ov import OVModelForLlava


def load(job: Job) -> TransformersContender:
    kernel = {"MATMUL_KERNEL": "avx2"} if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" else {}
    model = OVModelForLlava.from_pretrained(job.paths["bundle"], ov_config={**job.ov_config, **kernel})
    return TransformersContender(model, AutoProcessor.from_pretrained(job.paths["bundle"]), model.get_image_features)
