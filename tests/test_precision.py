"""How near the logits of each setting are to those of torch, as the documentation says it."""

import pytest
import torch
from conftest import EXACT, EXAMPLES, computes_in_bf16
from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import LlavaMptForConditionalGeneration, OVModelForLlava, OVModelForLlavaMPT


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


@pytest.mark.skipif(
    not computes_in_bf16(),
    reason="this processor does not compute in bf16: OpenVINO would compute in f32 and lose nothing",
)
@pytest.mark.parametrize(
    "name", ["linear_fp16_sharded", "llava15_vicuna", "llava1_llama2chat", "llava16_mistral_anyres"]
)
def test_bf16_does_not_lose_positions(bundles, models, name):
    """ALiBi and rotary embeddings: mean KL to f32 at 1,000 and 2,000 tokens is at most twice that at 64."""
    bf16 = OVModelForLlava.from_pretrained(bundles[name], ov_config={**EXACT, "INFERENCE_PRECISION_HINT": "bf16"})
    prompts = torch.randint(3, 450, (4, 2000), generator=torch.Generator().manual_seed(0))

    def mean_kl(length):
        input_ids = prompts[:, :length]
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        exact_log, bf16_log = (
            torch.log_softmax(model(**inputs, logits_to_keep=40).logits, -1) for model in (models[name], bf16)
        )
        return torch.nn.functional.kl_div(bf16_log, exact_log, log_target=True, reduction="none").sum(-1).mean().item()

    near = mean_kl(64)
    assert near > 0, "bf16 was not used"
    assert mean_kl(1000) <= 2 * near
    assert mean_kl(2000) <= 2 * near
