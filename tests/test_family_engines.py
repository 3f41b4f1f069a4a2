"""Bundles of every family give the original's tokens in engines that do not have this package: golden case by golden case.

GenAI and Model Server write the newline after an image themselves, so they get the cases in which an image stands
before a newline. They cannot pad, so they get images that are squared and have their final size already.
"""

import json

import numpy as np
import openvino
import openvino_genai
import pytest
from conftest import EXACT, Golden, run_stock
from PIL import Image


pytestmark = pytest.mark.genai

VICUNA, LLAMA_2 = Golden("llava15_vicuna"), Golden("llava1_llama2chat")
by_new_family = pytest.mark.parametrize("golden", [VICUNA, LLAMA_2], ids=lambda golden: golden.name)
MAX_NEW_TOKENS = 32


def prompt_of(golden, case):
    return golden.cases[case]["prompt"].replace("<im_start><image><im_end>", "<image>")


STOCK = """
import json, sys
import numpy as np
import torch
from optimum.intel import OVModelForVisualCausalLM
from PIL import Image
from transformers import AutoProcessor

bundle, folder, cases, exact = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
arrays = np.load(f"{folder}/arrays.npz")
model = OVModelForVisualCausalLM.from_pretrained(bundle, ov_config=exact)
processor = AutoProcessor.from_pretrained(bundle)
answers = {}
for name, (prompt, names) in cases.items():
    images = [Image.open(f"{folder}/images/{image}.png").convert("RGB") for image in names]
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    if names:
        pixels = [arrays[f"pixel_values/{image}"] for image in names]
        inputs["pixel_values"] = torch.from_numpy(np.stack([values.reshape(values.shape[-3:]) for values in pixels]))
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    answers[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
assert not any(module.startswith("optimum_llava_ov") for module in sys.modules)
print(json.dumps([type(model).__module__, answers]))
"""


@by_new_family
def test_stock_optimum_intel_without_this_package(golden, bundles):
    cases = {case: (prompt_of(golden, case), golden.cases[case]["images"]) for case in golden.cases}
    output = run_stock(STOCK, bundles[golden.name], golden.folder, json.dumps(cases), json.dumps(EXACT))
    module, answers = json.loads(output.splitlines()[-1])
    assert module == "optimum.intel.openvino.modeling_visual_language"
    assert answers == {case: golden.cases[case]["greedy"] for case in golden.cases}


def genai_cases(golden):
    return [
        case
        for case in golden.cases
        if prompt_of(golden, case).count("<image>") == prompt_of(golden, case).count("<image>\n")
    ]


def final_image(golden, name) -> openvino.Tensor:
    """The image as the tower sees it, before its colours are normalized."""
    values = golden.pixel_values(name).reshape(3, 56, 56)
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = (values * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return openvino.Tensor(pixels.round().astype(np.uint8).transpose(1, 2, 0)[None].copy())


def genai_request(golden, case):
    images = [final_image(golden, name) for name in golden.cases[case]["images"]]
    return prompt_of(golden, case).replace("<image>\n", "<image>"), images


def genai_config():
    config = openvino_genai.GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, ignore_eos=True)
    config.apply_chat_template = False
    return config


@by_new_family
def test_enough_cases_are_tried(golden):
    cases = genai_cases(golden)
    assert {"text_only", "image_start", "wide", "tall", "small", "multi_turn", "multi_turn_two_images"} <= {*cases}


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
@by_new_family
def test_genai(golden, bundles, backend):
    pipeline = openvino_genai.VLMPipeline(bundles[golden.name], "CPU", ATTENTION_BACKEND=backend, **EXACT)
    for case in genai_cases(golden):
        prompt, images = genai_request(golden, case)
        result = pipeline.generate(prompt, images=images, generation_config=genai_config())
        # The tokens of these random models are no text, and transformers writes bytes that are no character otherwise
        expected = pipeline.get_tokenizer().decode(golden.cases[case]["greedy"], skip_special_tokens=True)
        assert result.texts[0] == expected, case


@by_new_family
def test_continuous_batching_serves_all_at_once(golden, bundles):
    """What Model Server runs. The second half of the requests finds its prefixes in the cache."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
    pipeline = openvino_genai.ContinuousBatchingPipeline(bundles[golden.name], scheduler, "CPU", EXACT)
    cases = 2 * genai_cases(golden)
    handles = []
    for index, case in enumerate(cases):
        prompt, images = genai_request(golden, case)
        handles.append(pipeline.add_request(index, prompt, images=images, generation_config=genai_config()))
    while pipeline.has_non_finished_requests():
        pipeline.step()
    for case, handle in zip(cases, handles):
        assert handle.read_all()[0].generated_ids == golden.cases[case]["greedy"], case


def test_padding_is_the_callers_where_the_engine_has_none(bundles):
    """GenAI crops an image that is not square. Squared by the caller, its answer is the checkpoint's."""
    pipeline = openvino_genai.VLMPipeline(bundles[VICUNA.name], "CPU", ATTENTION_BACKEND="SDPA", **EXACT)
    image = VICUNA.image("img0_300x200")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((56, 56), Image.Resampling.BICUBIC)
    prompt = prompt_of(VICUNA, "wide").replace("<image>\n", "<image>")
    texts = [
        pipeline.generate(
            prompt, images=[openvino.Tensor(np.array(each)[None])], generation_config=genai_config()
        ).texts[0]
        for each in (image, square)
    ]
    expected = pipeline.get_tokenizer().decode(VICUNA.cases["wide"]["greedy"], skip_special_tokens=True)
    assert texts[1] == expected != texts[0]
