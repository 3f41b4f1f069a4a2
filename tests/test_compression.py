"""NNCF through Optimum: every recipe and every option, counted node by node."""

import filecmp
import json
import re
from argparse import ArgumentParser
from collections import Counter
from importlib.metadata import version

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from conftest import EXACT, Golden, files, run, run_stock
from optimum.intel import OVConfig, OVPipelineQuantizationConfig, OVWeightQuantizationConfig
from optimum.intel.openvino.configuration import get_default_quantization_config

from optimum_llava_ov import BundleError, OVModelForLlavaMPT, main_export
from optimum_llava_ov.bundle.layout import FILES
from optimum_llava_ov.cli.export import ov_config_of
from optimum_llava_ov.export.recipes import default_recipe
from optimum_llava_ov.images import open_image
from optimum_llava_ov.samples.files import Sample, read_samples


pytestmark = pytest.mark.slow


GOLDEN = Golden("linear_fp16_sharded")
PARTS = ("language", "text_embeddings", "vision_embeddings")
# 3 blocks of 4 matrices and the head
INT8 = {"language": {"u8": 13}, "text_embeddings": {"i8": 1}, "vision_embeddings": {"i8": 14}}
FLOAT = {"language": {"f16": 13}, "text_embeddings": {"f16": 1}, "vision_embeddings": {"f32": 13, "f16": 1}}


def nodes(bundle) -> dict[str, dict[str, int]]:
    """Weight matrices of each part by precision."""
    counts = {}
    for part in PARTS:
        model = openvino.Core().read_model(bundle / f"openvino_{part}_model.xml")
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) >= 2]
        weights = [op for op in constants if np.prod(op.shape) >= 2000 and op.shape[-1] > 1]
        counts[part] = dict(Counter(op.get_element_type().get_type_name() for op in weights))
    return counts


def compressed(tmp_path, quantization_config):
    main_export(GOLDEN.checkpoint, tmp_path / "out", ov_config=OVConfig(quantization_config=quantization_config))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def int4(export_once):
    """The recommended recipe, by the real command."""
    return export_once(f"{GOLDEN.name}-int4", GOLDEN.checkpoint, "--weight-format", "int4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of the user's: JSONL with relative paths, in the field's usual spellings."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("img0_300x200", "img1_64x480"):
        GOLDEN.image(name).save(folder / f"{name}.png")
    lines = [
        {"image": "img0_300x200.png", "prompt": "What is this?"},
        {"image_path": "img1_64x480.png", "question": "Which colour?", "answer": "Red."},
        {"image": "img0_300x200.png", "conversations": [{"from": "human", "value": "<image>\nDescribe it."}]},
        {"text": "No picture at all."},
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class TestRecipes:
    def test_int4(self, int4):
        assert nodes(int4) == {**INT8, "language": {"u4": 10, "u8": 3}}

    def test_int8(self, tmp_path):
        assert nodes(compressed(tmp_path, {"bits": 8})) == INT8

    def test_uncompressed(self, bundles):
        assert nodes(bundles[GOLDEN.name]) == FLOAT

    def test_recorded(self, int4):
        config = json.loads((int4 / "openvino_config.json").read_text())
        assert config["converted_from"]["model"] == "checkpoint"
        assert config["versions"]["nncf"] == version("nncf")
        recipe = config["quantization_config"]["quantization_configs"]
        language = recipe["lm_model"]
        assert (language["bits"], language["sym"], language["group_size"], language["ratio"]) == (4, False, 128, 0.8)
        assert {name: (config["bits"], config["sym"]) for name, config in recipe.items() if name != "lm_model"} == {
            "text_embeddings_model": (8, True),
            "vision_embeddings_model": (8, True),
        }

    @pytest.mark.parametrize("weight_format", ["int4", "int8"])
    def test_in_optimums_tables(self, weight_format):
        import optimum_llava_ov  # noqa: F401

        found = get_default_quantization_config(
            "liuhaotian/LLaVA-Lightning-MPT-7B-preview", weight_format=weight_format
        )
        assert found == default_recipe(weight_format)

    @pytest.mark.parametrize("source", ["checkpoint", "bundle"])
    def test_command_and_python_give_the_same_bytes(self, int4, bundles, tmp_path, source):
        name = GOLDEN.checkpoint if source == "checkpoint" else bundles[GOLDEN.name]
        model = OVModelForLlavaMPT.from_pretrained(name, quantization_config={"bits": 4}, compile=False)
        model.save_pretrained(tmp_path / "out")
        assert files(tmp_path / "out") == set(FILES)
        for part in PARTS:
            file = f"openvino_{part}_model.bin"
            assert filecmp.cmp(tmp_path / "out" / file, int4 / file, shallow=False), part
        configs = [(folder / "openvino_config.json").read_text() for folder in (tmp_path / "out", int4)]
        assert configs[0] == configs[1]

    def test_weights_that_waited_on_disk_are_the_same(self, int4, tmp_path, monkeypatch):
        """Large weights do while the others are compressed; here all do. What is written is what OpenVINO would have written."""
        monkeypatch.setattr("optimum_llava_ov.export.spill.MIN_BYTES", 64)
        monkeypatch.setattr(
            "optimum_llava_ov.export.row_blocks.BLOCK", 1000
        )  # large tables are compressed in blocks of rows
        output = compressed(tmp_path, default_recipe("int4"))
        assert files(output) == set(FILES)
        for part in PARTS:
            files_of_part = [folder / f"openvino_{part}_model.bin" for folder in (output, int4)]
            assert filecmp.cmp(*files_of_part, shallow=False), part
            # The graph too, but for names that OpenVINO counts up in a process
            graphs = [re.sub(r"(_|Model)\d+", "", file.with_suffix(".xml").read_text()) for file in files_of_part]
            assert graphs[0] == graphs[1], part

    def test_a_recipe_for_each_part(self, tmp_path):
        config = OVPipelineQuantizationConfig(
            {
                "lm_model": OVWeightQuantizationConfig(bits=8, sym=True),
                "text_embeddings_model": OVWeightQuantizationConfig(bits=8),
            }
        )
        assert nodes(compressed(tmp_path, config)) == {
            "language": {"i8": 13},
            "text_embeddings": {"u8": 1},
            "vision_embeddings": FLOAT["vision_embeddings"],
        }

    def test_load_in_8bit(self, bundles, tmp_path):
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], load_in_8bit=True, compile=False)
        model.save_pretrained(tmp_path / "out")
        assert nodes(tmp_path / "out") == INT8

    def test_optimums_class_compresses_too(self, bundles, int4):
        from optimum.intel import OVModelForVisualCausalLM

        model = OVModelForVisualCausalLM.from_pretrained(
            bundles[GOLDEN.name],
            quantization_config=OVWeightQuantizationConfig(bits=4, ratio=0.8, group_size=128),
            compile=False,
        )
        kinds = Counter(
            op.get_element_type().get_type_name()
            for op in model.language_model.model.get_ops()
            if op.get_type_name() == "Constant"
        )
        assert kinds["u4"] >= 10


OPTIONS = {
    "sym": ({"bits": 4, "sym": True, "ratio": 1.0}, {"i4": 12, "u8": 1}),
    "group size": ({"bits": 4, "group_size": 32, "ratio": 1.0}, {"u4": 12, "u8": 1}),
    "per channel": ({"bits": 4, "group_size": -1, "ratio": 1.0}, {"u4": 12, "u8": 1}),
    "all layers": ({"bits": 4, "group_size": 64, "ratio": 1.0, "all_layers": True}, {"u4": 13}),
    "backup none": ({"bits": 4, "group_size": 128, "ratio": 0.8, "backup_precision": "none"}, {"u4": 10, "f16": 3}),
    "backup int8_sym": (
        {"bits": 4, "group_size": 128, "ratio": 0.8, "backup_precision": "int8_sym"},
        {"u4": 10, "i8": 3},
    ),
    "nf4": ({"bits": 4, "dtype": "nf4", "group_size": 64}, {"nf4": 12, "u8": 1}),
    "mxfp4": ({"bits": 4, "dtype": "mxfp4", "group_size": 32}, {"f4e2m1": 12, "f8e4m3": 1}),
    "awq": ({"bits": 4, "group_size": 128, "quant_method": "awq"}, {"u4": 12, "u8": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path, name):
    config, expected = OPTIONS[name]
    assert nodes(compressed(tmp_path, config)) == {**INT8, "language": expected}


def test_cb4(tmp_path):
    """A codebook: indices in 4 bits, looked up in 16 values."""
    assert nodes(compressed(tmp_path, {"bits": 4, "dtype": "cb4", "group_size": 64}))["language"] == {
        "u4": 12,
        "u8": 1,
    }


def test_group_size_that_does_not_fit(tmp_path):
    config = {"bits": 4, "group_size": 96, "ratio": 1.0}
    with pytest.raises(Exception, match="group size"):
        compressed(tmp_path, {**config, "group_size_fallback": "error"})
    assert files(tmp_path) == set()
    assert nodes(compressed(tmp_path, {**config, "group_size_fallback": "adjust"}))["language"] == {"u4": 12, "u8": 1}


DATA_AWARE = {
    "awq and scale estimation": {"quant_method": "awq", "scale_estimation": True},
    "gptq": {"gptq": True},
    "lora correction": {"lora_correction": True},
    "sensitivity": {"ratio": 0.8, "sensitivity_metric": "mean_activation_magnitude"},
}


@pytest.mark.parametrize("name", DATA_AWARE)
def test_data_aware_without_the_internet(tmp_path, pictures, name):
    config = {
        "bits": 4,
        "group_size": 64,
        "dataset": [str(pictures / "samples.jsonl")],
        "num_samples": 3,
        **DATA_AWARE[name],
    }
    aware = nodes(compressed(tmp_path, config))["language"]
    expected = {"u4": 10, "u8": 3} if "sensitivity" in name else {"u4": 12, "u8": 1}
    assert {precision: aware.get(precision) for precision in expected} == (
        expected if name != "lora correction" else {"u4": 12, "u8": 25}
    )


def test_command_with_a_data_set_and_statistics(tmp_path, pictures):
    command = [
        "optimum-cli",
        "export",
        "openvino",
        "--model",
        GOLDEN.checkpoint,
        "--weight-format",
        "int4",
        "--group-size",
        "64",
    ]
    command += ["--ratio", "0.9", "--awq", "--scale-estimation", "--dataset", pictures, "--num-samples", "2"]
    result = run(*command, "--quantization-statistics-path", tmp_path / "statistics", tmp_path / "out")
    assert nodes(tmp_path / "out")["language"] == {"u4": 10, "u8": 3}
    assert any((tmp_path / "statistics").iterdir())
    assert files(tmp_path / "out") == set(FILES)
    assert str(tmp_path) not in (tmp_path / "out" / "openvino_config.json").read_text()  # not where the data was
    assert "language_model" in result.stdout
    assert 'OVModelForLlava.from_pretrained("' in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("int4 --sym --group-size 64 --ratio 0.5", {"bits": 4, "sym": True, "group_size": 64, "ratio": 0.5}),
        ("int4 --group-size 96 --group-size-fallback adjust", {"group_size": 96, "group_size_fallback": "adjust"}),
        ("int4 --backup-precision none --all-layers", {"backup_precision": "none", "all_layers": True}),
        ("int4 --dataset wikitext2 --gptq --num-samples 8", {"gptq": True, "num_samples": 8}),
        ("int4 --dataset wikitext2 --lora-correction", {"lora_correction": True}),
        (
            "int4 --dataset wikitext2 --ratio 0.7 --sensitivity-metric max_activation_variance",
            {"sensitivity_metric": "max_activation_variance"},
        ),
        ("int4 --dataset wikitext2 --scale-estimation --awq", {"scale_estimation": True, "quant_method": "awq"}),
        ("int8 --sym", {"bits": 8, "sym": True}),
        ("nf4 --group-size 64", {"dtype": "nf4", "group_size": 64}),
        ("mxfp4", {"dtype": "mxfp4", "bits": 4}),
        ("cb4", {"dtype": "cb4"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_the_command(options, expected):
    from optimum.commands.export.openvino import parse_args_openvino

    parser = ArgumentParser()
    parse_args_openvino(parser)
    config = ov_config_of(
        parser.parse_args(["--model", "x", "--weight-format", *options.split(), "out"])
    ).quantization_config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant-mode", "int8", "--dataset", "textvqa"], "quantizes activations, which is not supported"),
        (["--group-size", "64"], "need a compressed format"),
        (["--weight-format", "int4", "--dataset", "./no/such/folder", "--awq"], "no/such/folder"),
        (["--weight-format", "int8", "--awq"], "AWQ algorithm is not supported for 8-bit"),
    ],
    ids=["quant-mode", "no format", "data set", "awq at 8 bits"],
)
def test_refusals(optimum_cli, tmp_path, options, message):
    status, _, errors = optimum_cli("export", "openvino", "--model", GOLDEN.checkpoint, *options, tmp_path / "out")
    assert status != 0
    assert message in errors
    assert files(tmp_path) == set()


def test_compressing_twice_is_refused(int4):
    with pytest.raises(BundleError, match="are compressed already"):
        OVModelForLlavaMPT.from_pretrained(int4, quantization_config={"bits": 8})


def test_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no part audio_model. Its parts are lm_model"):
        compressed(tmp_path, {"quantization_configs": {"audio_model": {"bits": 8, "sym": True}}})


class TestDataSets:
    def test_jsonl(self, pictures):
        assert read_samples(pictures / "samples.jsonl") == [
            Sample("What is this?", (pictures / "img0_300x200.png",)),
            Sample("Which colour?", (pictures / "img1_64x480.png",), "Red."),
            Sample("Describe it.", (pictures / "img0_300x200.png",)),
            Sample("No picture at all."),
        ]

    def test_folder(self, pictures):
        assert [sample.images[0].name for sample in read_samples(pictures)] == ["img0_300x200.png", "img1_64x480.png"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no images and no prompts"),
            ("{", "Line 1 of .* is not a JSON object"),
            ('{"prompt": "a"}\n{"image": "x.png"}', "Line 2 of .* has no prompt"),
        ],
        ids=["empty", "no JSON", "no prompt"],
    )
    def test_errors_name_the_line(self, tmp_path, text, message):
        (tmp_path / "samples.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / "samples.jsonl")

    def test_picture_that_cannot_be_read(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=r"broken.png cannot be read"):
            open_image(read_samples(tmp_path)[0].images[0])


STOCK = """
import json, sys
from PIL import Image
from optimum.intel import OVModelForVisualCausalLM
from transformers import AutoProcessor
bundle, picture, exact = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model, processor = OVModelForVisualCausalLM.from_pretrained(bundle, ov_config=exact), AutoProcessor.from_pretrained(bundle)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
inputs = processor(text=processor.apply_chat_template(messages, add_generation_prompt=True), images=[Image.open(picture)], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
print(json.dumps(output[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def test_every_engine_gives_the_same_tokens(int4, processors, tmp_path):
    processor = processors[GOLDEN.name]
    image = GOLDEN.image("img2_224x224")
    image.save(tmp_path / "image.png")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[image], return_tensors="pt")
    model = OVModelForLlavaMPT.from_pretrained(int4, ov_config=EXACT)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    expected = output[0, inputs["input_ids"].shape[1] :].tolist()

    assert json.loads(run_stock(STOCK, int4, tmp_path / "image.png", json.dumps(EXACT)).splitlines()[-1]) == expected
    for backend in ("SDPA", "PA"):
        pipeline = openvino_genai.VLMPipeline(int4, "CPU", ATTENTION_BACKEND=backend, **EXACT)
        config = openvino_genai.GenerationConfig(max_new_tokens=24, do_sample=False, ignore_eos=True)
        tensor = openvino.Tensor(np.array(image)[None])
        text = pipeline.generate("What is this?", images=[tensor], generation_config=config).texts[0]
        assert text == processor.tokenizer.decode(expected, skip_special_tokens=True), backend


def test_the_rest_of_a_bundle_is_saved_too(int4, tmp_path):
    saved = tmp_path / "saved"
    OVModelForLlavaMPT.from_pretrained(int4, compile=False).save_pretrained(saved)
    again = tmp_path / "again"
    OVModelForLlavaMPT.from_pretrained(saved, compile=False).save_pretrained(again)
    for folder in (saved, again):
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
            file.name: file.read_bytes() for file in int4.iterdir()
        }
