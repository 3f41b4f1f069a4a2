"""Tokenizers made from `tokenizer.model` give the original's ids, in transformers and in OpenVINO."""

import gzip
import json
import re
import shutil
from itertools import chain, pairwise
from types import SimpleNamespace

import openvino
import openvino_genai
import pytest
from conftest import GOLDEN, Golden
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.sentencepiece import load_sentencepiece_tokenizer
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError
from optimum_llava_ov.export.tokenizers import export_tokenizers


# variant: folder, arguments
VARIANTS = {
    "llava15_vicuna": ("llava15_vicuna/checkpoint", {"use_im_patch": False}),
    "llava15_vicuna_borders": ("llava15_vicuna/checkpoint", {"use_im_start_end": True}),
    "llava1_llama2chat": ("llava1_llama2chat/checkpoint", {"use_im_start_end": True}),
    "llava16_mistral_anyres": ("llava16_mistral_anyres/checkpoint", {"use_im_patch": False, "fast": True}),
    "yi_tokenizer": ("yi_tokenizer", {}),
}
GOLDENS = ["llava15_vicuna", "llava1_llama2chat", "llava16_mistral_anyres"]
by_variant = pytest.mark.parametrize("variant", VARIANTS)
by_golden = pytest.mark.parametrize("variant", GOLDENS)

BYTE = "<0x[0-9A-F]{2}>"  # how the vocabulary writes one
# The pieces of protobuf that change a field of tokenizer.model, appended to the file
UNIGRAM = b"\x12\x02\x18\x01"
NO_BYTES = b"\x12\x03\x98\x02\x00"
CHARSMAP = b"\x1a\x05\x12\x03abc"
REMOVES_SPACES = b"\x1a\x02\x20\x01"
UNUSED_PIECE = b"\x0a\x07\x0a\x03xyz\x18\x05"


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "tokenization.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def tokenizers():
    return {
        name: load_sentencepiece_tokenizer(Repository(str(GOLDEN / folder)), **arguments)
        for name, (folder, arguments) in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def exported(tokenizers, tmp_path_factory):
    """Folders with the tokenizers as OpenVINO models."""
    folders = {}
    for name, tokenizer in tokenizers.items():
        folders[name] = tmp_path_factory.mktemp(name)
        export_tokenizers(SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages }}"), folders[name])
    return folders


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden's tokenizer files, to be damaged."""
    return shutil.copytree(GOLDEN / "llava15_vicuna" / "checkpoint", tmp_path / "checkpoint")


def original(ids, tokenizer):
    """Ids with the original's -200 for an image."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [-200 if id == image else id for id in ids]


def openvino_ids(folder, texts):
    outputs = openvino.Core().compile_model(folder / "openvino_tokenizer.xml", "CPU")(texts)
    return [ids[mask == 1].tolist() for ids, mask in zip(outputs["input_ids"], outputs["attention_mask"])]


@by_variant
def test_random_prompts_have_the_originals_ids(variant, tokenizers, table):
    tokenizer = tokenizers[variant]
    ids = tokenizer(table["prompts"])["input_ids"]
    assert len(ids) == 2000
    assert [original(row, tokenizer) for row in ids] == table["ids"][variant]


@by_golden
def test_golden_texts_have_the_originals_ids(variant, tokenizers):
    golden = json.loads((GOLDEN / variant / "cases.json").read_text())
    texts = [(entry["text"], entry["ids"]) for entry in golden["tokenization"]]
    texts += [(case["prompt"], case["input_ids"]) for case in golden["cases"].values()]
    different = [
        text for text, ids in texts if original(tokenizers[variant](text)["input_ids"], tokenizers[variant]) != ids
    ]
    assert different == ["", "<image>", "<s>abc</s>def"]  # on purpose, see the next test


@by_variant
def test_bos_is_there_exactly_once(variant, tokenizers):
    tokenizer = tokenizers[variant]
    bos = [] if variant == "yi_tokenizer" else [tokenizer.bos_token_id]
    image = tokenizer.convert_tokens_to_ids("<image>")
    for options in ({}, {"add_special_tokens": False}):
        assert tokenizer("Hello", **options)["input_ids"][: len(bos)] == bos
        assert tokenizer("Hello", **options)["input_ids"][len(bos)] != tokenizer.bos_token_id
        if bos:
            assert tokenizer("<s>Hello", **options) == tokenizer("Hello", **options)
        assert tokenizer("<image><image>", **options)["input_ids"] == [*bos, image, image]
        for token in ("<image>", "</s>" if bos else "<|im_end|>"):
            assert tokenizer(token, **options)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


@by_variant
def test_image_token_comes_after_all_others(variant, tokenizers, table):
    tokenizer = tokenizers[variant]
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    assert (tokenizer.convert_tokens_to_ids("<im_patch>") != tokenizer.unk_token_id) == (
        VARIANTS[variant][1].get("use_im_patch", True)
    )


def test_as_many_image_tokens_as_the_processor_writes(tokenizers):
    tokenizer = tokenizers["llava15_vicuna"]
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
    )
    image = Golden("linear_fp16_sharded").image("img0_300x200")
    text = "USER: <image>\nWhat is this? ASSISTANT:"
    expected = [[id] * 16 if id == 600 else [id] for id in tokenizer(text)["input_ids"]]
    assert processor(text=text, images=image)["input_ids"] == [list(chain(*expected))]


@by_variant
def test_saved_tokenizer_is_the_same(variant, tokenizers, table, tmp_path):
    tokenizer = tokenizers[variant]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(table["prompts"])["input_ids"] == tokenizer(table["prompts"])["input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.padding_side == "left"


@by_variant
def test_openvino_gives_the_same_ids(variant, tokenizers, exported, table):
    tokenizer = tokenizers[variant]
    found = openvino_ids(exported[variant], table["prompts"])
    different = [
        text
        for text, ids, row in zip(table["prompts"], table["ids"][variant], found)
        if original(row, tokenizer) != ids
    ]
    # openvino_tokenizers takes the text <0x0A> for the byte that the vocabulary writes so
    assert different == [text for text in table["prompts"] if re.search(BYTE, text)]
    assert len(different) < 100


@by_variant
def test_openvino_has_bos_once_too(variant, tokenizers, exported):
    texts = ["<s>Hello", "<image>", "</s>", "<image><image>", "<s>", "<image>\n<image>\nHello</s><s>[INST]"]
    assert openvino_ids(exported[variant], texts) == tokenizers[variant](texts)["input_ids"]


@by_variant
def test_genai_encodes_and_decodes_as_transformers(variant, tokenizers, exported, table):
    tokenizer, genai = tokenizers[variant], openvino_genai.Tokenizer(exported[variant])
    rows = [(text, ids) for text, ids in zip(table["prompts"], table["ids"][variant]) if not re.search(BYTE, text)]
    texts, expected = map(list, zip(*rows))
    for add_special_tokens in (False, True):
        encoded = genai.encode(texts, add_special_tokens=add_special_tokens)
        found = [ids[mask == 1].tolist() for ids, mask in zip(encoded.input_ids.data, encoded.attention_mask.data)]
        assert [original(row, tokenizer) for row in found] == expected
    answers = [[id for id in row if id != -200] for row in expected[:50]]
    for skip_special_tokens in (False, True):
        decoded = tokenizer.batch_decode(answers, skip_special_tokens=skip_special_tokens)
        assert [genai.decode(row, skip_special_tokens=skip_special_tokens) for row in answers] == decoded


def test_tokenizer_without_rules_is_exported_too(tmp_path):
    processor = build_processor(OriginalCheckpoint.open(Golden("linear_fp16_sharded").checkpoint))
    export_tokenizers(processor, tmp_path)
    texts = [case["prompt"] for case in Golden("linear_fp16_sharded").cases.values()]
    texts = [text.replace("<im_start><image><im_end>", "<image>") for text in texts] + ["  a\n\n<image>😀"]
    assert openvino_ids(tmp_path, texts) == processor.tokenizer(texts)["input_ids"]
    genai = openvino_genai.Tokenizer(tmp_path)
    assert genai.decode(processor.tokenizer("Hello there")["input_ids"]) == "Hello there"
    assert genai.chat_template == processor.chat_template


@by_variant
def test_decoded_text_is_what_was_encoded(variant, tokenizers):
    tokenizer = tokenizers[variant]
    text = "  Two spaces, a\ttab, 你好 😀\n\n    indented\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == (text[1:] if variant == "yi_tokenizer" else text)


def test_decoding_skips_special_tokens_only(tokenizers):
    tokenizer = tokenizers["llava1_llama2chat"]
    ids = tokenizer("A photo.</s>USER: <im_start><image><im_end> hi")["input_ids"]
    assert tokenizer.decode(ids) == "<s> A photo.</s> USER: <im_start><image><im_end>  hi"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A photo. USER: <im_start><im_end>  hi"


def test_answer_grows_token_by_token(tokenizers):
    """Of an answer's first token only one space is dropped, and no later space is."""
    tokenizer = tokenizers["llava15_vicuna"]
    ids = tokenizer("A red boat  on the water.")["input_ids"][1:]
    texts = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    assert texts[-1] == "A red boat  on the water."
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))


def append(checkpoint, data):
    with open(checkpoint / "tokenizer.model", "ab") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (UNIGRAM, "unigram model"),
        (NO_BYTES, "byte_fallback"),
        (CHARSMAP, "precompiled_charsmap"),
        (REMOVES_SPACES, "remove_extra_whitespaces"),
        (UNUSED_PIECE, "pieces that are not in use"),
    ],
)
def test_other_models_are_refused(checkpoint, field, reason):
    append(checkpoint, field)
    with pytest.raises(UnsupportedCheckpointError, match=reason) as error:
        load_sentencepiece_tokenizer(Repository(str(checkpoint)))
    assert str(checkpoint / "tokenizer.model") in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n", "download it again"),
        (b"{}", "download it again"),
        (b"\x0a\x05\x0a\x03<s>", "ends before it says how it was trained"),
        (b"\x0a\x05\x0a\x03<s>" + UNIGRAM + CHARSMAP, "0 pieces for what is unknown"),
        (b"\x0a\x07\x0a\x03<s>\x18\x02" * 2 + UNIGRAM + CHARSMAP, "'<s>' is there twice"),
        (b"\x08\x01", "download it again"),
        (b"\x0a\x02\x08\x01", "download it again"),
        (b"\x0a\x04\x0a\x02\xff\xff", "download it again"),
    ],
)
def test_damaged_model_is_an_error(checkpoint, content, reason):
    (checkpoint / "tokenizer.model").write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match=reason):
        load_sentencepiece_tokenizer(Repository(str(checkpoint)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_model_is_an_error(checkpoint, share):
    data = (checkpoint / "tokenizer.model").read_bytes()
    (checkpoint / "tokenizer.model").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InvalidCheckpointError, match="it ends"):
        load_sentencepiece_tokenizer(Repository(str(checkpoint)))


def test_missing_model_is_an_error(checkpoint):
    (checkpoint / "tokenizer.model").unlink()
    with pytest.raises(InvalidCheckpointError, match=r"no tokenizer.model"):
        load_sentencepiece_tokenizer(Repository(str(checkpoint)))


def change(checkpoint, name, **values):
    file = checkpoint / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


@pytest.mark.parametrize(
    ("values", "error", "reason"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, UnsupportedCheckpointError, "T5Tokenizer"),
        ({"add_eos_token": True}, UnsupportedCheckpointError, "add_eos_token"),
        ({"added_tokens_decoder": {"600": {"content": "<x>", "lstrip": True}}}, UnsupportedCheckpointError, "lstrip"),
        ({"added_tokens_decoder": {"600": {"text": "<x>"}}}, InvalidCheckpointError, "describe a token as .*'<x>'"),
        ({"added_tokens_decoder": ["<x>"]}, InvalidCheckpointError, "not given as ids and tokens"),
        (
            {"added_tokens_decoder": {"first": {"content": "<x>"}}},
            InvalidCheckpointError,
            "not given as ids and tokens",
        ),
        ({"added_tokens_decoder": {"600": {"content": "<image>"}}}, UnsupportedCheckpointError, "already a token"),
        ({"added_tokens_decoder": {"650": {"content": "<x>"}}}, InvalidCheckpointError, "the id 650, but .* 600"),
    ],
)
def test_settings_that_do_not_fit_are_an_error(checkpoint, values, error, reason):
    change(checkpoint, "tokenizer_config.json", **values)
    with pytest.raises(error, match=reason):
        load_sentencepiece_tokenizer(Repository(str(checkpoint)), use_im_patch=False)


@pytest.mark.parametrize("content", ["[]", "{", "\ufeff"])
def test_damaged_settings_are_an_error(checkpoint, content):
    (checkpoint / "tokenizer_config.json").write_text(content)
    with pytest.raises(InvalidCheckpointError, match=r"tokenizer_config\.json"):
        load_sentencepiece_tokenizer(Repository(str(checkpoint)))


def test_added_tokens_get_their_ids(checkpoint):
    change(checkpoint, "added_tokens.json", **{"<im_patch>": 601, "[PAD]": 600})
    change(checkpoint, "special_tokens_map.json", pad_token="[PAD]")
    tokenizer = load_sentencepiece_tokenizer(Repository(str(checkpoint)), use_im_start_end=True)
    tokens = ["[PAD]", "<im_patch>", "<im_start>", "<im_end>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [600, 601, 602, 603, 604]
    assert tokenizer.pad_token == "[PAD]"


def test_legacy_is_the_default(checkpoint):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del settings["legacy"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_sentencepiece_tokenizer(Repository(str(checkpoint)))
    assert tokenizer.tokenize("</s>USER") == ["<s>", "</s>", "▁USER"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a</s>USER")["input_ids"])[-2:] == ["</s>", "▁USER"]
