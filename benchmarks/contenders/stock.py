"""Run optimum-intel's own class on the same bundle, in a process without this package."""

from __future__ import annotations

from optimum.intel import OVModelForVisualCausalLM
from transformers import AutoProcessor

from contenders import Job
from contenders.transformers_style import TransformersContender


def load(job: Job) -> TransformersContender:
    model = OVModelForVisualCausalLM.from_pretrained(job.paths["bundle"], ov_config=job.ov_config)
    if type(model).__name__ != "_OVLlavaForCausalLM":
        raise RuntimeError(f"Found {type(model).__name__}. Expected optimum-intel's _OVLlavaForCausalLM.")
    return TransformersContender(
        model, AutoProcessor.from_pretrained(job.paths["bundle"]), model.get_vision_embeddings
    )
