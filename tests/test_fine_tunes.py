"""Fine-tunes of the original's training: what is recognised, where the base is found, and what is refused before weights are read."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden, fill_hub_cache
from openvino import Core, Tensor
from optimum.intel import OVConfig
from transformers import AutoProcessor

from optimum_llava_ov import (
    InvalidCheckpointError,
    OriginalLlavaForConditionalGeneration,
    OVModelForLlava,
    UnsupportedCheckpointError,
    main_export,
)
from optimum_llava_ov.bundle.settings import build_config
from optimum_llava_ov.checkpoint.fine_tune import Kind, Lineage
from optimum_llava_ov.checkpoint.merge import merge
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, find_original
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_tensors
from optimum_llava_ov.evaluation.evaluate import evaluate
from optimum_llava_ov.evaluation.record import load
from optimum_llava_ov.export.pipeline import export_from_model


LORA, PROJECTOR = Golden("lora"), Golden("projector_only")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The golden adapter in fp16, after a training in 4 bits, with a base that the user names."""
    folder = tmp_path_factory.mktemp("fine-tune")
    for source, name in (("checkpoint", "task"), ("base", "vicuna"), ("clip", "clip")):
        shutil.copytree(LORA.folder / source, folder / name, copy_function=shutil.copy)
    change(folder / "task" / "config.json", quantization_config={"load_in_4bit": True})
    (folder / "vicuna" / "README.md").write_text("---\nlicense: llama2\n---\n")
    options = {"ov_config": OVConfig(dtype="fp16"), "model_kwargs": {"base_model": str(folder / "vicuna")}}
    main_export(folder / "task", folder / "bundle", **options)
    return folder / "bundle"


@pytest.fixture
def folder(tmp_path):
    """Copies a golden fine-tune with its base. Folders have names that say nothing."""

    def copy(golden=LORA):
        for source, name in (("checkpoint", "a"), ("base", "base"), ("clip", "clip")):
            shutil.copytree(golden.folder / source, tmp_path / name, copy_function=shutil.copy)
        return tmp_path / "a"

    return copy


def change(file, **options):
    values = json.loads(file.read_text()) | options
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def trace(folder, *args, **kwargs):
    return Lineage.trace(Repository(str(folder)), *args, **kwargs)


def tensors_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.bin"))
        for name, tensor in map_tensors(file).items()
        if "inv_freq" not in name
    }


def constants_of(graph):
    """Types and bytes of the constants that are named after weights."""
    return {
        op.get_friendly_name(): (op.get_element_type().get_type_name(), op.data.tobytes())
        for op in Core().read_model(graph).get_ops()
        if op.get_type_name() == "Constant" and "weight" in op.get_friendly_name()
    }


def assert_equals_the_original(model, processor, golden, suffix=""):
    """Logits at every position, and all greedy tokens."""
    for case, expected in golden.cases.items():
        inputs = processor(text=expected["prompt"], images=golden.images(case), return_tensors="pt")
        if "pixel_values" in inputs:
            pixel_values = [golden.pixel_values(name) for name in expected["images"]]
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(pixel_values))
        if (recorded := golden.arrays.get(f"{case}/logits{suffix}")) is not None:
            with torch.no_grad():
                logits = model(**inputs).logits[0, :, :-1].numpy()
            assert np.abs(logits - recorded).max() < 5e-4, case
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert tokens == golden.arrays[f"{case}/greedy{suffix}"].tolist(), case


def assert_genai_equals_the_original(bundle, golden, suffix=""):
    """All greedy tokens, with both attention backends."""
    import openvino_genai

    config = openvino_genai.GenerationConfig(max_new_tokens=32, do_sample=False, ignore_eos=True)
    for backend in ("PA", "SDPA"):
        pipeline = openvino_genai.VLMPipeline(bundle, "CPU", ATTENTION_BACKEND=backend, **EXACT)
        for case in ("text_only", "image_start"):  # GenAI writes images before the text
            images = [Tensor(np.array(image)[None]) for image in golden.images(case) or []]
            assert all(image.shape[1] == image.shape[2] for image in images)  # GenAI does not pad
            question = golden.cases[case]["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT:")
            question = question.removeprefix("<image>\n")
            answer = pipeline.generate(question, images=images, generation_config=config).texts[0]
            tokens = golden.arrays[f"{case}/greedy{suffix}"]
            assert answer == pipeline.get_tokenizer().decode(tokens.tolist()), (case, backend)


class TestEqualToTheOriginal:
    def test_exact_merge(self, folder, optimum_cli, tmp_path):
        """A bundle in float32, by the command, in our engine and in GenAI."""
        folder()
        status, _, _ = optimum_cli(
            "export", "openvino", "--model", tmp_path / "a", "--weight-format", "fp32", bundle := tmp_path / "bundle"
        )
        assert status == 0
        model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
        assert_equals_the_original(model, AutoProcessor.from_pretrained(bundle), LORA)
        assert_genai_equals_the_original(bundle, LORA)

    def test_merge_of_the_original(self, bundle):
        """In fp16, which the original loads everything in."""
        model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
        assert_equals_the_original(model, AutoProcessor.from_pretrained(bundle), LORA, "_fp16_merge")
        assert_genai_equals_the_original(bundle, LORA, "_fp16_merge")

    def test_projector(self, folder, tmp_path):
        checkpoint = folder(PROJECTOR)
        assert AutoProcessor.from_pretrained(checkpoint, base_model="../base").image_token == "<image>"
        main_export(checkpoint, bundle := tmp_path / "bundle", model_kwargs={"base_model": "../base"})
        model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
        assert_equals_the_original(model, AutoProcessor.from_pretrained(bundle), PROJECTOR)
        assert_genai_equals_the_original(bundle, PROJECTOR)

    @pytest.mark.parametrize("golden", [LORA, PROJECTOR], ids=lambda golden: golden.name)
    def test_torch(self, golden):
        """As the reference of an evaluation."""
        assert_equals_the_original(*load(golden.checkpoint), golden)


class TestMergeDuringTheExport:
    """LoRA is merged when NNCF reads a weight. The files are those of a model that was merged before."""

    @pytest.mark.parametrize(
        "recipe",
        [
            {"bits": 4, "sym": False, "group_size": 16, "ratio": 0.6},
            {"bits": 8, "sym": False},
            {"bits": 4, "sym": False, "group_size": 16, "ratio": 1.0, "all_layers": False, "backup_precision": "none"},
            None,
        ],
        ids=["int4", "int8", "some layers", "no compression"],
    )
    def test_bits(self, folder, tmp_path, caplog, recipe):
        checkpoint = folder()
        options = {} if recipe is None else {"ov_config": OVConfig(quantization_config=recipe)}
        model = OriginalLlavaForConditionalGeneration.from_pretrained(checkpoint)
        export_from_model(model, before := tmp_path / "before", **options)
        assert not caplog.text.count("while the weights are written")
        with caplog.at_level(logging.INFO):
            main_export(checkpoint, during := tmp_path / "during", **options)
        assert caplog.text.count("while the weights are written") == 1
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(model.language_model.get_parameter(name), tensors_of(tmp_path / "base")[name])
        found, expected = (constants_of(bundle / "openvino_language_model.xml") for bundle in (during, before))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []

    def test_weights_in_bf16_are_merged_before(self, folder, tmp_path, caplog):
        """They become fp16 on the disk, and whether it has room is checked first."""
        checkpoint = folder()
        for file in sorted((tmp_path / "base").glob("*.bin")):
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in torch.load(file).items()}
            torch.save(tensors, file)
        with caplog.at_level(logging.INFO):
            main_export(checkpoint, tmp_path / "bundle", ov_config=OVConfig(quantization_config={"bits": 8}))
        assert "the merged weights need" in caplog.text
        assert "while the weights are written" not in caplog.text

    def test_a_sum_that_fp16_cannot_hold(self, folder, tmp_path):
        checkpoint = folder()
        tensors = map_tensors(file := next(checkpoint.glob("adapter_model.*")))
        torch.save({name: 1e6 * tensor.float() for name, tensor in tensors.items()}, checkpoint / "adapter_model.bin")
        if file.suffix == ".safetensors":
            file.unlink()
        recipe = OVConfig(quantization_config={"bits": 8, "sym": False})
        with pytest.raises(InvalidCheckpointError, match=r"layers.0.*infinite"):
            main_export(checkpoint, tmp_path / "bundle", ov_config=recipe)
        assert not (tmp_path / "bundle").exists()


class TestEvaluation:
    def test_reference_is_a_fine_tune_with_a_chosen_base(self, bundle, tmp_path, optimum_cli):
        copy = shutil.copytree(bundle, tmp_path / "bundle")
        task, base = bundle.parent / "task", bundle.parent / "vicuna"
        options = ("--num-samples", 2, "--max-new-tokens", 4, "--reference", task)
        kwargs = json.dumps({"base_model": str(base)})
        status, output, _ = optimum_cli("llava-ov", "eval", copy, *options, "--model-kwargs", kwargs)
        assert status == 0
        assert "100.0%" in output
        values = json.loads((copy / "eval.json").read_text())
        assert values["identical"] == 1
        assert values["settings"]["reference"] == "task"
        assert "Measured against task on coloured shapes" in (copy / "README.md").read_text()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ("base_model", "base_model is not JSON"),
            ('["vicuna"]', "is not a JSON object"),
            ('{"base": "vicuna"}', "--model-kwargs has base. Expected only vision_tower"),
            ('{"base_model": "nowhere"}', "The base model 'nowhere' was not found"),
        ],
    )
    def test_options_of_the_reference(self, bundle, optimum_cli, kwargs, message, tmp_path):
        options = ("--reference", bundle.parent / "task", "--model-kwargs", kwargs, "--work-dir", tmp_path)
        status, _, errors = optimum_cli("llava-ov", "eval", bundle, *options)
        assert status in (1, 2)
        assert message in errors
        assert "Traceback" not in errors

    def test_a_bundle_has_no_options(self, bundle, tmp_path):
        with pytest.raises(ValueError, match="is not an original checkpoint, so it takes no --model-kwargs"):
            evaluate([bundle], bundle, work_dir=tmp_path, model_kwargs={"conversation": "vicuna_v1"})


class TestCard:
    def test_names_all_that_was_merged(self, bundle):
        converted_from = json.loads((bundle / "config.json").read_text())["converted_from"]
        assert converted_from["model"] == "task"
        assert converted_from["base_model"] == "vicuna"
        (adapter,) = converted_from["adapters"]
        assert adapter | {"revision": None} == {
            "model": "task", "revision": None, "license": "unknown", "kind": "LoRA adapter", "rank": 8, "alpha": 16
        }  # fmt: skip
        card = (bundle / "README.md").read_text()
        assert "license: llama2" in card
        assert "| vicuna | base model |  | llama2 |" in card
        assert "| task | LoRA adapter, rank 8, alpha 16 |  | unknown |" in card
        assert "The training had loaded the base model in 4 or 8 bits." in card
        options = """--model-kwargs '{"base_model": "vicuna", "conversation": "vicuna_v1"}' --weight-format fp16"""
        assert f"--model task {options}" in card


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path):
        """A cache of the Hub, where the adapter names its base by its id."""
        golden = shutil.copytree(LORA.folder, tmp_path / "golden", ignore=shutil.ignore_patterns("arrays.npz"))
        change(
            golden / "checkpoint" / "adapter_config.json", base_model_name_or_path="lmsys/vicuna", revision="0" * 40
        )
        names = {"me/task": golden / "checkpoint", "lmsys/vicuna": golden / "base", "openai/clip": golden / "clip"}
        fill_hub_cache(tmp_path / "hub", names)
        return {"cache_dir": tmp_path / "hub", "local_files_only": True}

    def test_base_and_revisions(self, hub):
        checkpoint = OriginalCheckpoint.open("me/task", **hub)
        assert checkpoint.lineage.root.name == "lmsys/vicuna"
        assert checkpoint.lineage.root.revision == checkpoint.repository.revision == "0" * 40
        facts = build_config(checkpoint).converted_from
        assert (facts["base_model"], facts["base_model_revision"]) == ("lmsys/vicuna", "0" * 40)
        assert set(checkpoint.tensors()) >= {"model.mm_projector.0.weight", "lm_head.weight"}

    def test_an_adapter_there_names_no_folder_here(self, hub):
        (file,) = hub["cache_dir"].glob("models--me--task/snapshots/*/adapter_config.json")
        change(file, base_model_name_or_path=str(LORA.folder / "base"))
        with pytest.raises(InvalidCheckpointError, match="is on the Hub, so it must name a model id"):
            OriginalCheckpoint.open("me/task", **hub)


class TestWeights:
    def test_rows_of_added_tokens(self, folder):
        """Trained embeddings of `<im_start>` and `<im_end>`. Their rows of the head are the mean, as in the training."""
        checkpoint = folder(PROJECTOR)
        change(checkpoint / "config.json", mm_use_im_start_end=True, vocab_size=602)
        base, rows = tensors_of(checkpoint.parent / "base"), torch.randn(2, 64).half()
        table = torch.cat([base["model.embed_tokens.weight"], rows])
        projector = torch.load(checkpoint / "mm_projector.bin")
        for saved in (table, rows):  # newer and older trainings
            torch.save({**projector, "model.embed_tokens.weight": saved}, checkpoint / "mm_projector.bin")
            model = OriginalLlavaForConditionalGeneration.from_pretrained(checkpoint)
            assert torch.equal(model.embed_tokens.weight[:602], table)
            assert torch.equal(model.image_encoder.borders, rows)
            head = base["lm_head.weight"]
            assert torch.equal(model.language_model.lm_head.weight[:600], head)
            assert torch.equal(model.language_model.lm_head.weight[601], head.float().mean(dim=0).half())

    def test_adapter_of_transformers_over_a_whole_llava(self, folder):
        """PEFT writes no `config.json`. The vision tower and the projector may be trained, too."""
        base = Golden("llava15_vicuna").checkpoint
        adapter = folder().parent / "peft"
        adapter.mkdir()
        shutil.copy(LORA.checkpoint / "adapter_config.json", adapter)
        modules = {
            "language_model.model.layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj",
            "multi_modal_projector.linear_2": "model.mm_projector.2",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1": "vision_model.encoder.layers.0.mlp.fc1",
        }
        before = OriginalCheckpoint.open(base)
        weights = {**before.tensors(), **before.vision_tensors()}
        trained, expected = {}, {}
        for name, original in modules.items():
            weight = weights[f"{original}.weight"]
            a, b = torch.randn(8, weight.shape[1]), torch.randn(weight.shape[0], 8)
            trained |= {f"base_model.model.{name}.lora_{side}.weight": value for side, value in (("A", a), ("B", b))}
            expected[f"{original}.weight"] = (weight.float() + 2.0 * (b @ a)).to(weight.dtype)
        torch.save(trained, adapter / "adapter_model.bin")
        assert find_original(adapter) is None  # an adapter of a language model, for all that is known
        assert find_original(adapter, base_model=str(base)).folder == adapter
        checkpoint = OriginalCheckpoint.open(adapter, base_model=str(base))
        found = {**checkpoint.tensors(), **checkpoint.vision_tensors()}
        assert all(torch.equal(found[name], {**weights, **expected}[name]) for name in weights)

    def test_what_does_not_fit_is_refused_before_the_base_is_read(self, folder):
        checkpoint = folder()
        for file in (checkpoint.parent / "base").glob("*.bin"):
            file.write_bytes(b"")
        tensors = torch.load(checkpoint / "adapter_model.bin")
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        torch.save({**tensors, name: torch.ones(8, 32)}, checkpoint / "adapter_model.bin")
        with pytest.raises(InvalidCheckpointError, match=r"q_proj.weight is changed by \(64, 32\), and is \(64, 64\)"):
            _ = OriginalCheckpoint.open(checkpoint).weight_files

    def test_delta_without_its_base(self, folder):
        golden = Golden("llava15_vicuna")
        delta = shutil.copytree(golden.folder, folder().parent / "golden", copy_function=shutil.copy) / "checkpoint"
        for file in delta.glob("pytorch_model*.bin"):
            torch.save({name: tensor * 0.01 for name, tensor in torch.load(file).items()}, file)
        with pytest.raises(InvalidCheckpointError, match=r"holds delta weights.*--model-kwargs '\{\"base_model\""):
            OriginalCheckpoint.open(delta).tensors()


class TestKinds:
    def test_lora(self, folder):
        lineage = trace(checkpoint := folder())
        assert [step.kind for step in lineage.steps] == [Kind.LORA]
        assert lineage.root.folder == checkpoint.parent / "base"
        assert lineage.settings.folder == checkpoint
        assert lineage.tokenizer.folder == checkpoint.parent / "base"
        tensors = merge(tensors_of(checkpoint.parent / "base"), lineage.overlays())
        projector = map_tensors(checkpoint / "non_lora_trainables.bin")
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            expected = projector[f"base_model.model.model.mm_projector.{name}"].half()
            assert torch.equal(tensors[f"model.mm_projector.{name}"], expected)

    def test_projector(self, folder):
        lineage = trace(checkpoint := folder(PROJECTOR))
        assert [step.kind for step in lineage.steps] == [Kind.PROJECTOR]
        base = tensors_of(checkpoint.parent / "base")
        tensors = merge(base, lineage.overlays())
        projector = {name: tensor.half() for name, tensor in map_tensors(checkpoint / "mm_projector.bin").items()}
        assert tensors.keys() == base.keys() | projector.keys()
        assert all(torch.equal(tensors[name], {**base, **projector}[name]) for name in tensors)

    def test_whole(self):
        lineage = trace(Golden("linear_fp16_sharded").checkpoint)
        assert lineage.steps == ()
        assert lineage.root == lineage.settings == lineage.tokenizer

    def test_delta(self, folder):
        """Whole weights, and a base that the user names."""
        base = folder().parent / "base"
        whole = tensors_of(base)
        delta = {name: (tensor * 0.01).half() for name, tensor in whole.items()}
        delta["model.embed_tokens.weight"] = torch.cat([delta["model.embed_tokens.weight"], torch.ones(3, 64).half()])
        delta["model.mm_projector.weight"] = torch.ones(64, 32).half()
        target = base.parent / "d"
        shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.bin*"))
        torch.save(delta, target / "pytorch_model.bin")
        lineage = trace(target, str(base))
        assert [step.kind for step in lineage.steps] == [Kind.DELTA]
        assert lineage.tokenizer.folder == target
        tensors = merge(whole, lineage.overlays())
        assert torch.equal(tensors["lm_head.weight"], delta["lm_head.weight"] + whole["lm_head.weight"])
        assert tensors["model.embed_tokens.weight"].shape == (603, 64)
        assert torch.equal(tensors["model.mm_projector.weight"], delta["model.mm_projector.weight"])

    def test_whole_weights_are_not_a_delta(self, folder):
        base = folder().parent / "base"
        change(base / "config.json", mm_vision_tower="../clip")
        with pytest.raises(InvalidCheckpointError, match="whole weights of a model.*Leave `base_model` out"):
            trace(base, str(base)).overlays()

    def test_adapter_of_an_adapter(self, folder):
        """The second is trained on the result of the first, and brings no projector."""
        first = folder()
        second = shutil.copytree(first, first.parent / "b")
        change(second / "adapter_config.json", base_model_name_or_path="../a")
        (second / "non_lora_trainables.bin").unlink()
        (second / "config.json").unlink()
        lineage = trace(second)
        assert [step.repository.folder for step in lineage.steps] == [first, second]
        assert lineage.root.folder == first.parent / "base"
        assert lineage.settings.folder == first

    def test_adapters_of_the_user(self, folder):
        first = folder()
        second = shutil.copytree(first, first.parent / "b")
        lineage = trace(first, adapters=[str(second), "../b"])
        assert [step.repository.folder for step in lineage.steps] == [first, second, second]


class TestBase:
    def test_chosen(self, folder, caplog):
        checkpoint = folder()
        shutil.move(checkpoint.parent / "base", checkpoint.parent / "elsewhere")
        change(checkpoint.parent / "elsewhere" / "config.json", _name_or_path="other")
        with caplog.at_level(logging.WARNING):
            assert trace(checkpoint, str(checkpoint.parent / "elsewhere")).root.folder.name == "elsewhere"
        assert "elsewhere' as you have chosen" in caplog.text.replace("',", "'")
        assert "was trained on '../base' (base_model_name_or_path in adapter_config.json)" in caplog.text

    @pytest.mark.parametrize("name", ["x/base", "base"])
    def test_chosen_copy_of_the_named_one(self, folder, caplog, name):
        checkpoint = folder()
        change(checkpoint / "adapter_config.json", base_model_name_or_path=name)
        with caplog.at_level(logging.WARNING):
            trace(checkpoint, str(checkpoint.parent / "base"))
        assert caplog.text == ""

    @pytest.mark.parametrize("name", ["../nowhere", "/no/such/folder"])
    def test_not_found(self, folder, name):
        checkpoint = folder()
        change(checkpoint / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(InvalidCheckpointError, match=r"base_model_name_or_path.* was not found.*--model-kwargs"):
            trace(checkpoint)

    def test_not_named(self, folder):
        checkpoint = folder(PROJECTOR)
        change(checkpoint / "config.json", _name_or_path="absent")
        with pytest.raises(InvalidCheckpointError, match=r"only a projector, and does not name.*--model-kwargs"):
            trace(checkpoint)

    def test_circle(self, folder):
        checkpoint = folder()
        change(checkpoint / "adapter_config.json", base_model_name_or_path="../a")
        with pytest.raises(InvalidCheckpointError, match="more than 16 steps from a whole model"):
            trace(checkpoint)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hidden_size": 128}, "hidden_size is 64, and 128 in the base"),
            ({"num_hidden_layers": 4}, "num_hidden_layers is 3, and 4 in the base"),
            ({"model_type": "mistral"}, "its language model is a LLaMA, and a Mistral in the base"),
        ],
        ids=str,
    )
    def test_of_another_model(self, folder, options, message):
        checkpoint = folder()
        change(checkpoint.parent / "base" / "config.json", **options)
        with pytest.raises(InvalidCheckpointError, match=message):
            trace(checkpoint)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"quantization_config": {"load_in_4bit": True}}, "are quantized.*full-precision weights"),
            ({"model_type": "llava", "text_config": {}}, "in the format of transformers"),
        ],
        ids=["quantized", "transformers"],
    )
    def test_in_another_format(self, folder, options, message):
        checkpoint = folder()
        change(checkpoint.parent / "base" / "config.json", **options)
        with pytest.raises(UnsupportedCheckpointError, match=message):
            trace(checkpoint)


class TestProjectorIsMissing:
    def test_checkpoint_of_a_running_training(self, folder):
        above = folder()
        checkpoint = above / "checkpoint-5"
        checkpoint.mkdir()
        for name in ("adapter_config.json", "adapter_model.bin"):
            shutil.copy(above / name, checkpoint)
        with pytest.raises(InvalidCheckpointError) as error:
            trace(checkpoint, str(above.parent / "base"))
        assert "has no non_lora_trainables.bin" in str(error.value)
        assert f"It is in {above}: export this folder." in str(error.value)

    def test_by_the_command(self, folder, optimum_cli):
        checkpoint = folder() / "checkpoint-5"
        checkpoint.mkdir()
        shutil.copy(LORA.checkpoint / "adapter_config.json", checkpoint)
        status, _, error = optimum_cli("export", "openvino", "--model", checkpoint, checkpoint.parent / "bundle")
        assert status == 1
        assert "checkpoint-5" in error

    def test_not_in_the_folder_above(self, folder):
        checkpoint = folder()
        (checkpoint / "non_lora_trainables.bin").unlink()
        with pytest.raises(InvalidCheckpointError, match="Copy it from there.*global_step"):
            trace(checkpoint)


def test_adapter_that_is_none(folder):
    checkpoint = folder()
    with pytest.raises(InvalidCheckpointError, match="'../clip' is not an adapter"):
        trace(checkpoint, adapters=["../clip"])
