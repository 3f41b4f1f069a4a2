"""Whatever comes in as a checkpoint, it is converted, or refused in one sentence that names the file or the option."""

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Golden, fill_hub_cache
from transformers import AutoConfig

from optimum_llava_ov import (
    BundleError,
    InvalidCheckpointError,
    LlavaMptConfig,
    LlavaMptForConditionalGeneration,
    OVModelForLlavaMPT,
    UnsupportedCheckpointError,
    main_export,
)
from optimum_llava_ov.bundle.card import card_text, source_license
from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.bundle.settings import build_config, build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, is_original_checkpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_tensors
from optimum_llava_ov.checkpoint.vision_tower import find_vision_tower
from optimum_llava_ov.export.finite import check_finite
from optimum_llava_ov.loading import session_factory


NAN, INFINITE = float("nan"), float("inf")
CONFIG, TOWER, PROCESSOR = "checkpoint/config.json", "clip/config.json", "clip/preprocessor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "checkpoint/tokenizer.json", "checkpoint/tokenizer_config.json"
INDEX, SHARD = "checkpoint/pytorch_model.bin.index.json", "checkpoint/pytorch_model-00002-of-00003.bin"
TOWER_WEIGHTS = "clip/model.safetensors"


def copy_of(golden: str, folder: Path) -> Path:
    """A golden checkpoint and its tower, whose files are links that can be replaced."""
    ignored = shutil.ignore_patterns("arrays.npz", "images", "cases.json")
    link = lambda source, target: os.symlink(os.path.abspath(source), target)  # noqa: E731
    return shutil.copytree(Golden(golden).folder, folder / golden, copy_function=link, ignore=ignored)


@pytest.fixture
def folder(tmp_path):
    return copy_of("linear_fp16_sharded", tmp_path)


def write(name: str, content: bytes | str):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def change(name: str, part: str | None = None, **options):
    """Set options of a file of JSON, or of an object in it."""

    def damage(folder):
        values = json.loads((folder / name).read_text())
        (values[part] if part else values).update(options)
        write(name, json.dumps(values))(folder)

    return damage


def config(**options):
    return change(CONFIG, **options)


def attention(**options):
    return change(CONFIG, "attn_config", **options)


def tower(**options):
    return change(TOWER, "vision_config", **options)


def processor(**options):
    return change(PROCESSOR, **options)


def cut(name: str, share: float = 0.5):
    return lambda folder: write(name, (content := (folder / name).read_bytes())[: int(len(content) * share)])(folder)


def flip(name: str, place: float):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * place)] ^= 0xFF
        write(name, bytes(content))(folder)

    return damage


def as_folder(name: str):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def saved(name: str, content):
    def damage(folder):
        (folder / name).unlink()
        torch.save(content, folder / name)

    return damage


def tensors(function, name: str = SHARD):
    """Change the tensors of a shard; `function` takes the dictionary."""

    def damage(folder):
        content = torch.load(folder / name)
        function(content)
        saved(name, content)(folder)

    return damage


def tensor(name: str, function, file: str = SHARD):
    return tensors(lambda content: content.update({name: function(content[name])}), file)


def indexed(file):
    """Let the index say that a tensor is in another file."""
    return change(INDEX, "weight_map", **{"transformer.norm_f.weight": file})


def compressed(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).unlink()
    (folder / "zip").write_bytes(content)
    with (
        zipfile.ZipFile(folder / "zip") as source,
        zipfile.ZipFile(folder / SHARD, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = b""):
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    return write(TOWER_WEIGHTS, struct.pack("<Q", len(header) if length is None else length) + header + data)


def large(name: str, megabytes: int):
    """Whole JSON, of very many keys."""
    keys = ",".join(f'"k{number}":0' for number in range(megabytes * 100_000))
    return write(name, '{"model_type":"llava_mpt",' + keys + "}")


WQKV, NORM = "transformer.blocks.1.attn.Wqkv.weight", "transformer.blocks.1.norm_2.weight"
NO_JSON = {
    "empty": b"",
    "html": b"<html><body>Not found</body></html>",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "llava_mpt"}'.encode("utf-16"),
    "a list": b'[{"model_type": "llava_mpt"}]',
    "null": b"null",
    "a number": b"3",
    "a string": b'"llava_mpt"',
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "long number": b'{"a":' + b"1" * 5000 + b"}",
    "zeros": bytes(1000),
}
DAMAGES = {
    **{
        f"{file}: {name}": (write(file, content), Path(file).name)
        for file in (CONFIG, TOWER, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, INDEX)
        for name, content in NO_JSON.items()
    },
    **{
        f"{file}: cut": (cut(file), Path(file).name)
        for file in (CONFIG, TOWER, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, INDEX)
    },
    **{
        f"{file}: a folder": (as_folder(file), Path(file).name)
        for file in (CONFIG, TOWER, PROCESSOR, TOKENIZER, SHARD)
    },
    f"{INDEX}: a folder": (as_folder(INDEX), "the weights are not there"),
    # Limits
    f"{CONFIG}: two million keys": (large(CONFIG, 20), "expected at most 1,048,576"),
    f"{PROCESSOR}: two million keys": (large(PROCESSOR, 2), "expected at most 1,048,576"),
    # Options of config.json
    **{
        f"{name}={value!r}"[:60]: (config(**{name: value}), name)
        for name, values in {
            "d_model": ["256", 0, -256, 256.0, 10**12, True, [256]],
            "n_heads": [0, -4, "4", 3, NAN, 10**9],
            "n_layers": [0, -1, "3", 2.5, 10**6, True],
            "vocab_size": ["462", 0, -1, 10**12],
            "max_seq_len": [0, -1, "2048", NAN],
            "expansion_ratio": [0, 4.5, "4", 10**9],
            "attn_config": [[], "alibi", 3],
            "logit_scale": [NAN, INFINITE, -INFINITE, "other", [], {}, 0, True],
            "no_bias": [False, None, "true"],
            "mm_hidden_size": ["64", 0, 96],
            "mm_vision_select_layer": ["-2", 2.0, [-2, -3], 10**9, -9],
            "mm_vision_tower": [3, [], "", "\0", "a" * 5000, "a/" * 500, "\ud800"],
            "mm_projector_type": [3, {}, "mlp1000000000x_gelu", "mlp-1x_gelu", "mlpx_gelu", "mlp٣x_gelu"],
            "image_aspect_ratio": [{}, 3, "anyres"],
            "model_type": [3, ["llava_mpt"], "x" * 100_000],
        }.items()
        for value in values
    },
    **{
        f"attn_config.{name}={value!r}": (attention(**{name: value}), f"attn_config.{name}")
        for name, values in {
            "alibi_bias_max": [7.5, 8.0, 0, -8, "8", NAN, INFINITE, 10**9, True],
            "clip_qkv": [NAN, INFINITE, "6", -1],
            "softmax_scale": [NAN, INFINITE, "0.1", -1, 0],
            "alibi": [None, "true"],
        }.items()
        for value in values
    },
    # The vision tower
    "tower of no object": (change(TOWER, vision_config=[1]), "vision_config=[1]"),
    "tower of another kind": (change(TOWER, model_type=["clip"]), "only CLIP towers"),
    **{
        f"tower: {name}={value!r}": (tower(**{name: value}), name)
        for name, values in {
            "hidden_size": ["64", 0, 10**12, 65],
            "num_hidden_layers": [0, "3", 10**6],
            "num_attention_heads": [0, 3, "4"],
            "image_size": ["56", 0, 13, [56, 56], 10**9],
            "patch_size": [0, "14", -14],
            "num_channels": [1, 4, "3"],
            "hidden_act": ["owner/act", 3, {}],
            "layer_norm_eps": [NAN, 0, "1e-5"],
            "attention_dropout": ["0", NAN],
        }.items()
        for value in values
    },
    # The image processor
    **{
        f"processor: {name}={value!r}": (processor(**{name: value}), name)
        for name, values in {
            "crop_size": [
                48,
                224,
                "56",
                {"height": 56},
                {"height": 56, "width": 48},
                {"height": 10**9, "width": 10**9},
                [56, 56],
            ],
            "size": ["56", 10**9, {"longest_edge": 56}, {}],
            "do_center_crop": [False, "yes", 3],
            "do_resize": ["yes"],
            "image_mean": [[NAN, 0, 0], [0, 0], 0.5, ["0", "0", "0"]],
            "image_std": [[0, 1, 1], [NAN, 1, 1], [1, 1], [-1, 1, 1], 1],
            "rescale_factor": [NAN, INFINITE, 0, "1/255"],
            "resample": [9, -1, "bicubic"],
        }.items()
        for value in values
    },
    # The tokenizer
    "tokenizer: no model": (write(TOKENIZER, "{}"), "tokenizer.json"),
    "tokenizer: another type": (change(TOKENIZER, "model", type="WordPiece"), "expected 'BPE'"),
    "tokenizer: type of no string": (change(TOKENIZER, "model", type=[1]), "expected 'BPE'"),
    "tokenizer: vocabulary of no object": (change(TOKENIZER, "model", vocab=[]), "tokenizer.json"),
    "tokenizer: no vocabulary": (change(TOKENIZER, "model", vocab={}, merges=[]), "tokenizer.json"),
    "tokenizer: merges of nothing": (change(TOKENIZER, "model", merges=["qq zz"]), "tokenizer.json"),
    "tokenizer: ids of strings": (change(TOKENIZER, "model", vocab={"a": "0"}), "tokenizer.json"),
    "tokenizer: huge ids": (change(TOKENIZER, "model", vocab={"a": 10**30}), "tokenizer.json"),
    "tokenizer: unknown step": (change(TOKENIZER, pre_tokenizer={"type": "Evil"}), "tokenizer.json"),
    "tokenizer: no added tokens": (change(TOKENIZER, added_tokens=[]), "tokenizer"),
    "tokenizer: added tokens of no object": (change(TOKENIZER, added_tokens=[3]), "tokenizer.json"),
    **{
        f"tokenizer: {name}={value!r}": (change(TOKENIZER_CONFIG, **{name: value}), name)
        for name in ("eos_token", "pad_token")
        for value in (3, ["<|endoftext|>"], {"content": 3}, {"text": "x"}, "<|no such token|>", "\ud800")
    },
    # The index
    **{
        f"index: {value!r}": (indexed(value), "pytorch_model.bin.index.json")
        for value in (
            "../pytorch_model.bin",
            "/etc/passwd",
            "a/../../b.bin",
            "..\\b.bin",
            "config.json",
            "README.md",
            "model.safetensors",
            ".bin",
            "",
            "\0.bin",
            3,
            None,
            ["pytorch_model-00001-of-00003.bin"],
        )
    },
    "index: no map": (write(INDEX, "{}"), "is not an index of weights"),
    "index: an empty map": (write(INDEX, '{"weight_map": {}}'), "is not an index of weights"),
    "index: map of no object": (write(INDEX, '{"weight_map": ["a.bin"]}'), "is not an index of weights"),
    "index: no such shard": (indexed("pytorch_model-00009.bin"), "pytorch_model-00009.bin"),
    # Weights in pickles
    "weights: empty": (write(SHARD, b""), SHARD),
    "weights: text": (write(SHARD, "These are not weights."), SHARD),
    "weights: html": (write(SHARD, "<html>"), SHARD),
    "weights: JSON": (write(SHARD, "{}"), SHARD),
    "weights: zeros": (write(SHARD, bytes(10_000)), SHARD),
    "weights: random": (write(SHARD, torch.arange(10_000).mul(7919).to(torch.uint8).numpy().tobytes()), SHARD),
    "weights: pointer of LFS": (
        write(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "Git LFS pointer",
    ),
    "weights: pickle of protocol 4": (write(SHARD, pickle.dumps({"a": 1}, protocol=4)), SHARD),
    "weights: compressed": (compressed, "compressed archive"),
    **{f"weights: cut at {share}": (cut(SHARD, share), SHARD) for share in (0.001, 0.1, 0.9, 0.999)},
    **{f"weights: bytes flipped at {place}": (flip(SHARD, place), SHARD) for place in (0.0, 0.0001, 0.0003, 0.9999)},
    **{
        f"weights: {name}": (saved(SHARD, content), "is not a dictionary of tensors")
        for name, content in {
            "a list": [torch.zeros(2)],
            "a tensor": torch.zeros(2),
            "numbers as names": {1: torch.zeros(2)},
            "another dictionary inside": {"model": {"a": torch.zeros(2)}},
            "strings": {WQKV: "0"},
            "sparse": {WQKV: torch.zeros(2, 2).to_sparse()},
            "without content": {WQKV: torch.zeros(2, 2, device="meta")},
        }.items()
    },
    **{
        f"weights of {dtype}": (tensor(WQKV, lambda weight, dtype=dtype: weight.to(dtype)), "Wqkv.weight is")
        for dtype in (torch.int8, torch.int64, torch.bool, torch.float64, torch.complex64, torch.uint8)
    },
    "weights of another shape": (tensor(WQKV, lambda weight: weight[:, :8].clone()), "expected (768, 256)"),
    "weights turned": (tensor(WQKV, lambda weight: weight.T.contiguous()), "Wqkv.weight is (256, 768)"),
    "a norm that is a number": (tensor(NORM, lambda weight: torch.tensor(1.0)), "norm_2.weight is ()"),
    "no norm": (
        tensors(lambda content: content.pop(NORM)),
        "missing: language_model.transformer.blocks.1.norm_2.weight",
    ),
    "one tensor too many": (
        tensors(lambda content: content.update(more=torch.zeros(1))),
        "not expected: language_model.transformer.more",
    ),
    "a table that is a number": (
        tensors(
            lambda content: content.update({"transformer.wte.weight": torch.tensor(1.0)}),
            "checkpoint/pytorch_model-00003-of-00003.bin",
        ),
        "lm_head.weight is ()",
    ),
    # Weights in safetensors
    "safetensors: empty": (write(TOWER_WEIGHTS, b""), TOWER_WEIGHTS),
    "safetensors: text": (write(TOWER_WEIGHTS, "These are not weights."), TOWER_WEIGHTS),
    "safetensors: cut": (cut(TOWER_WEIGHTS), TOWER_WEIGHTS),
    "safetensors: huge header": (safetensors(b"{}", length=2**63), TOWER_WEIGHTS),
    "safetensors: header beyond the file": (safetensors(b"{}", length=10**6), TOWER_WEIGHTS),
    "safetensors: no JSON": (safetensors(b"{{{{"), TOWER_WEIGHTS),
    "safetensors: a list": (safetensors(b"[]"), TOWER_WEIGHTS),
    "safetensors: unknown type": (
        safetensors({"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}, data=b"0000"),
        TOWER_WEIGHTS,
    ),
    "safetensors: beyond the file": (
        safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        TOWER_WEIGHTS,
    ),
    "safetensors: size that overflows": (
        safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, data=b"0000"),
        TOWER_WEIGHTS,
    ),
    "safetensors: no tensors": (safetensors({}), "missing: image_encoder.features"),
    "safetensors: flipped header": (flip(TOWER_WEIGHTS, 0.00002), TOWER_WEIGHTS),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_by_name(folder, damage, named):
    damage(folder)
    begun = time.monotonic()
    with pytest.raises((UnsupportedCheckpointError, InvalidCheckpointError)) as error:
        LlavaMptForConditionalGeneration.from_pretrained(folder / "checkpoint")
    assert time.monotonic() - begun < 10
    message = str(error.value)
    assert named in message
    assert len(message) < 1500 + 2 * len(str(folder))
    assert message.count("\n") == 0


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


FORBIDDEN = {
    "system": (pickle.dumps(_Calls(os.system, "touch ran"), protocol=2), "posix.system"),
    "eval": (pickle.dumps(_Calls(eval, "open('ran', 'w')"), protocol=2), "eval"),
    "a class": (pickle.dumps(Path("ran"), protocol=2), "pathlib.PosixPath"),
    "system, of protocol 4": (pickle.dumps(_Calls(os.system, "touch ran"), protocol=4), "FRAME"),
    "protocol 0": (b"(S'touch ran'\nios\nsystem\n.", "pickle instruction STRING"),
    "stack global": (b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "STACK_GLOBAL"),
    "call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "call reduce for unrecognized function"),
    "state of a dictionary": (b"\x80\x02}}b.", "Can only build"),
    "a new string": (b"\x80\x02X\x01\x00\x00\x00a)\x81.", "Can only create new object"),
    "items of a list": (b"\x80\x02]X\x01\x00\x00\x00aK\x01s.", "Can only SETITEM"),
    "another reference": (b"\x80\x02X\x01\x00\x00\x00a\x85Q.", "persistent_load"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
@pytest.mark.parametrize(("content", "named"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_forbidden_content_of_a_pickle_is_called_so(tmp_path, monkeypatch, content, named, zipped):
    """Not "truncated, download it again", which would bring the same file."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if zipped:
        torch.save({"a": torch.zeros(1)}, "plain")
        with zipfile.ZipFile("plain") as source, zipfile.ZipFile(file, "w") as target:
            for entry in source.namelist():
                target.writestr(entry, content if entry.endswith("data.pkl") else source.read(entry))
    else:
        file.write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match="holds other objects than tensors and was not loaded") as error:
        map_tensors(file)
    assert named in str(error.value)
    assert "truncated" not in str(error.value)
    assert not Path("ran").exists()


class TestConfigurationsChooseNoCode:
    CHOICES = {
        "_attn_implementation": "owner/kernel@rev",
        "attn_implementation": "owner/kernel",
        "_experts_implementation": "owner/kernel",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForImageTextToText": "evil.Model",
            "AutoTokenizer": ["evil.T", "evil.T"],
        },
        "trust_remote_code": True,
        "num_labels": 10**9,
        "torch_dtype": "system",
        "quantization_config": {"quant_method": "custom"},
        "output_attentions": True,
        "tokenizer_class": "Evil",
        "image_processor_type": "Evil",
        "processor_class": "Evil",
        "chat_template": "{{ evil() }}",
        "text_config": {"_attn_implementation": "owner/kernel"},
    }

    @pytest.mark.parametrize("name", CHOICES)
    def test_of_a_checkpoint(self, folder, name):
        """Every file of it says so, and nothing of it arrives: not at the kernels' loader, not in the bundle's settings."""
        files = (CONFIG, TOKENIZER_CONFIG, TOWER, PROCESSOR)
        for file in files:
            change(file, **{name: self.CHOICES[name]})(folder)
        tower(**{name: self.CHOICES[name]})(folder)
        checkpoint = OriginalCheckpoint.open(folder / "checkpoint")
        LlavaMptForConditionalGeneration.from_checkpoint(checkpoint)
        build_processor(checkpoint).save_pretrained(folder / "bundle")
        build_config(checkpoint).save_pretrained(folder / "bundle")
        expected = OriginalCheckpoint.open(Golden("linear_fp16_sharded").checkpoint)
        build_processor(expected).save_pretrained(folder / "expected")
        build_config(expected).save_pretrained(folder / "expected")
        for file in (folder / "expected").iterdir():
            assert (folder / "bundle" / file.name).read_bytes() == file.read_bytes()

    def test_of_transformers_auto_classes(self, folder):
        config(**self.CHOICES)(folder)
        loaded = AutoConfig.from_pretrained(folder / "checkpoint")
        assert type(loaded) is LlavaMptConfig
        assert loaded._attn_implementation is None
        assert not loaded.output_attentions
        assert loaded.d_model == 256

    def test_of_a_bundle(self, bundles, tmp_path):
        """Its graphs are all there is to run: what its settings name is not looked for."""
        bundle = shutil.copytree(bundles["linear_fp16_sharded"], tmp_path / "bundle")
        kernel = {"_attn_implementation": "owner/kernel@rev", "auto_map": self.CHOICES["auto_map"]}
        for part in (None, "text_config", "vision_config"):
            change("config.json", part, **kernel)(bundle)
        change("generation_config.json", **kernel, custom_generate="owner/generate", trust_remote_code=True)(bundle)
        model = OVModelForLlavaMPT.from_pretrained(bundle)
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)


class TestPathsStayInside:
    @pytest.mark.parametrize("named", ["../clip", ".", "..", "/", "~/clip", "here/clip"])
    def test_of_a_checkpoint_on_the_hub(self, folder, tmp_path, monkeypatch, named):
        """It names a model id; folders here, at whatever place, are not for it to choose."""
        shutil.copytree(folder / "clip", tmp_path / "here" / "clip")
        monkeypatch.chdir(tmp_path)
        fill_hub_cache(tmp_path / "cache", {"me/model": folder / "checkpoint"})
        snapshot = next((tmp_path / "cache").glob("models--me--model/snapshots/*"))
        shutil.copytree(folder / "clip", snapshot.parent / "clip")
        change("config.json", mm_vision_tower=named)(snapshot)
        options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        with pytest.raises(
            InvalidCheckpointError, match="mm_vision_tower in config.json of 'me/model', was not found"
        ):
            OriginalCheckpoint.open("me/model", **options)
        OriginalCheckpoint.open("me/model", vision_tower="here/clip", **options)  # the user may

    def test_absolute_path_of_a_checkpoint_on_the_hub(self, folder):
        with pytest.raises(InvalidCheckpointError, match="so it must name a model id"):
            find_vision_tower(Repository("me/model"), str(folder / "clip"))


class TestNoNumbers:
    @pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_named_and_counted(self, dtype, value):
        weights = {"first": torch.randn(1000, 700).to(dtype), "second": torch.randn(1000, 700).to(dtype)}
        check_finite(weights)
        weights["second"][517, 333] = weights["second"][999, 699] = value
        with pytest.raises(InvalidCheckpointError, match="second has 2 of 700,000 values that are NaN or infinite"):
            check_finite(weights)

    @pytest.mark.parametrize(
        ("name", "named"),
        [
            ("transformer.mm_projector.weight", "image_encoder.projector.weight"),
            (WQKV, "language_model.transformer.blocks.1.attn.Wqkv.weight"),
        ],
    )
    def test_export_refuses(self, folder, tmp_path, name, named):
        file = next(file for file in folder.glob("checkpoint/*.bin") if name in torch.load(file))

        def spoil(weight):
            weight.view(-1)[5] = NAN
            return weight

        tensor(name, spoil, file.relative_to(folder))(folder)
        with pytest.raises(InvalidCheckpointError, match=f"{named} has 1 of "):
            main_export(folder / "checkpoint", tmp_path / "out")
        assert not (tmp_path / "out").exists()


CARDS = {
    "not UTF-8": (b"---\nlicense: mit\nauthor: \xff\xfe\n---\n", "mit"),
    "not YAML": (b"---\nlicense: mit\n: [\n---\n", "mit"),
    "Windows": (b"---\r\nlicense: 'cc-by-nc-sa-4.0'\r\n---\r\n", "cc-by-nc-sa-4.0"),
    "a list": (b"---\n- license: mit\n---\n", "unknown"),
    "several": (b"---\nlicense:\n- mit\n- apache-2.0\n---\n", "unknown"),
    "a sentence": (b"---\nlicense: as <b>you</b> like\n---\n", "unknown"),
    "no end": (b"---\nlicense: mit\n", "unknown"),
    "a Python object": (b"---\nlicense: !!python/object/apply:os.system ['touch ran']\n---\n", "unknown"),
    "not of a type": (b'---\nlicense: mit\nyear: !!int ""\n---\n', "mit"),
    "empty": (b"", "unknown"),
    "zeros": (bytes(10_000), "unknown"),
    "bomb": (
        b"---\nlicense: mit\na: &a {x: 1}\n"
        + b"".join(b"%c: &%c {<<: [%s]}\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 110))
        + b"---\n",
        "mit",
    ),
}


@pytest.mark.parametrize(("content", "license"), CARDS.values(), ids=CARDS)
def test_card_of_a_checkpoint_never_blocks(folder, content, license):
    (folder / "checkpoint" / "README.md").write_bytes(content)
    assert source_license(OriginalCheckpoint.open(folder / "checkpoint")) == license


@pytest.mark.parametrize(
    "name",
    [
        f"{CONFIG}: cut",
        f"{CONFIG}: two million keys",
        f"{PROCESSOR}: empty",
        f"{TOKENIZER}: nested",
        "n_layers=1000000",
        "mm_projector_type='mlp1000000000x_gelu'",
        "index: '/etc/passwd'",
        "weights: cut at 0.9",
        "weights of torch.bool",
    ],
)
def test_export_leaves_nothing_behind(folder, tmp_path, name):
    damage, named = DAMAGES[name]
    damage(folder)
    with pytest.raises((UnsupportedCheckpointError, InvalidCheckpointError)) as error:
        main_export(folder / "checkpoint", tmp_path / "out")
    assert named in str(error.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {folder.name}


def test_tokenizer_that_does_not_become_a_graph(folder, tmp_path):
    change(TOKENIZER, pre_tokenizer={"type": "UnicodeScripts"})(folder)
    with pytest.raises(UnsupportedCheckpointError, match=r"UnicodeScripts.*--disable-convert-tokenizer"):
        main_export(folder / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_configuration_is_still_ours_to_report(folder):
    """Or Optimum would report that it does not know the model."""
    cut(CONFIG, 0.9)(folder)
    assert is_original_checkpoint(folder / "checkpoint")
    write(CONFIG, '{"model_type": "llama"')(folder)
    assert not is_original_checkpoint(folder / "checkpoint")


def not_utf8(name: str, text: bytes):
    return lambda folder: write(name, (folder / name).read_bytes().replace(text, text[:-2] + b'\xf2"'))(folder)


GRAPH = "openvino_vision_embeddings_model"
BUNDLE_DAMAGES = {
    **{
        f"{file}: {name}": (write(file, NO_JSON[name]), file)
        for file in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "preprocessor_config.json",
            "openvino_config.json",
        )
        for name in ("empty", "not UTF-8", "a list", "nested")
    },
    "config.json: cut": (cut("config.json", 0.3), "config.json"),
    "config.json: no model": (write("config.json", "{}"), "not a LLaVA bundle"),
    "config.json: text": (change("config.json", text_config=[]), "not a LLaVA bundle"),
    "config.json: vision": (change("config.json", vision_config=[]), "vision_config=[]"),
    "config.json: layers": (change("config.json", "text_config", n_layers="3"), "text_config.n_layers='3'"),
    "config.json: side": (change("config.json", "vision_config", image_size=NAN), "vision_config.image_size=nan"),
    "config.json: length": (change("config.json", image_seq_length=-1), "image_seq_length=-1"),
    "config.json: of no meaning": (change("config.json", "vision_config", hidden_size="64"), "config.json"),
    **{
        f"{file}: {name}={value!r}": (change(file, part, **{name: value}), f"{name}={value!r}")
        for file, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
        for name, value in {
            "crop_size": {"height": None, "width": 56},
            "size": {"shortest_edge": 10**9},
            "image_std": [0, 1, 1],
            "resample": "bicubic",
        }.items()
    },
    "graph: a name that is not UTF-8": (not_utf8(f"{GRAPH}.xml", b'type="Parameter"'), GRAPH),
    "graph: empty": (write(f"{GRAPH}.xml", ""), GRAPH),
    "graph: cut": (cut(f"{GRAPH}.xml"), GRAPH),
    "graph: a folder": (as_folder(f"{GRAPH}.xml"), GRAPH),
    "weights: empty": (write(f"{GRAPH}.bin", ""), GRAPH),
    "weights: cut": (cut(f"{GRAPH}.bin"), GRAPH),
}


@pytest.fixture
def bundle(bundles, tmp_path):
    """A bundle whose files are links that can be replaced."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in bundles["linear_fp16_sharded"].iterdir():
        (folder / file.name).symlink_to(file)
    return folder


READ_BY_THE_CARD = ("config.json", "openvino_config.json", "graph", "weights")


@pytest.mark.parametrize("name", BUNDLE_DAMAGES)
def test_damage_of_a_bundle_is_refused_by_name(bundle, name):
    damage, named = BUNDLE_DAMAGES[name]
    damage(bundle)
    with pytest.raises((BundleError, InvalidCheckpointError)) as error:  # damaged, it may look like a checkpoint's
        OVModelForLlavaMPT.from_pretrained(bundle)
    assert named in str(error.value)
    if name.split(":")[0] in READ_BY_THE_CARD and name != "config.json: of no meaning":
        with pytest.raises(BundleError):
            card_text(bundle)


@pytest.mark.parametrize("engine", ["openvino", "genai"])
def test_damage_of_a_bundle_that_is_found_when_it_answers(bundle, engine):
    """An image processor of another shape than the vision model."""
    change("preprocessor_config.json", crop_size={"height": 336, "width": 56})(bundle)
    change("processor_config.json", "image_processor", crop_size={"height": 336, "width": 56})(bundle)
    change("generation_config.json", bos_token_id=INFINITE)(bundle)
    with pytest.raises(BundleError, match=r"does not load: .*parse error.*Check the device and its options"):
        session_factory(str(bundle), engine="genai")
    change("generation_config.json", bos_token_id=0)(bundle)
    chat = session_factory(str(bundle), engine=engine)()
    with pytest.raises(
        BundleError, match=r"OpenVINO cannot run the bundle: .*336.*Export it again, or download it again\."
    ) as error:
        chat.send("What is this?", Golden("linear_fp16_sharded").image("img0_300x200")).result()
    assert "\n" not in str(error.value)
    assert chat.messages == []


@pytest.mark.parametrize(
    "damage",
    [
        write("tokenizer.json", "{}"),
        change("processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.P"}),
        write("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_processor_of_a_bundle_names_no_code(bundle, damage):
    """transformers would ask at the terminal whether to run it."""
    damage(bundle)
    with pytest.raises(BundleError, match="The processor or the tokenizer in .* does not load"):
        load_processor(bundle)


@pytest.mark.parametrize(
    "damage",
    [
        write("eval.json", '{"accuracy": "all", "num_samples": 3, "num_tokens": 3}'),
        write("eval.json", '{"accuracy": 1.0}'),
        write("eval.json", '{"settings": [], "num_samples": 3, "num_tokens": 3}'),
        write("eval.json", "[]"),
        write("openvino_config.json", '{"quantization_config": []}'),
        write("openvino_config.json", '{"quantization_config": {"quantization_configs": {"lm_model": [1]}}}'),
        write("openvino_config.json", '{"versions": []}'),
    ],
)
def test_card_of_a_damaged_record(bundle, damage):
    (bundle / "eval.json").write_text("{}")
    damage(bundle)
    with pytest.raises(BundleError, match="eval.json"):
        card_text(bundle)
