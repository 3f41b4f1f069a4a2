"""A `llava_next` in the format of transformers, exported by Optimum's own command: what others publish."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden, run
from optimum.intel import OVModelForVisualCausalLM
from optimum.intel.openvino import modeling_visual_language
from test_anyres import noise
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from optimum_llava_ov import OVModelForLlava


pytestmark = pytest.mark.slow

GOLDEN = Golden("llava16_mistral_anyres")
GREEDY = {"max_new_tokens": 8, "do_sample": False}
# With stock optimum-intel, an error or another answer: all but the first. The last has a row of patches less in the original.
SIZES = [(300, 200), (64, 480), (480, 64), (50, 100), (100, 50), (376, 94)]


@pytest.fixture(scope="module")
def processor(processors):
    processor = processors[GOLDEN.name]
    return processor.__class__(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


@pytest.fixture(scope="module")
def theirs(processor):
    """A random model of transformers."""
    torch.manual_seed(0)
    pinpoints = processor.image_processor.image_grid_pinpoints
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_range": 0.3}
    config = LlavaNextConfig(
        text_config=LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=len(processor.tokenizer)).to_dict(),
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=56, patch_size=14).to_dict(),
        image_grid_pinpoints=pinpoints,
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def bundle(theirs, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    task = ["--task", "image-text-to-text", "--weight-format", "fp32"]
    run("optimum-cli", "export", "openvino", "--model", folder / "model", *task, folder / "bundle")
    return folder / "bundle"


def answer(model, processor, size: tuple[int, int]) -> list[int]:
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=noise(size), return_tensors="pt")
    output = model.generate(**inputs, **GREEDY)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_our_class_gives_the_tokens_of_transformers(bundle, theirs, processor):
    model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
    assert "converted_from" not in json.loads((bundle / "config.json").read_text())
    bundled = AutoProcessor.from_pretrained(bundle)
    for size in SIZES:
        assert answer(model, bundled, size) == answer(theirs, processor, size), size
    answers = [answer(model, bundled, size) for size in SIZES]
    assert len({*map(tuple, answers)}) > 3  # they depend on the image
    text = bundled(text="USER: Hello ASSISTANT:", return_tensors="pt")
    assert torch.equal(model.generate(**text, **GREEDY), theirs.generate(**text, **GREEDY))


def test_logits(bundle, theirs, processor):
    model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
    for size in SIZES:
        inputs = processor(text="<image>\nWhat is it?", images=noise(size), return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**inputs).logits
        np.testing.assert_allclose(model(**inputs).logits, expected, atol=5e-4)


def test_the_class_of_the_host_stays(bundle, theirs, processor):
    """`OVModelForVisualCausalLM` loads it into the host's class, which is right for square grids only."""
    model = OVModelForVisualCausalLM.from_pretrained(bundle, ov_config=EXACT)
    assert type(model) is modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING["llava_next"]
    assert not isinstance(model, OVModelForLlava)
    assert answer(model, processor, SIZES[0]) == answer(theirs, processor, SIZES[0])
    with pytest.raises(RuntimeError):
        answer(model, processor, SIZES[1])
