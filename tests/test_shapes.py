"""The models that ship answer about images they have never seen, through the whole chain: checkpoint, bundle, OpenVINO."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from conftest import EXAMPLES, files, run
from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlava, OVModelForLlavaMPT
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.samples.shapes import (
    KINDS,
    held_out,
    render,
    small_question,
    small_scene,
    wide_or_tall_scene,
)


pytestmark = pytest.mark.slow


SHAPES = EXAMPLES / "shapes"
FOLDERS = {
    "mpt": ("checkpoint", "clip"),
    "llama": ("checkpoint-llama", "clip-llama"),
    "patches": ("checkpoint-patches", "clip-patches"),
}
NUM_CONVERSATIONS = 80


def asker(model, processor):
    """Answer to the last of a conversation's turns, `(question, images, answer)`."""

    def answer(turns):
        messages, images = [], []
        for question, new, reply in turns:
            content = [{"type": "image"} for _ in new] + [{"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            images += new
            if reply is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def exact_answers(ask, conversations):
    """Share of exact answers, in conversations that contain the model's own earlier answers."""
    asked, right = Counter(), Counter()
    for conversation in conversations:
        turns = []
        for turn in conversation:
            turns.append([turn["question"], turn["images"], None])
            turns[-1][2] = ask(turns)
            asked[turn["kind"]] += 1
            right[turn["kind"]] += turns[-1][2] == turn["answer"]
    assert set(asked) == set(KINDS)
    return right.total() / asked.total()


@pytest.fixture(scope="module")
def ask(shapes_bundle):
    return asker(OVModelForLlavaMPT.from_pretrained(shapes_bundle), AutoProcessor.from_pretrained(shapes_bundle))


@pytest.fixture(scope="module")
def accuracy(ask):
    return exact_answers(ask, held_out(NUM_CONVERSATIONS, seed=1))


def test_exact_answers_on_held_out_pictures(accuracy):
    assert accuracy >= 0.95


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.005), (4, 0.02)])
def test_compressed_answers_are_as_good(shapes_bundle, accuracy, bits, loss):
    model = OVModelForLlavaMPT.from_pretrained(shapes_bundle, quantization_config={"bits": bits})
    ask = asker(model, AutoProcessor.from_pretrained(shapes_bundle))
    assert exact_answers(ask, held_out(NUM_CONVERSATIONS, seed=1)) >= accuracy - loss


class TestLlama:
    """The sibling in the format of LLaVA-1.5. It pads images to squares, so it is asked about images that are not."""

    NUM_CONVERSATIONS = 30  # about 90 questions

    @classmethod
    def exact_answers(cls, bundle, **kwargs):
        ask = asker(OVModelForLlava.from_pretrained(bundle, **kwargs), AutoProcessor.from_pretrained(bundle))
        return exact_answers(ask, held_out(cls.NUM_CONVERSATIONS, 1, wide_or_tall_scene))

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, export_once):
        return export_once("shapes-llama-ov", SHAPES / "checkpoint-llama")

    @pytest.fixture(scope="class")
    @classmethod
    def accuracy(cls, bundle):
        return cls.exact_answers(bundle)

    def test_exact_answers_on_images_that_are_not_square(self, accuracy):
        assert accuracy >= 0.95

    @pytest.mark.parametrize(("bits", "loss"), [(8, 0.011), (4, 0.022)])  # one and two answers
    def test_compressed_answers_are_as_good(self, bundle, accuracy, bits, loss):
        assert self.exact_answers(bundle, quantization_config={"bits": bits}) >= accuracy - loss


class TestPatches:
    """The LLaMA's sibling whose images have 64 patches, so that patches can be merged."""

    @pytest.fixture(scope="class")
    @classmethod
    def accuracy(cls, export_once):
        return TestLlama.exact_answers(export_once("shapes-patches-ov", SHAPES / "checkpoint-patches"))

    def test_exact_answers_with_all_patches(self, accuracy):
        assert accuracy >= 0.95

    @pytest.mark.parametrize(("tokens", "loss"), [("32", 0.013), ("16", 0.026)])  # one and two answers
    def test_few_answers_are_lost_with_fewer_tokens(self, accuracy, export_once, tokens, loss):
        bundle = export_once(f"shapes-patches-{tokens}-ov", SHAPES / "checkpoint-patches", "--image-tokens", tokens)
        assert TestLlama.exact_answers(bundle) >= accuracy - loss


class TestTiles:
    """The LLaMA's sibling in the format of LLaVA-1.6, asked about images whose shapes are small."""

    @pytest.fixture(scope="class")
    @classmethod
    def answers(cls, export_once):
        """For each grid of tiles, whether each answer is right: with the image's tiles, and with the squashed image alone."""
        bundle = export_once("shapes-tiles-ov", SHAPES / "checkpoint-tiles")
        model, processor = OVModelForLlava.from_pretrained(bundle), AutoProcessor.from_pretrained(bundle)
        image_token, base = model.config.image_token_index, model.image_layout.num_tokens
        result = {}
        for grid in ((2, 2), (3, 1), (1, 3)):
            rng, right = random.Random(f"test/{grid}"), []
            for _ in range(20):
                scene = small_scene(rng, grid, 120)
                kind, question, expected = small_question(rng, scene)
                content = [{"type": "image"}, {"type": "text", "text": question}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                inputs = processor(text=prompt, images=render(scene), return_tensors="pt")
                (rows,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
                ids = inputs["input_ids"][0].tolist()
                start = ids.index(image_token)
                found = []
                for features in (rows, rows[:base]):
                    text = ids[:start] + [image_token] * len(features) + ids[start + len(rows) :]
                    output = model.generate(torch.tensor([text]), image_features=[features], max_new_tokens=24)
                    found.append(processor.decode(output[0, len(text) :], skip_special_tokens=True) == expected)
                right.append((kind, *found))
            result[grid] = right
        return result

    def test_tiles_show_what_is_small(self, answers):
        for right in answers.values():
            with_tiles, without = (sum(answer[index] for answer in right) for index in (1, 2))
            assert with_tiles >= 15
            assert with_tiles > without

    def test_shapes_are_what_only_tiles_show(self, answers):
        """Colours can be seen without tiles: the colour is asked for by the shape, which is what cannot be told then."""
        only_tiles = [kind for right in answers.values() for kind, tiles, base in right if tiles and not base]
        assert len(only_tiles) >= 10
        assert {"shape", "colour"} <= {*only_tiles}


def test_sample_questions(ask):
    for sample in json.loads((SHAPES / "pictures" / "questions.json").read_text()):
        images = [Image.open(SHAPES / "pictures" / name) for name in sample["images"]]
        assert ask([[sample["question"], images, None]]) == sample["answer"], sample["question"]


def test_quickstart(shapes_bundle):
    result = run("python", EXAMPLES / "quickstart.py", shapes_bundle)
    assert "What colour is the circle?  ->  The circle is red." in result.stdout


@pytest.mark.parametrize("family", FOLDERS)
def test_training_script(tmp_path, family):
    """A few steps; what it writes can be trained further, and is a checkpoint like the one that ships."""
    command = [
        "python",
        SHAPES / "train.py",
        "--family",
        family,
        "--tower-minutes",
        "0.02",
        "--num-pairs",
        "32",
        "--batch-size",
        "2",
        "--output",
        tmp_path,
    ]
    run(*command, "--minutes", "0.05")
    run(*command, "--minutes", "0.02", "--resume", *(["--fewest-patches", "12"] if family == "patches" else []))
    for folder in FOLDERS[family]:
        assert files(tmp_path / folder) >= files(SHAPES / folder)
    OriginalLlavaForConditionalGeneration.from_pretrained(tmp_path / FOLDERS[family][0])  # all tensors are there


def test_training_of_tiles(tmp_path):
    command = ["python", SHAPES / "tiles.py", "train", "--num-images", "6", "--batch-size", "2", "--output", tmp_path]
    run(*command, "--minutes", "0.02", "--num-questions", "6")
    result = run(*command, "--minutes", "0.02", "--num-questions", "6", "--resume")
    assert "| kind | questions | squashed image alone | with tiles |" in result.stdout
    assert files(tmp_path / "checkpoint-tiles") >= files(SHAPES / "checkpoint-tiles")


@pytest.mark.parametrize("folders", FOLDERS.values(), ids=FOLDERS)
def test_small_enough_to_ship(folders):
    files = [file for folder in folders for file in (SHAPES / folder).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_readme_tells_the_accuracy():
    assert len(re.findall(r"\*\*all\*\* \| \d+ \| 9[5-9]\.\d%", (SHAPES / "README.md").read_text())) == len(FOLDERS)
