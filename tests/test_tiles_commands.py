"""Commands with a bundle whose images are cut into tiles: chat, bench, eval, push, card, and compression with a data set."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import EXACT, computes_in_bf16, run
from PIL import Image
from test_anyres import TINY
from test_tiles import GOLDEN

from optimum_llava_ov import OVModelForLlava
from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.chat.genai_engine import GenAIEngine
from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.chat.prompt import build_prompt
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.export.calibration import calibration_dataset
from optimum_llava_ov.samples.files import Sample


pytestmark = pytest.mark.slow

IMAGES = GOLDEN.folder / "images"
# A wide image, a tall one, and one of which transformers' processor counts other rows than the original
NAMES = ("img0_300x200", "img1_64x480", "img3_376x94")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Questions of a user about images of different grids, and without an image."""
    file = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    lines = [{"image": str(IMAGES / f"{name}.png"), "prompt": "What is this?"} for name in NAMES]
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "Hello"}])))
    return file


@pytest.mark.genai
def test_chat(bundles, optimum_cli):
    """The engines give the same answer. The prompt has the tokens of the tiles."""
    bundle, file = bundles[GOLDEN.name], IMAGES / "img0_300x200.png"
    command = ["llava-ov", "chat", bundle, "--image", file, "--max-new-tokens", 6, "--stats", "--engine"]
    answers = []
    for engine in ("openvino", "genai"):
        status, answer, stats = optimum_cli(*command, engine)
        assert status == 0
        assert f"prompt {len(_prompt(bundle, file))} tokens" in stats
        answers.append(answer)
    assert answers[0] == answers[1]


def _prompt(bundle, file):
    model = OVModelForLlava.from_pretrained(bundle, compile=False)
    return build_prompt([user_message("What is it?", [Image.open(file)])], load_processor(bundle), model.config)


@pytest.mark.genai
def test_conversation(bundles, models, processors):
    """An image in each of several turns, with all grids. The engines give the same answers."""
    theirs = ChatSession(GenAIEngine(bundles[GOLDEN.name], ov_config=EXACT), max_new_tokens=8)
    ours = models[GOLDEN.name].chat(processors[GOLDEN.name], max_new_tokens=8)
    for question, names in [("What is this?", ["img0_300x200"]), ("Why?", []), ("And these?", ["img2_224x224"] * 2)]:
        images = [GOLDEN.image(name) for name in names]
        expected = ours.send(question, images, do_sample=False).result()
        assert theirs.send(question, images, do_sample=False).result() == expected


@pytest.mark.genai
@pytest.mark.parametrize("engine", ["openvino", "genai"])
def test_bench(engine, bundles, optimum_cli):
    """The shortest prompt depends on the image: here on the largest one."""
    images = [option for name in NAMES[:2] for option in ("--image", IMAGES / f"{name}.png")]
    command = ["llava-ov", "bench", bundles[GOLDEN.name], *images, "--engine", engine, "--rounds", 2, "--json"]
    command += ["--new-tokens", 3, "--prompt-tokens"]
    status, _, message = optimum_cli(*command, 50)
    largest = max(TINY.num_image_tokens(GOLDEN.image(name).size) for name in NAMES[:2])
    assert status != 0
    assert f"an image ({largest} tokens) and the chat template take" in message
    status, result, _ = optimum_cli(*command, 150)
    assert status == 0
    (speed,) = json.loads(result)["speeds"]
    assert speed["prompt_tokens"] == 150
    assert len(speed["runs"]) == 2


def test_eval_and_push(bundles, samples, tmp_path, optimum_cli):
    """Against the original checkpoint in torch. The card says what is measured, and how many tokens an image has."""
    bundle = shutil.copytree(bundles[GOLDEN.name], tmp_path / "llava-1.6")
    command = ["llava-ov", "eval", bundle, "--reference", GOLDEN.checkpoint, "--dataset", samples]
    assert optimum_cli(*command, "--max-new-tokens", 8)[0] == 0
    quality = json.loads((bundle / "eval.json").read_text())
    # Processors with bf16 compute in it, and the tokens of a model with random weights are about equally likely
    same, divergence = (0.75, 1e-2) if computes_in_bf16() else (1, 1e-4)
    assert quality["num_samples"] == 4
    assert min(quality["identical"], quality["top1_agreement"]) >= same
    assert quality["kl_mean"] < divergence

    status, published, _ = optimum_cli("llava-ov", "push", bundle, "me/llava-1.6", "--dry-run")
    assert status == 0
    assert "eval.json" in published
    card = (bundle / "README.md").read_text().replace("\N{MULTIPLICATION SIGN}", "x")
    assert f"| same greedy answer | {quality['identical']:.1%} |" in card
    assert "up to 4 tiles of 56 x 56 pixels, in a grid of 1 x 2, 2 x 1, 2 x 2, 3 x 1, 1 x 3 (columns x rows)" in card
    assert f"becomes up to {TINY.max_image_tokens} tokens: 16 for the whole image" in card


def test_calibration_sees_the_tiles(bundles, models, samples):
    """Its inputs are those of the model: the rows of each image, as many as the original counts."""
    bundle, model = bundles[GOLDEN.name], models[GOLDEN.name]
    processor = load_processor(bundle)
    dataset = calibration_dataset([str(samples)], None, processor, bundle)
    found = {inputs["inputs_embeds"].shape[1]: inputs["inputs_embeds"] for inputs in dataset.get_inference_data()}
    assert len(found) == len(NAMES) + 1
    for name in NAMES:
        image = GOLDEN.image(name)
        inputs = Sample("What is this?", (image,)).inputs(processor)
        (rows,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        is_image = inputs["input_ids"][0] == model.config.image_token_index
        assert is_image.sum() == TINY.num_image_tokens(image.size)
        embeds = torch.from_numpy(found[len(is_image)][0])
        torch.testing.assert_close(embeds[is_image], rows, atol=1e-4, rtol=0)


def test_data_aware_compression(bundles, models, samples, tmp_path):
    """By the command from the checkpoint, and of a loaded bundle. Answers stay close to those without compression."""
    options = ["--weight-format", "int4", "--group-size", 16, "--ratio", 1.0, "--awq", "--dataset", samples]
    run("optimum-cli", "export", "openvino", "--model", GOLDEN.checkpoint, *options, tmp_path / "int4")
    config = {"bits": 4, "group_size": 16, "quant_method": "awq", "dataset": [str(samples)]}
    loaded = OVModelForLlava.from_pretrained(bundles[GOLDEN.name], quantization_config=config, ov_config=EXACT)
    inputs = Sample("What is this?", (GOLDEN.image(NAMES[0]),)).inputs(load_processor(tmp_path / "int4"))
    expected = models[GOLDEN.name](**inputs).logits[..., :-1]
    for model in (OVModelForLlava.from_pretrained(tmp_path / "int4", ov_config=EXACT), loaded):
        logits = model(**inputs).logits[..., :-1]
        assert np.corrcoef(logits.flatten(), expected.flatten())[0, 1] > 0.9
        assert not torch.equal(logits, expected)
