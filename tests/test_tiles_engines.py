"""Images in tiles in other engines: what GenAI and stock optimum-intel do with them, and what this package gives them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino_genai
import pytest
import torch
from conftest import EXACT, Golden
from optimum.intel.openvino import modeling_visual_language
from PIL import Image
from test_anyres import IMAGES, RELEASED, TINY, noise, sizes, tiles_step_by_step
from transformers import LlavaNextConfig

from optimum_llava_ov import OVModelForLlava
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.chat.genai_images import fit_to_genai, genai_geometry, original_geometry
from optimum_llava_ov.errors import ImageError


ROOT = Path(__file__).parent.parent
GOLDEN = Golden("llava16_mistral_anyres")
QUESTION = "What is in the picture?"


def resize_columns_first(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize as GenAI does, and Pillow before version 13: columns first, rounded to 8 bits before the rows."""
    return image.resize((size[0], image.height)).resize(size)


def test_sizes_that_genai_gets_wrong():
    """The table of the documentation: common sizes whose tiles float32 resizes to one pixel less."""
    common = """224x224 336x336 512x512 672x672 1024x1024 1080x1080 200x150 300x200 600x400 900x600 1200x800 1500x1000
        6000x4000 500x375 640x480 800x600 1024x768 1280x960 1600x1200 2048x1536 4000x3000 4032x3024 1280x720 1920x1080
        2560x1440 3840x2160 1366x768 1280x800 1440x900 2000x500 200x300 400x600 800x1200 375x500 480x640 768x1024
        3000x4000 3024x4032 720x1280 1080x1920 1170x2532"""
    given = [tuple(map(int, size.split("x"))) for size in common.split()]
    wrong = [size for size in given if genai_geometry(size, RELEASED) != original_geometry(size, RELEASED)]
    upright = [(400, 600), (800, 1200), (375, 500), (3000, 4000)]
    assert wrong == [(300, 200), (600, 400), (1200, 800), (500, 375), (4000, 3000), *upright]
    rows = (ROOT / "docs" / "llava-1.6.md").read_text().split("| --- | --- | --- | --- | --- |\n")[1].split("\n\n")[0]
    described = {}
    for row in rows.splitlines():
        names, _, tokens, fitted, genai = (cell.strip() for cell in row.strip("| ").split("|"))
        for name in names.split(", "):
            described[name.strip("*").replace("\N{MULTIPLICATION SIGN}", "x")] = (tokens, fitted, genai)
    assert {*described} == {*common.split()}
    for size in given:
        fitted, genai = (geometry(size, RELEASED)[1] for geometry in (original_geometry, genai_geometry))
        shown = ["\N{MULTIPLICATION SIGN}".join(map(str, sides)) for sides in (fitted, genai)]
        expected = (f"{RELEASED.num_image_tokens(size):,}", shown[0], shown[1] if size in wrong else "the same")
        assert described["x".join(map(str, size))] == expected


def test_what_genai_is_given_has_the_grid_and_the_rows_of_the_original():
    """For 10,000 random sizes. Of 12 of them the image itself would not."""
    drawn, given = sizes(10_000, 4000, seed=7), []
    for size in drawn:
        image = SimpleNamespace(size=size, resize=lambda size, _: SimpleNamespace(size=size))
        given.append(fit_to_genai(image, RELEASED).size)
    assert sum(size != other for size, other in zip(drawn, given)) == 12
    expected = [original_geometry(size, RELEASED) for size in drawn]
    assert [genai_geometry(size, RELEASED) for size in given] == expected


def test_what_genai_is_given_has_the_tiles_of_the_original():
    """Only the base is resampled twice, by less than two grey levels on average here."""
    for size in [(75, 50), (142, 285), (26, 26), (427, 488)]:
        image = noise((size[0] // 8, size[1] // 8)).resize(size)
        fitted = fit_to_genai(image, TINY)
        assert fitted.size != size
        tiles, expected = (tiles_step_by_step(each, TINY).astype(int) for each in (fitted, image))
        np.testing.assert_array_equal(tiles[1:], expected[1:])
        assert np.abs(tiles[0] - expected[0]).mean() < 2


@pytest.mark.genai
@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_genai(backend, bundles, models, processors):
    """Token for token as this package, for all golden images and some that float32 gets wrong. Two images too."""
    model, processor = models[GOLDEN.name], processors[GOLDEN.name]
    pipeline = openvino_genai.VLMPipeline(bundles[GOLDEN.name], "CPU", ATTENTION_BACKEND=backend, **EXACT)
    config = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
    pictures = [[GOLDEN.image(name)] for name in IMAGES] + [[noise((49, 42))], [noise((427, 488)), noise((60, 300))]]
    for images in pictures:
        result = pipeline.generate(
            QUESTION, images=[image_tensor(image, processor) for image in images], generation_config=config
        )
        prompt = f"[INST] {'<image>' * len(images)}\n{QUESTION} [/INST]"
        fitted = [fit_to_genai(image, TINY) for image in images]
        inputs = processor(
            text=prompt.replace("<image><image>", "<image>\n<image>"), images=fitted, return_tensors="pt"
        )
        inputs["pixel_values"] = normalized(
            [tiles_step_by_step(image, TINY, resize_columns_first) for image in fitted], processor
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected = pipeline.get_tokenizer().decode(
            output[0, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True
        )
        assert result.texts[0] == expected, [image.size for image in images]


def genai_cases() -> list[str]:
    """The golden cases that GenAI can express: it writes a newline after each image."""
    prompts = {case: values["prompt"] for case, values in GOLDEN.cases.items()}
    return [case for case, prompt in prompts.items() if prompt.count("<image>") == prompt.count("<image>\n")]


def as_genai_resizes(names: list[str], processor) -> torch.Tensor:
    """Pixels of golden images as GenAI makes them from what this package gives it."""
    images = [fit_to_genai(GOLDEN.image(name), TINY) for name in names]
    return normalized([tiles_step_by_step(image, TINY, resize_columns_first) for image in images], processor)


def answer_to(case: str, pixel_values: torch.Tensor | None, model, processor) -> list[int]:
    """32 tokens of this package for the prompt and the sizes of a golden case, and these pixels."""
    images = [fit_to_genai(image, TINY) for image in GOLDEN.images(case) or []]
    inputs = processor(text=GOLDEN.cases[case]["prompt"], images=images or None, return_tensors="pt")
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def continuous_batching(bundles, processors):
    """Tokens of all cases, twice, that are served at once. The second half finds its beginnings in the cache."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
    pipeline = openvino_genai.ContinuousBatchingPipeline(bundles[GOLDEN.name], scheduler, "CPU", EXACT)
    config = openvino_genai.GenerationConfig(max_new_tokens=32, do_sample=False, ignore_eos=True)
    config.apply_chat_template = False
    handles = []
    for index, case in enumerate(2 * genai_cases()):
        prompt = GOLDEN.cases[case]["prompt"].replace("<image>\n", "<image>")
        images = [image_tensor(image, processors[GOLDEN.name]) for image in GOLDEN.images(case) or []]
        handles.append(pipeline.add_request(index, prompt, images=images, generation_config=config))
    while pipeline.has_non_finished_requests():
        pipeline.step()
    answers = [handle.read_all()[0].generated_ids for handle in handles]
    half = len(answers) // 2
    assert answers[:half] == answers[half:]
    return dict(zip(genai_cases(), answers))


@pytest.mark.genai
def test_continuous_batching(continuous_batching, models, processors):
    """Prompts with images of all grids, with two, and with none in one batch: token for token as this package."""
    model, processor = models[GOLDEN.name], processors[GOLDEN.name]
    equal = []
    assert {"text_only", "wide", "tall", "same_shape_twice", "multi_turn_two_images"} < continuous_batching.keys()
    for case, tokens in continuous_batching.items():
        names = GOLDEN.cases[case]["images"]
        assert tokens == answer_to(case, as_genai_resizes(names, processor) if names else None, model, processor), case
        # Pillow 13, with which the golden was made, resizes a tall image in another order than GenAI. And GenAI is given
        # some images in another size.
        images = [GOLDEN.image(name) for name in names]
        if all(image.height <= image.width and fit_to_genai(image, TINY) is image for image in images):
            assert tokens == GOLDEN.cases[case]["greedy"], case
            equal.append(case)
    assert {"text_only", "image_start", "wide", "same_shape_twice", "multi_turn"} == {*equal}


@pytest.mark.genai
def test_why_a_tall_image_differs(continuous_batching, models, processors):
    """64 x 480: the tokens of GenAI differ from the golden ones by the pixels alone, which have up to 4 grey levels more or less.

    GenAI resizes columns first, as Pillow did until version 12. Pillow 13, with which the golden was made, resizes the
    rows of a tall image first.
    """
    model, processor = models[GOLDEN.name], processors[GOLDEN.name]
    golden, genai = GOLDEN.cases["tall"]["greedy"], continuous_batching["tall"]
    recorded = torch.from_numpy(GOLDEN.arrays["pixel_values/img1_64x480"])[None]
    columns_first = as_genai_resizes(["img1_64x480"], processor)
    assert fit_to_genai(GOLDEN.image("img1_64x480"), TINY).size == (64, 480)
    assert answer_to("tall", recorded, model, processor) == golden
    assert answer_to("tall", columns_first, model, processor) == genai
    assert [a == b for a, b in zip(golden, genai)].index(False) == 16
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    levels = ((recorded - columns_first) * std * 255).abs()
    assert 0 < levels.max() <= 4.01


def normalized(images: list[np.ndarray], processor) -> torch.Tensor:
    mean, std = (
        np.array(values)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    values = [torch.from_numpy(((tiles / 255 - mean) / std).astype(np.float32)) for tiles in images]
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def test_stock_optimum_intel_swaps_height_and_width():
    """Right for a grid that is square, wrong or an error for all others. If this fails, the host is cured: say so."""
    stock = modeling_visual_language._OVLlavaNextForCausalLM
    config = LlavaNextConfig(image_grid_pinpoints=[[height, width] for width, height in TINY.pinpoints])
    config.vision_config.image_size, config.vision_config.patch_size = 56, 14
    newline = torch.full((2,), -1.0)

    def packed(size):
        features = torch.arange(TINY.num_tiles(size) * 32.0).reshape(-1, 16, 2)
        image_sizes = torch.tensor([size[::-1]])
        theirs, _ = stock.pack_image_features(SimpleNamespace(config=config), [features], image_sizes, newline)
        return theirs, TINY.pack(features, size, newline)

    assert TINY.grid((300, 200)) == (2, 2)
    torch.testing.assert_close(*packed((300, 200)), rtol=0, atol=0)
    for size in [(64, 480), (480, 64), (100, 50), (50, 100)]:
        theirs, original = packed(size)
        assert theirs.shape != original.shape or not torch.equal(theirs, original)


@pytest.mark.parametrize("size", [(1, 50), (1400, 55)], ids=str)
def test_an_image_without_a_patch_is_refused_for_genai_by_name(bundles, processors, size):
    """GenAI itself says `current_width > padding * 2`. Ours answers about the squashed image."""
    image, processor = Image.new("RGB", size, "red"), processors[GOLDEN.name]
    with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} pixels.*use the openvino engine"):
        image_tensor(image, processor)
    model = OVModelForLlava.from_pretrained(bundles[GOLDEN.name], ov_config=EXACT)
    assert isinstance(model.chat(processor, max_new_tokens=2).send(QUESTION, images=[image]).result(), str)
