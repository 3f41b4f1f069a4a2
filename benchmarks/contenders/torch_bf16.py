"""Run the torch model in bf16, from the original checkpoint."""

from __future__ import annotations

from transformers import AutoProcessor

from contenders import Job
from contenders.transformers_style import TransformersContender
from optimum_llava_ov import LlavaMptForConditionalGeneration


def load(job: Job) -> TransformersContender:
    model = LlavaMptForConditionalGeneration.from_pretrained(job.paths["checkpoint"], dtype="bfloat16")
    return TransformersContender(model, AutoProcessor.from_pretrained(job.paths["bundle"]), model.get_image_features)
