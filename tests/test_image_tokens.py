"""Fewer tokens for an image: the reduction is in the graph, so that every engine gives the same answers."""

import json

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from conftest import EXACT, EXAMPLES, Golden, run, run_stock
from transformers import AutoProcessor

from optimum_llava_ov import OriginalLlavaForConditionalGeneration, OVModelForLlava
from optimum_llava_ov.checkpoint.image_tokens import ImageTokens
from optimum_llava_ov.models.reduction import build_reduction


BORDERS, VICUNA, TILES = Golden("linear_fp16_sharded"), Golden("llava15_vicuna"), Golden("llava16_mistral_anyres")
NUM_TOKENS, QUESTION, IMAGE = 6, "What is in this picture?", "img0_300x200"


@pytest.fixture(scope="module", params=[(VICUNA, 0), (BORDERS, 2)], ids=["llama", "mpt with borders"])
def reduced(request, export_once):
    golden, borders = request.param
    options = ("--image-tokens", str(NUM_TOKENS), "--weight-format", "fp32")
    return golden, borders, export_once(f"{golden.name}-{NUM_TOKENS}-tokens", golden.checkpoint, *options)


def inputs_of(bundle, golden, names=(IMAGE,)):
    processor = AutoProcessor.from_pretrained(bundle)
    content = [*({"type": "image"} for _ in names), {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [golden.image(name) for name in names]
    return prompt, processor(text=prompt, images=images, return_tensors="pt")


def answer(model, inputs):
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, stop_strings=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_tokens_in_torch_and_here(reduced):
    golden, borders, bundle = reduced
    _, inputs = inputs_of(bundle, golden, (IMAGE, "img1_64x480"))
    model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 2 * (NUM_TOKENS + borders)
    reference = OriginalLlavaForConditionalGeneration.from_pretrained(
        golden.checkpoint, dtype="float32", image_tokens=NUM_TOKENS
    )
    expected = reference.get_image_features(inputs["pixel_values"])
    assert expected.shape[1] == NUM_TOKENS + borders
    np.testing.assert_allclose(model.get_image_features(inputs["pixel_values"]), expected, atol=1e-4)
    assert answer(model, inputs) == answer(reference, inputs)


STOCK = """
import json, sys
import torch
from optimum.intel import OVModelForVisualCausalLM

model = OVModelForVisualCausalLM.from_pretrained(sys.argv[1], ov_config=json.loads(sys.argv[3]))
inputs = torch.load(sys.argv[2])
output = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
print(json.dumps(output[0, inputs["input_ids"].shape[1] :].tolist()))
"""


def test_tokens_in_engines_that_know_nothing_of_it(reduced, tmp_path):
    golden, _, bundle = reduced
    prompt, inputs = inputs_of(bundle, golden)
    expected = answer(OVModelForLlava.from_pretrained(bundle, ov_config=EXACT), inputs)

    torch.save(dict(inputs), tmp_path / "inputs.pt")
    stock = run_stock(STOCK, bundle, tmp_path / "inputs.pt", json.dumps(EXACT))
    assert json.loads(stock.splitlines()[-1]) == expected

    side = inputs["pixel_values"].shape[-1]
    processor = AutoProcessor.from_pretrained(bundle).image_processor
    pixels = inputs["pixel_values"][0] * torch.tensor(processor.image_std).view(3, 1, 1)
    pixels = ((pixels + torch.tensor(processor.image_mean).view(3, 1, 1)) * 255).round().to(torch.uint8)
    image = openvino.Tensor(pixels.permute(1, 2, 0)[None].numpy().copy())
    assert image.shape == [1, side, side, 3]
    config = openvino_genai.GenerationConfig(max_new_tokens=16, do_sample=False, ignore_eos=True)
    config.apply_chat_template = False
    for backend in ("SDPA", "PA"):
        pipeline = openvino_genai.VLMPipeline(bundle, "CPU", ATTENTION_BACKEND=backend, **EXACT)
        genai_prompt = prompt.replace("<image>\n", "<image>")
        text = pipeline.generate(genai_prompt, images=[image], generation_config=config).texts[0]
        assert text == pipeline.get_tokenizer().decode(expected, skip_special_tokens=True), backend


def test_the_card_says_what_was_cut_and_how_to_make_it_again(reduced):
    _, _, bundle = reduced
    card = (bundle / "README.md").read_text()
    assert (
        f"The 16 patches of an image are reduced to {NUM_TOKENS} tokens (the most similar patches are merged)" in card
    )
    assert f'"image_tokens": {NUM_TOKENS}, "image_token_method": "merge"' in card


def test_what_is_rare_keeps_patches_of_its_own():
    """14 patches are background with small differences, two are not. The background is merged, in the order of patches."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.ones(1, 16, 8) + 0.01 * torch.randn(1, 16, 8, generator=generator)
    patches[0, 5], patches[0, 12] = torch.eye(8)[0] * -4, torch.eye(8)[1] * -4
    merged = build_reduction(ImageTokens(3, "merge"), 16)(patches)[0]
    is_rare = [any(torch.equal(token, patches[0, index]) for index in (5, 12)) for token in merged]
    assert sum(is_rare) == 2
    background = merged[is_rare.index(False)]
    kept = [index for index in range(16) if index not in (5, 12)]
    torch.testing.assert_close(background, patches[0, kept].mean(0), atol=1e-5, rtol=0)
    first, second = (index for index, rare in enumerate(is_rare) if rare)
    assert torch.equal(merged[first], patches[0, 5])
    assert torch.equal(merged[second], patches[0, 12])


def test_images_of_a_batch_do_not_change_each_other():
    patches = torch.randn(3, 25, 8, generator=torch.Generator().manual_seed(1))
    for method, count in (("merge", 7), ("pool", 9)):
        reduction = build_reduction(ImageTokens(count, method), 25)
        together = reduction(patches)
        assert together.shape == (3, count, 8)
        for index in range(3):
            torch.testing.assert_close(together[index : index + 1], reduction(patches[index : index + 1]))


def test_pooling_averages_neighbours():
    grid = torch.arange(16.0).view(4, 4)
    pooled = build_reduction(ImageTokens(4, "pool"), 16)(grid.reshape(1, 16, 1))
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_tokens": 0}, "Expected 1 to 16"),
        ({"image_tokens": 17}, "the vision tower gives 16 patches"),
        ({"image_tokens": "6"}, "image_tokens='6'. Expected a whole number"),
        ({"image_tokens": True}, "image_tokens=True. Expected a whole number"),
        ({"image_tokens": 6, "image_token_method": "pool"}, "Expected one of 16, 9, 4, 1, or the method 'merge'"),
        ({"image_tokens": 6, "image_token_method": "attend"}, "Expected one of merge, pool"),
        ({"image_token_method": "pool"}, "image_token_method needs image_tokens"),
    ],
)
def test_what_cannot_be_reduced_is_refused(options, expected, optimum_cli, tmp_path):
    status, _, error = optimum_cli(
        "export", "openvino", "--model", VICUNA.checkpoint, "--model-kwargs", json.dumps(options), tmp_path / "ov"
    )
    assert status == 1
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "ov").exists()


def test_tiles_are_refused(optimum_cli, tmp_path):
    status, _, error = optimum_cli(
        "export", "openvino", "--model", TILES.checkpoint, "--image-tokens", 4, tmp_path / "ov"
    )
    assert status == 1
    assert "this checkpoint cuts images into tiles" in error


def test_models_of_others_are_refused(optimum_cli, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    status, _, error = optimum_cli(
        "export", "openvino", "--model", tmp_path / "bert", "--image-tokens", 4, tmp_path / "ov"
    )
    assert status == 1
    assert "--image-tokens: only for original LLaVA checkpoints" in error


@pytest.mark.slow
def test_merging_keeps_more_than_pooling(export_once, tmp_path):
    """Where three quarters of an image are background, merging answers most questions that pooling cannot."""
    checkpoint = EXAMPLES / "shapes" / "checkpoint-llama"
    kwargs = {name: json.dumps({"image_tokens": 4, "image_token_method": name}) for name in ("merge", "pool")}
    bundles = [export_once(f"shapes-{name}", checkpoint, "--model-kwargs", kwargs[name]) for name in kwargs]
    run("optimum-cli", "llava-ov", "eval", *bundles, "--reference", checkpoint, "--num-samples", "32",
        "--work-dir", tmp_path)  # fmt: skip
    assert [json.loads((bundle / "eval.json").read_text())["image_tokens"] for bundle in bundles] == [4, 4]
    accuracy = [json.loads((bundle / "eval.json").read_text())["accuracy"] for bundle in bundles]
    assert accuracy[0] >= accuracy[1] + 0.15, accuracy
