"""`optimum-cli export openvino` and its Python twin: what comes out, and what happens when something goes wrong."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import openvino
import programs
import pytest
import torch
from conftest import EXACT, GOLDENS, files, fill_hub_cache, run, run_stock
from optimum.intel import OVConfig, OVModelForVisualCausalLM

from optimum_llava_ov import BundleError, OVModelForLlavaMPT, main_export
from optimum_llava_ov.bundle.layout import FILES


pytestmark = pytest.mark.slow


SHARDED, SINGLE = GOLDENS
EXPECTED_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "example.png",
    "generation_config.json",
    "openvino_config.json",
    "openvino_detokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_language_model.bin",
    "openvino_language_model.xml",
    "openvino_text_embeddings_model.bin",
    "openvino_text_embeddings_model.xml",
    "openvino_tokenizer.bin",
    "openvino_tokenizer.xml",
    "openvino_vision_embeddings_model.bin",
    "openvino_vision_embeddings_model.xml",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def digest(folder: Path) -> dict[str, bytes]:
    """Fingerprints, so that a failing comparison shows names and not the difference of two weight files."""
    return {file.name: hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir() if file.is_file()}


def model_of(bundle: Path, part: str) -> openvino.Model:
    return openvino.Core().read_model(bundle / f"openvino_{part}_model.xml")


def weight_types(bundle: Path, part: str) -> set[str]:
    """Precisions of constants that are weights, not shapes and scalars."""
    constants = (op for op in model_of(bundle, part).get_ops() if op.get_type_name() == "Constant")
    return {
        op.get_element_type().get_type_name()
        for op in constants
        if op.get_output_size() == 1 and len(op.shape) >= 2 and op.data.size > 500
    }


def names(ports) -> list[str]:
    return [port.get_any_name() for port in ports]


class TestBundle:
    @pytest.fixture(params=GOLDENS, ids=lambda golden: golden.name)
    def golden(self, request):
        return request.param

    def test_files(self, bundles, golden):
        assert files(bundles[golden.name]) == EXPECTED_FILES == set(FILES)

    def test_parts(self, bundles, golden):
        bundle = bundles[golden.name]
        language, table, vision = (
            model_of(bundle, part) for part in ("language", "text_embeddings", "vision_embeddings")
        )
        assert sorted(names(language.inputs)) == ["attention_mask", "beam_idx", "inputs_embeds", "position_ids"]
        assert names(language.outputs) == ["logits"]
        assert names(table.inputs) == ["input"]
        assert names(table.outputs) == ["inputs_embeds"]
        assert table.output(0).get_element_type() == openvino.Type.f32
        assert names(vision.inputs) == ["pixel_values"]
        assert names(vision.outputs) == ["last_hidden_state"]

    def test_position_ids_are_not_used(self, bundles, golden):
        """GenAI sets the input unconditionally; nothing may depend on it."""
        parameter = next(
            op
            for op in model_of(bundles[golden.name], "language").get_parameters()
            if "position_ids" in op.output(0).get_names()
        )
        assert not parameter.output(0).get_target_inputs()

    def test_bias_is_computed_once(self, bundles, golden):
        operations = [op.get_type_name() for op in model_of(bundles[golden.name], "language").get_ops()]
        layers = json.loads((golden.checkpoint / "config.json").read_text())["n_layers"]
        assert operations.count("ScaledDotProductAttention") == layers
        assert operations.count("Abs") == 1

    def test_unused_vision_layers_are_left_out(self, bundles, golden):
        operations = [op.get_type_name() for op in model_of(bundles[golden.name], "vision_embeddings").get_ops()]
        assert operations.count("ScaledDotProductAttention") == 2  # of 3; mm_vision_select_layer is -2

    def test_config(self, bundles, golden):
        config = json.loads((bundles[golden.name] / "config.json").read_text())
        image_size = 56 if golden is SHARDED else 42
        assert config["model_type"] == "llava"
        assert config["text_config"]["model_type"] == "mpt"
        assert config["vision_config"]["model_type"] == "clip_vision_model"
        assert "model_type" not in config["text_config"]["attn_config"]
        assert config["image_token_index"] == config["text_config"]["vocab_size"] - 1 == 462
        assert config["image_seq_length"] == (image_size // 14) ** 2 + (2 if golden is SHARDED else 0)
        assert config["converted_from"]["model"] == "checkpoint"  # a folder's name, not somebody's path
        assert str(Path.home()) not in json.dumps(config)

    def test_processor(self, bundles, golden):
        processor, preprocessor = (
            json.loads((bundles[golden.name] / f"{name}_config.json").read_text())
            for name in ("processor", "preprocessor")
        )
        kind = "CLIPImageProcessor" if golden is SHARDED else "LlavaImageProcessor"
        assert processor["image_processor"]["image_processor_type"] == f"{kind}Pil"
        assert preprocessor["image_processor_type"] == kind
        assert preprocessor["crop_size"] == (
            {"height": 56, "width": 56} if golden is SHARDED else {"height": 42, "width": 42}
        )
        assert processor["num_additional_image_tokens"] == (2 if golden is SHARDED else 0)

    def test_tokens(self, processors, golden):
        tokenizer = processors[golden.name].tokenizer
        assert tokenizer("<image>")["input_ids"] == [462]
        assert tokenizer("a<image>b<image><image>")["input_ids"] == [66, 462, 67, 462, 462]
        assert tokenizer.decode([41, 462, 70], skip_special_tokens=True) == tokenizer.decode([41, 70])

    def test_tokenization_of_the_original(self, processors, golden):
        for case in json.loads((golden.folder / "cases.json").read_text())["tokenization"]:
            if case["text"].startswith("<|endoftext|>"):
                continue  # the original takes it for a prefix its tokenizer added, and loses a token behind every image
            expected = [462 if token == -200 else token for token in case["ids"]]
            assert processors[golden.name].tokenizer(case["text"])["input_ids"] == expected, case["text"]

    def test_precision_is_the_checkpoints(self, bundles, golden):
        assert weight_types(bundles[golden.name], "language") == ({"f16"} if golden is SHARDED else {"f32"})


class TestCommand:
    def test_offline_with_a_filled_cache(self, tmp_path, bundles):
        """A model id and its tower, both from the cache, with no network and nothing but the installed package."""
        cache, tower = tmp_path / "hub", "openai/clip-vit-large-patch14"
        fill_hub_cache(cache, {"me/llava": SHARDED.checkpoint, tower: SHARDED.folder / "clip"})
        command = (
            "optimum-cli",
            "export",
            "openvino",
            "--model",
            "me/llava",
            "--cache_dir",
            cache,
            "--task",
            "image-text-to-text",
        )
        run(*command, tmp_path / "out", env={"HF_HUB_OFFLINE": "1"}, fresh=True)
        assert files(tmp_path / "out") == EXPECTED_FILES
        exported, expected = digest(tmp_path / "out"), digest(bundles[SHARDED.name])
        assert all(exported[name] == expected[name] for name in expected if name.endswith(".bin"))
        converted_from = json.loads((tmp_path / "out" / "config.json").read_text())["converted_from"]
        assert (converted_from["model"], converted_from["revision"]) == ("me/llava", "0" * 40)
        assert converted_from["vision_tower"] == tower

    def test_weight_formats(self, tmp_path):
        run(
            "optimum-cli",
            "export",
            "openvino",
            "--model",
            SINGLE.checkpoint,
            "--weight-format",
            "fp16",
            tmp_path / "fp16",
        )
        main_export(SHARDED.checkpoint, tmp_path / "fp32", ov_config=OVConfig(dtype="fp32"))
        for part in ("language", "text_embeddings", "vision_embeddings"):
            # Of the vision tower, only linear layers: a convolution and the positions are fp16 numbers in float32
            rest = {"f32"} if part == "vision_embeddings" else set()
            assert weight_types(tmp_path / "fp16", part) == {"f16"} | rest, part
            assert weight_types(tmp_path / "fp32", part) == {"f32"}, part

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--task", "text-generation"], "is exported for the task 'image-text-to-text'"),
            (["--disable-stateful"], "--disable-stateful is not supported"),
            (["--model-kwargs", '{"mm_vision_tower": "x"}'], "Expected only vision_tower, conversation"),
            (["--variant", "fp16"], "variant is not supported"),
        ],
        ids=["task", "stateful", "model-kwargs", "variant"],
    )
    def test_refusals(self, optimum_cli, tmp_path, options, message):
        status, _, errors = optimum_cli(
            "export", "openvino", "--model", SHARDED.checkpoint, *options, tmp_path / "out"
        )
        assert status == 1
        assert message in errors
        assert files(tmp_path) == set()

    def test_vision_tower_override(self, optimum_cli, tmp_path, bundles):
        checkpoint = shutil.copytree(SHARDED.checkpoint, tmp_path / "alone")
        options = ("--model-kwargs", json.dumps({"vision_tower": str(SHARDED.folder / "clip")}))
        status, _, errors = optimum_cli("export", "openvino", "--model", checkpoint, *options, tmp_path / "out")
        assert status == 0, errors
        name = "openvino_vision_embeddings_model.bin"
        assert (tmp_path / "out" / name).read_bytes() == (bundles[SHARDED.name] / name).read_bytes()


class TestPython:
    def test_optimums_main_export(self, tmp_path, bundles):
        from optimum.exporters.openvino import main_export as optimum_main_export

        optimum_main_export(str(SHARDED.checkpoint), tmp_path / "out")
        exported, expected = digest(tmp_path / "out"), digest(bundles[SHARDED.name])
        assert exported.keys() == expected.keys()
        assert all(exported[name] == expected[name] for name in expected if name.endswith((".bin", ".json")))

    @pytest.mark.parametrize("model_class", [OVModelForLlavaMPT, OVModelForVisualCausalLM])
    def test_on_the_fly(self, model_class, models, processors):
        model = model_class.from_pretrained(str(SHARDED.checkpoint), ov_config=EXACT)
        assert type(model) is OVModelForLlavaMPT
        inputs = processors[SHARDED.name](
            text=SHARDED.cases["raw_image_first"]["prompt"],
            images=SHARDED.images("raw_image_first"),
            return_tensors="pt",
        )
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(**inputs, **options), models[SHARDED.name].generate(**inputs, **options))


class TestOutput:
    def test_replaces_a_bundle_and_keeps_hidden_files(self, tmp_path, bundles):
        output = shutil.copytree(bundles[SINGLE.name], tmp_path / "out")
        (output / ".gitattributes").write_text("*.bin filter=lfs\n")
        main_export(SHARDED.checkpoint, output)
        assert files(output) == {*EXPECTED_FILES, ".gitattributes"}
        name = "openvino_language_model.bin"
        assert (output / name).read_bytes() == (bundles[SHARDED.name] / name).read_bytes()
        assert files(tmp_path) == {"out"}

    def test_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("ten years of work")
        with pytest.raises(BundleError, match=r"contains files that are not part of a bundle \(thesis.tex\)"):
            main_export(SHARDED.checkpoint, tmp_path)
        assert files(tmp_path) == {"thesis.tex"}

    def test_a_file_is_left_alone(self, tmp_path):
        (tmp_path / "out").write_text("notes")
        with pytest.raises(BundleError, match="is a file"):
            main_export(SHARDED.checkpoint, tmp_path / "out")
        assert (tmp_path / "out").read_text() == "notes"

    def test_refused_checkpoint_leaves_the_bundle(self, tmp_path, bundles):
        output = shutil.copytree(bundles[SINGLE.name], tmp_path / "out")
        before = digest(output)
        with pytest.raises(ValueError, match="There is no folder"):
            main_export("./no/such/folder", output)
        assert digest(output) == before

    def test_disk_too_small(self, tmp_path, bundles, monkeypatch):
        output = shutil.copytree(bundles[SINGLE.name], tmp_path / "out")
        before = digest(output)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6 - 10, free=10))
        with pytest.raises(BundleError, match=r"needs 5.69 MB of disk, but only 10 bytes are free"):
            main_export(SHARDED.checkpoint, output)
        assert digest(output) == before

    def test_write_that_fails_in_the_middle(self, tmp_path, bundles):
        """No file may grow past 1 MB: the language model's write fails as on a full disk."""
        output = shutil.copytree(bundles[SINGLE.name], tmp_path / "out")
        before = digest(output)
        code = (
            "import resource, signal, sys\n"
            "from optimum_llava_ov import main_export\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
            "main_export(sys.argv[1], sys.argv[2])\n"
        )
        assert run(sys.executable, "-c", code, SHARDED.checkpoint, output, check=False).returncode != 0
        assert digest(output) == before
        assert files(tmp_path) == {"out"}

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_interrupted(self, tmp_path, bundles, how):
        output = shutil.copytree(bundles[SINGLE.name], tmp_path / "out")
        before = digest(output)
        code = "import sys; from optimum_llava_ov import main_export; main_export(sys.argv[1], sys.argv[2])"
        for _ in range(
            3
        ):  # Python drops an interrupt that comes in a destructor; the export is then whole, and is tried again
            command = [sys.executable, "-c", code, str(SHARDED.checkpoint), str(output)]
            # A program that is to be killed must not stand behind a client
            process = subprocess.Popen(
                command if how == signal.SIGKILL else programs.quick(command), stderr=subprocess.DEVNULL
            )
            while not any(output.glob(".*/*/openvino_vision_embeddings_model.xml")):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(how)
            if process.wait(60) != 0:
                break
            shutil.rmtree(output)
            shutil.copytree(bundles[SINGLE.name], output)
        assert process.returncode != 0
        assert digest(output) == before
        assert OVModelForLlavaMPT.from_pretrained(output, compile=False)
        if how == signal.SIGKILL:  # nobody could clean up; the next export does
            main_export(SHARDED.checkpoint, output)
        assert files(output) == EXPECTED_FILES
        assert files(tmp_path) == {"out"}


TINY_LLAMA = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
set_seed(0)
LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)).save_pretrained(sys.argv[1])
"""
STOCK_EXPORT = """
import sys
sys.argv = ["optimum-cli", "export", "openvino", "--model", sys.argv[1], "--task", "text-generation-with-past", sys.argv[2]]
from optimum.commands.optimum_cli import main
main()
"""


def test_other_models_export_as_without_this_package(tmp_path):
    run(sys.executable, "-c", TINY_LLAMA, tmp_path / "llama")
    run(
        "optimum-cli",
        "export",
        "openvino",
        "--model",
        tmp_path / "llama",
        "--task",
        "text-generation-with-past",
        tmp_path / "with",
    )
    run_stock(STOCK_EXPORT, tmp_path / "llama", tmp_path / "without")
    with_plugin, without = digest(tmp_path / "with"), digest(tmp_path / "without")
    assert with_plugin.keys() == without.keys() >= {"openvino_model.xml", "openvino_model.bin"}
    assert with_plugin["openvino_model.bin"] == without["openvino_model.bin"]
    assert with_plugin["config.json"] == without["config.json"]
    # names in the XML count traced objects and differ from run to run
    models = [openvino.Core().read_model(tmp_path / folder / "openvino_model.xml") for folder in ("with", "without")]
    assert [op.get_type_name() for op in models[0].get_ordered_ops()] == [
        op.get_type_name() for op in models[1].get_ordered_ops()
    ]


class TestOptions:
    """A misspelt option of Python is an error, as one of the command is."""

    @pytest.mark.parametrize("function", ["ours", "optimum's"])
    def test_misspelt(self, tmp_path, function):
        from optimum.exporters.openvino import main_export as optimum_main_export

        export = main_export if function == "ours" else optimum_main_export
        with pytest.raises(
            TypeError, match=r"main_export\(\) got an unknown option 'ov_confg'. Did you mean 'ov_config'\?"
        ):
            export(str(SHARDED.checkpoint), tmp_path / "out", ov_confg=OVConfig(dtype="fp16"))
        assert files(tmp_path) == set()

    def test_what_optimum_takes(self, tmp_path):
        options = {
            "device": "cpu",
            "framework": "pt",
            "trust_remote_code": True,
            "library_name": "transformers",
            "batch_size": 2,
        }
        main_export(SHARDED.checkpoint, tmp_path / "out", convert_tokenizer=False, **options)
        assert files(tmp_path / "out") == {
            name for name in EXPECTED_FILES if "tokenizer." not in name or name == "tokenizer.json"
        }

    def test_saving_and_publishing(self, models, tmp_path):
        model = models[SHARDED.name]
        with pytest.raises(
            TypeError, match=r"push_to_hub\(\) got an unknown option 'privat'. Did you mean 'private'\?"
        ):
            model.push_to_hub("me/new", privat=True)
        with pytest.raises(
            TypeError, match=r"save_pretrained\(\) got an unknown option 'repoid'. Did you mean 'repo_id'\?"
        ):
            model.save_pretrained(tmp_path / "out", push_to_hub=True, repoid="me/new")
        assert files(tmp_path) == set()
        model.save_pretrained(tmp_path / "out", max_shard_size="5GB", safe_serialization=True)
        assert files(tmp_path / "out") == EXPECTED_FILES
