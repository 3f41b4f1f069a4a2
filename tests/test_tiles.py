"""LLaVA-1.6 from checkpoint to answer: an image in tiles gives the logits, tokens and rows of the original."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden, fill_hub_cache, run
from optimum.intel import OVModelForVisualCausalLM
from optimum.intel.openvino import modeling_visual_language
from safetensors.torch import load_file, save_file
from test_anyres import IMAGES, TINY, noise
from test_chat import ask, prefill
from test_golden import FEATURES_TOLERANCE, GREEDY, LOGITS_TOLERANCE
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

from optimum_llava_ov import OriginalLlavaForConditionalGeneration, OVModelForLlava
from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import InvalidCheckpointError


GOLDEN = Golden("llava16_mistral_anyres")
by_case = pytest.mark.parametrize("case", GOLDEN.cases)


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles[GOLDEN.name]


@pytest.fixture(scope="module")
def model(models):
    return models[GOLDEN.name]


@pytest.fixture(scope="module")
def processor(processors):
    return processors[GOLDEN.name]


@pytest.fixture(params=["torch", "openvino"])
def any_model(request, torch_models, models):
    return (torch_models if request.param == "torch" else models)[GOLDEN.name]


def recorded_pixels(names: list[str]) -> torch.Tensor:
    """The original's pixels, so that the version of Pillow does not matter: `(images, tiles, 3, height, width)`."""
    images = [torch.from_numpy(GOLDEN.arrays[f"pixel_values/{name}"]) for name in names]
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True)


def inputs_of(case: str, processor):
    expected = GOLDEN.cases[case]
    inputs = processor(text=expected["prompt"], images=GOLDEN.images(case), return_tensors="pt")
    if expected["images"]:
        inputs["pixel_values"] = recorded_pixels(expected["images"])
    return inputs


@by_case
def test_logits_and_tokens(case, any_model, processor, request):
    """With the processor of transformers for OpenVINO, which counts other rows in `unpad_float`; with ours for torch."""
    if any_model is request.getfixturevalue("torch_models")[GOLDEN.name]:
        processor = build_processor(OriginalCheckpoint.open(GOLDEN.checkpoint))
    expected, inputs = GOLDEN.cases[case], inputs_of(case, processor)
    with torch.no_grad():
        logits = any_model(**inputs).logits[0, :, :-1].numpy()
    assert len(logits) == expected["merged_len"]
    if f"{case}/logits" in GOLDEN.arrays:
        assert np.abs(logits - GOLDEN.arrays[f"{case}/logits"]).max() < LOGITS_TOLERANCE
    else:
        assert np.abs(logits[-1:] - GOLDEN.arrays[f"{case}/logits_last"]).max() < LOGITS_TOLERANCE
    output = any_model.generate(**inputs, **GREEDY)
    assert output[0].tolist() == inputs["input_ids"][0].tolist() + expected["greedy"]


def test_rows_of_images(any_model):
    sizes = [GOLDEN.image(name).size for name in IMAGES]
    image_sizes = torch.tensor([[height, width] for width, height in sizes])
    with torch.no_grad():
        rows = any_model.get_image_features(recorded_pixels(IMAGES), image_sizes)
    for name, features in zip(IMAGES, rows):
        expected = GOLDEN.arrays[f"image_features/{name}"][0]
        assert features.shape == expected.shape
        assert np.abs(features.numpy() - expected).max() < FEATURES_TOLERANCE


@pytest.mark.parametrize("case", ["wide", "two_adjacent", "unpad_float", "multi_turn_two_images"])
def test_prompts_of_the_original_code(case, model):
    """-200 for an image, `images=` with the tiles of each image, and `image_sizes=` with width and height."""
    expected = GOLDEN.cases[case]
    images = [torch.from_numpy(GOLDEN.arrays[f"pixel_values/{name}"]) for name in expected["images"]]
    ids = torch.tensor([expected["input_ids"]])
    output = model.generate(ids, images=images, image_sizes=expected["image_sizes"], **GREEDY)
    assert output[0].tolist() == expected["input_ids"] + expected["greedy"]


def test_batch_of_images_of_all_sizes_and_of_none(any_model, processor):
    """Sequences with one image, two, and none, padded on the left, give what each gives alone. So do beams."""
    cases = ["wide", "text_only", "two_images", "small", "multi_turn_two_images"]
    prompts = [GOLDEN.cases[case]["prompt"] for case in cases]
    names = [name for case in cases for name in GOLDEN.cases[case]["images"]]
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=prompts, images=[GOLDEN.image(name) for name in names], return_tensors="pt", padding=True)
    inputs["pixel_values"] = recorded_pixels(names)
    output = any_model.generate(**inputs, **GREEDY)
    assert [row[-32:].tolist() for row in output] == [GOLDEN.cases[case]["greedy"] for case in cases]

    beams = {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    together = any_model.generate(**inputs, **beams)[:, -8:].tolist()
    alone = [any_model.generate(**inputs_of(case, processor), **beams)[0, -8:].tolist() for case in cases]
    assert together == alone


def test_tiles_are_encoded_once_and_in_small_batches(model, monkeypatch):
    from optimum_llava_ov.runtime.modeling import MAX_IMAGES_AT_ONCE

    batches, encoder = [], model.vision_embeddings
    monkeypatch.setattr(model, "vision_embeddings", lambda pixels: batches.append(len(pixels)) or encoder(pixels))
    names = IMAGES * 2
    sizes = torch.tensor([GOLDEN.image(name).size[::-1] for name in names])
    model.get_image_features(recorded_pixels(names), sizes)
    different = {tile.tobytes() for name in IMAGES for tile in GOLDEN.arrays[f"pixel_values/{name}"]}
    assert sum(batches) == len(different)
    assert max(batches) <= MAX_IMAGES_AT_ONCE < sum(batches)


def test_image_sizes_are_needed(any_model, processor):
    inputs = inputs_of("wide", processor)
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match=r"image_sizes has 0 sizes for 1 image\(s\)"):
        any_model.generate(**inputs, max_new_tokens=1)


def test_a_conversation_with_an_image_in_each_turn(model, processor, monkeypatch):
    """Token for token as the whole prompt, and an image that was seen is not encoded again."""
    encoded, original = [], model.get_image_features
    first, second = GOLDEN.image("img0_300x200"), noise((75, 230))
    chat = model.chat(processor, max_new_tokens=8, eos_token_id=None, stop_strings=None)
    for text, images in [
        ("What is this?", [first]),
        ("And this?", [second]),
        ("Which is larger?", []),
        ("Look again.", [first]),
    ]:
        monkeypatch.setattr(
            model, "get_image_features", lambda *args, **kw: encoded.append(1) or original(*args, **kw)
        )
        _, tokens = ask(chat, text, images)
        monkeypatch.undo()
        assert tokens == prefill(model, processor, chat.messages[:-1], max_new_tokens=8, eos_token_id=None)
    assert len(encoded) == 2


def test_where_transformers_counts_otherwise(processor):
    """The placeholders of transformers' processor, which a prompt may have, are computed as there."""
    for size in [(376, 94), (142, 285), (50, 40), (300, 200), (1, 900), (640, 480), (7, 7)]:
        expected = processor._get_number_of_features(size[1], size[0], 56, 56)
        assert TINY.num_placeholders(size) == expected
    assert TINY.num_placeholders((376, 94)) != TINY.num_image_tokens((376, 94))


def test_resolutions_in_the_order_of_each_reader(bundle):
    """transformers and optimum-intel expect height before width, GenAI width before height."""
    original = [list(pinpoint) for pinpoint in TINY.pinpoints]
    turned = [pinpoint[::-1] for pinpoint in original]
    read = {
        name: json.loads((bundle / f"{name}.json").read_text())
        for name in ("config", "processor_config", "preprocessor_config")
    }
    assert read["config"]["image_grid_pinpoints"] == turned
    assert read["processor_config"]["image_processor"]["image_grid_pinpoints"] == turned
    assert read["preprocessor_config"]["image_grid_pinpoints"] == original
    assert read["config"]["model_type"] == "llava_next"
    assert len(read["config"]["image_newline"]) == read["config"]["text_config"]["hidden_size"]


@pytest.mark.parametrize("merge_type", ["spatial_unpad", "spatial", "flat"])
def test_rows_in_the_order_of_the_merge_type(merge_type, bundle, processor, tmp_path):
    """The order, step by step, against what the prompt gets. The graphs of a bundle are the same for all merge types."""
    folder = shutil.copytree(bundle, tmp_path / merge_type)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mm_patch_merge_type": merge_type}))
    model = OVModelForLlava.from_pretrained(folder, ov_config=EXACT)
    inputs = inputs_of("wide", processor)  # 300 x 200: two rows of two tiles, the first and the last row only padding
    base, *tiles = model.get_vision_embeddings(inputs["pixel_values"][0])
    newline = torch.tensor(model.config.image_newline)
    rows = [base[index] for index in range(16)]
    if merge_type == "flat":
        rows += [tile[index] for tile in tiles for index in range(16)]
    else:
        for y in range(8):
            if merge_type == "spatial" or 1 <= y < 7:
                rows += [tiles[2 * (y // 4) + x // 4][4 * (y % 4) + x % 4] for x in range(8)]
                rows += [newline] if merge_type == "spatial_unpad" else []

    ids = GOLDEN.cases["wide"]["input_ids"]
    text = torch.tensor([[token for token in ids if token >= 0]])
    embeds = torch.from_numpy(np.array(model.get_text_embeddings(text)))[0]
    position = ids.index(-200)
    embeds = torch.cat([embeds[:position], torch.stack(rows), embeds[position:]])
    expected = model(inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds))).logits
    logits = model(**inputs).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def yi_checkpoint(tmp_path_factory):
    """What is peculiar to LLaVA-1.6-34B, in small: Yi's tokenizer without BOS, its end of a turn, groups of 7 heads, one head for
    keys and values, its frequencies. The resolutions are a string.
    """
    folder = shutil.copytree(GOLDEN.folder, tmp_path_factory.mktemp("yi") / "llava-v1.6-34b")
    checkpoint = folder / "checkpoint"
    for file in [*checkpoint.glob("*.safetensors*"), *checkpoint.glob("*token*")]:
        file.unlink()
    for file in (GOLDEN.folder.parent / "yi_tokenizer").iterdir():
        shutil.copy(file, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text()) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "_name_or_path": "./checkpoints/llava-v1.6-34b",
        "bos_token_id": 1,
        "eos_token_id": 7,
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_theta": 5000000.0,
        "vocab_size": 640,
        "unfreeze_mm_vision_tower": False,
        "image_grid_pinpoints": str([tuple(pinpoint) for pinpoint in TINY.pinpoints]),
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (640, 56), "norm.weight": (56,), "image_newline": (56,)}
    shapes |= {"mm_projector.0.weight": (56, 32), "mm_projector.2.weight": (56, 56)}
    shapes |= {"mm_projector.0.bias": (56,), "mm_projector.2.bias": (56,)}
    for layer in range(3):
        sides = {
            "self_attn.q_proj": (56, 56),
            "self_attn.k_proj": (8, 56),
            "self_attn.v_proj": (8, 56),
            "self_attn.o_proj": (56, 56),
        }
        sides |= {"mlp.gate_proj": (176, 56), "mlp.up_proj": (176, 56), "mlp.down_proj": (56, 176)}
        sides |= {"input_layernorm": (56,), "post_attention_layernorm": (56,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in sides.items()}
    tensors = {f"model.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    tensors["lm_head.weight"] = torch.randn(640, 56, generator=generator)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    return checkpoint


def test_the_numbers_of_yi(yi_checkpoint):
    """Against transformers' LlamaForCausalLM, which gets the embeddings of prompt and image in the original's order."""
    checkpoint = OriginalCheckpoint.open(yi_checkpoint)
    assert checkpoint.choice.conversation.name == "chatml_direct"
    model = OriginalLlavaForConditionalGeneration.from_checkpoint(checkpoint, dtype=torch.float32)
    assert model.generation_config.eos_token_id == [7]
    processor = build_processor(checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = GOLDEN.image("img1_64x480")
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    ids = inputs["input_ids"]
    assert ids[0, 0] == checkpoint.tokenizer.convert_tokens_to_ids("<|im_start|>")  # no BOS
    is_image = ids == model.config.image_token_id
    assert is_image.sum() == TINY.num_image_tokens(image.size)

    tensors = {name: tensor.float() for name, tensor in load_file(yi_checkpoint / "model.safetensors").items()}
    config = LlamaConfig(
        hidden_size=56, intermediate_size=176, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1, vocab_size=640,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        (rows,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        embeds = reference.model.embed_tokens(ids.clamp(max=639))
        embeds[is_image] = rows
        expected = reference(inputs_embeds=embeds).logits
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[..., :640], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rows[-1], tensors["model.image_newline"])


@pytest.fixture
def without_tokenizer(yi_checkpoint, tmp_path):
    """The checkpoint without its tokenizer, and the tokenizer in a folder of its own. Both are found by the latter's parent."""
    shutil.copytree(yi_checkpoint.parent, tmp_path / "models")
    checkpoint, tokenizer = tmp_path / "models" / "checkpoint", tmp_path / "models" / "yi"
    tokenizer.mkdir()
    for file in checkpoint.glob("tokenizer*"):
        file.rename(tokenizer / file.name)
    return checkpoint


def test_a_tokenizer_beside_the_checkpoint(without_tokenizer, yi_checkpoint):
    """The original's 34B also has one in a repository of its own. It is found by its name."""
    with pytest.raises(
        InvalidCheckpointError, match=r'has no tokenizer\.model.*checkpoint-tokenizer.*{"tokenizer": "<'
    ):
        OriginalCheckpoint.open(without_tokenizer)
    shutil.copytree(without_tokenizer.parent / "yi", without_tokenizer.parent / "checkpoint-tokenizer")
    found, expected = OriginalCheckpoint.open(without_tokenizer), OriginalCheckpoint.open(yi_checkpoint)
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert found.config.eos_token_id == [7]
    assert found.tokenizer_place.repository.folder.name == "checkpoint-tokenizer"
    assert "itself has no tokenizer.model" in found.tokenizer_place.reason
    assert expected.tokenizer_place.is_own


def test_a_tokenizer_on_the_hub(without_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models, cache = without_tokenizer.parent, tmp_path / "cache"
    (models / "yi" / "config.json").write_text("{}")
    repositories = {"liuhaotian/llava-v1.6-34b": without_tokenizer, "openai/clip": models / "clip"}
    fill_hub_cache(cache / "alone", repositories)
    name = "liuhaotian/llava-v1.6-34b-tokenizer"
    with pytest.raises(InvalidCheckpointError, match=f"no tokenizer is beside it: '{name}' has no tokenizer.model"):
        OriginalCheckpoint.open("liuhaotian/llava-v1.6-34b", cache_dir=cache / "alone", local_files_only=True)
    fill_hub_cache(cache / "both", repositories | {name: models / "yi"})
    found = OriginalCheckpoint.open("liuhaotian/llava-v1.6-34b", cache_dir=cache / "both", local_files_only=True)
    assert (found.tokenizer_place.repository.name, found.tokenizer_place.repository.revision) == (name, "0" * 40)


def test_a_tokenizer_that_the_user_names(without_tokenizer, yi_checkpoint, tmp_path):
    """The export says which it is, and so does the card. The bundle is that of a checkpoint with its own tokenizer."""
    tokenizer = without_tokenizer.parent / "yi"
    options = ["--model-kwargs", json.dumps({"tokenizer": str(tokenizer)})]
    result = run("optimum-cli", "export", "openvino", "--model", without_tokenizer, *options, tmp_path / "bundle")
    assert f"Tokenizer: {tokenizer}. It was chosen by name." in result.stderr
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert """--model-kwargs '{"tokenizer": "yi", "conversation": "chatml_direct"}'""" in card
    expected = build_processor(OriginalCheckpoint.open(yi_checkpoint)).tokenizer
    for text in GOLDEN.cases["text_only"]["prompt"], "<|im_start|>user\n<image>\nWhat?<|im_end|>":
        loaded = AutoProcessor.from_pretrained(tmp_path / "bundle").tokenizer
        assert loaded(text)["input_ids"] == expected(text)["input_ids"]
    generation = json.loads((tmp_path / "bundle" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"]) == ([7], 1)


def test_the_class_of_the_host_chooses_ours(bundle):
    """`OVModelForVisualCausalLM` loads our bundles into our class. `test_tiles_of_others.py` has those of others."""
    stock = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING["llava_next"]
    ours = OVModelForVisualCausalLM.from_pretrained(bundle)
    assert type(ours) is OVModelForLlava
    assert isinstance(ours, stock)
