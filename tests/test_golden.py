"""Equal to the original LLaVA code: logits at every position, image features, greedy tokens. In torch and in OpenVINO."""

import numpy as np
import pytest
import torch
from conftest import by_family, by_family_case


LOGITS_TOLERANCE = 5e-4  # logits have a standard deviation of 3
FEATURES_TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["torch", "openvino"])
def model_of(request, torch_models, models):
    return torch_models if request.param == "torch" else models


def canonical(prompt: str) -> str:
    return prompt.replace("<im_start><image><im_end>", "<image>")


def recorded_pixels(golden, case) -> torch.Tensor | None:
    names = golden.cases[case]["images"]
    if not names:
        return None
    values = [golden.pixel_values(name) for name in names]
    return torch.from_numpy(np.stack([value.reshape(value.shape[-3:]) for value in values]))


def with_recorded_pixels(inputs, golden, case):
    if "pixel_values" in inputs:
        inputs["pixel_values"] = recorded_pixels(golden, case)
    return inputs


@by_family_case
def test_logits_and_tokens(golden, case, model_of, processors):
    expected, model, processor = golden.cases[case], model_of[golden.name], processors[golden.name]
    inputs = with_recorded_pixels(
        processor(text=canonical(expected["prompt"]), images=golden.images(case), return_tensors="pt"), golden, case
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    logits, image_logits = logits[:, :-1], logits[:, -1]
    if f"{case}/logits_last" in golden.arrays:  # of some cases, only the last position is stored
        expected_logits, logits = golden.arrays[f"{case}/logits_last"].reshape(1, -1), logits[-1:]
    else:
        expected_logits = golden.arrays[f"{case}/logits"]
    assert logits.shape == expected_logits.shape
    assert np.abs(logits - expected_logits).max() < LOGITS_TOLERANCE
    assert (image_logits < -30_000).all()  # `<image>`, which the original does not have

    output = model.generate(**inputs, **GREEDY)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected["greedy"]


@by_family
def test_image_features(golden, model_of, processors):
    model, processor = model_of[golden.name], processors[golden.name]
    borders = processor.num_additional_image_tokens // 2
    for name in ("img0_300x200", "img1_64x480", "img2_224x224"):
        pixel_values = torch.from_numpy(golden.pixel_values(name))
        features = model.get_image_features(pixel_values)[0].detach().numpy()
        expected = golden.arrays[f"image_features/{name}"][0]
        assert features.shape[0] == expected.shape[0] + 2 * borders
        assert np.abs(features[borders : len(features) - borders] - expected).max() < FEATURES_TOLERANCE


@by_family
def test_pixel_values(golden, processors):
    """Equal, but for tall pictures: there Pillow 13, which the originals were made with, resamples in another order than Pillow 12."""
    grey_level = 1 / 255 / 0.26
    for name in ("img0_300x200", "img1_64x480", "img2_224x224"):
        pixel_values = processors[golden.name].image_processor(golden.image(name), return_tensors="np")["pixel_values"]
        difference = np.abs(pixel_values - golden.pixel_values(name))
        assert difference.max() < 1e-5 or "64x480" in name
        assert difference.max() < grey_level
        assert (difference > 1e-5).mean() < 0.02


@by_family_case
def test_prompts_of_the_original_code(golden, case, models):
    """-200 for an image with `images=`, as in the original and in the OpenVINO notebook."""
    expected, model = golden.cases[case], models[golden.name]
    pixel_values = recorded_pixels(golden, case)
    output = model.generate(torch.tensor([expected["input_ids"]]), images=pixel_values, **GREEDY)
    assert output[0].tolist() == expected["input_ids"] + expected["greedy"]


@by_family_case
def test_borders_spelled_out(golden, case, models, processors):
    """`<im_start><image><im_end>` in the prompt gives the borders once."""
    expected, model, processor = golden.cases[case], models[golden.name], processors[golden.name]
    inputs = processor(text=expected["prompt"], images=golden.images(case), return_tensors="pt")
    output = model.generate(**with_recorded_pixels(inputs, golden, case), **GREEDY)
    assert output[0].tolist() == inputs["input_ids"][0].tolist() + expected["greedy"]
