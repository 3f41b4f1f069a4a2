"""How near the logits of each setting are to those of torch, as the documentation says it."""

import pytest
import torch
from conftest import EXAMPLES
from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import LlavaMptForConditionalGeneration, OVModelForLlavaMPT


F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # else processors with bf16 compute in it
F32_CACHE = {**F32, "KV_CACHE_PRECISION": "f32"}
SETTINGS = [(F32, 2e-2), (F32_CACHE, 5e-4), ({**F32_CACHE, "ATTENTION_BACKEND": "SDPA"}, 5e-4)]


@pytest.fixture(scope="module")
def inputs(shapes_bundle):
    processor = AutoProcessor.from_pretrained(shapes_bundle)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which picture has more shapes?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(EXAMPLES / "shapes" / "pictures" / f"{name}.png") for name in "ab"]
    return processor(text=prompt, images=images, return_tensors="pt")


@pytest.fixture(scope="module")
def expected(inputs):
    model = LlavaMptForConditionalGeneration.from_pretrained(EXAMPLES / "shapes" / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("options", "tolerance"), SETTINGS, ids=["default cache", "f32 cache", "f32 cache, SDPA"])
def test_settings(shapes_bundle, inputs, expected, options, tolerance):
    logits = [
        OVModelForLlavaMPT.from_pretrained(shapes_bundle, ov_config=options, compile_only=compile_only)(
            **inputs
        ).logits
        for compile_only in (False, True)
    ]
    assert torch.equal(*logits)
    assert (logits[0] - expected).abs().max() < tolerance
