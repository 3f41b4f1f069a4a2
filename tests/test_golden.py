"""Equal to the original LLaVA code: logits at every position, image features, greedy tokens. In torch and in OpenVINO."""

import numpy as np
import pytest
import torch
from conftest import by_case, by_golden


LOGITS_TOLERANCE = 5e-4  # logits have a standard deviation of 3
FEATURES_TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["torch", "openvino"])
def model_of(request, torch_models, models):
    return torch_models if request.param == "torch" else models


def canonical(prompt: str) -> str:
    return prompt.replace("<im_start><image><im_end>", "<image>")


@by_case
def test_logits_and_tokens(golden, case, model_of, processors):
    expected, model, processor = golden.cases[case], model_of[golden.name], processors[golden.name]
    inputs = processor(text=canonical(expected["prompt"]), images=golden.images(case), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    assert logits.shape == golden.arrays[f"{case}/logits"].shape
    assert np.abs(logits - golden.arrays[f"{case}/logits"]).max() < LOGITS_TOLERANCE

    output = model.generate(**inputs, **GREEDY)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected["greedy"]


@by_golden
def test_image_features(golden, model_of, processors):
    model, processor = model_of[golden.name], processors[golden.name]
    borders = processor.num_additional_image_tokens // 2
    for name in ("img0_300x200", "img1_64x480", "img2_224x224"):
        pixel_values = processor.image_processor(golden.image(name), return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values)[0].detach().numpy()
        expected = golden.arrays[f"image_features/{name}"][0]
        assert features.shape[0] == expected.shape[0] + 2 * borders
        assert np.abs(features[borders : len(features) - borders] - expected).max() < FEATURES_TOLERANCE


@by_golden
def test_pixel_values(golden, processors):
    key = "pixel_values_pad" if "pad" in golden.name else "pixel_values"
    for name in ("img0_300x200", "img1_64x480", "img2_224x224"):
        pixel_values = processors[golden.name].image_processor(golden.image(name), return_tensors="np")["pixel_values"]
        assert np.abs(pixel_values - golden.arrays[f"{key}/{name}"]).max() < 1e-5


@by_case
def test_prompts_of_the_original_code(golden, case, models, processors):
    """-200 for an image with `images=`, as in the original and in the OpenVINO notebook."""
    expected, model, processor = golden.cases[case], models[golden.name], processors[golden.name]
    images = golden.images(case)
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
    output = model.generate(torch.tensor([expected["input_ids"]]), images=pixel_values, **GREEDY)
    assert output[0].tolist() == expected["input_ids"] + expected["greedy"]


@by_case
def test_borders_spelled_out(golden, case, models, processors):
    """`<im_start><image><im_end>` in the prompt gives the borders once."""
    expected, model, processor = golden.cases[case], models[golden.name], processors[golden.name]
    inputs = processor(text=expected["prompt"], images=golden.images(case), return_tensors="pt")
    output = model.generate(**inputs, **GREEDY)
    assert output[0].tolist() == inputs["input_ids"][0].tolist() + expected["greedy"]
