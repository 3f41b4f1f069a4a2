"""Run `OVModelForLlava` on the bundle."""

from __future__ import annotations

from transformers import AutoProcessor

from contenders import Job
from contenders.transformers_style import TransformersContender
from optimum_llava_ov import OVModelForLlava


def load(job: Job) -> TransformersContender:
    model = OVModelForLlava.from_pretrained(job.paths["bundle"], ov_config=job.ov_config)
    return TransformersContender(model, AutoProcessor.from_pretrained(job.paths["bundle"]), model.get_image_features)
