"""LoRA adapters at run time, in GenAI: an adapter gives the answer of the model that it was merged into."""

import copy
import json
import shutil

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from conftest import EXACT, Golden
from optimum.intel import OVConfig
from safetensors.torch import load_file, save_file

from optimum_llava_ov import OVModelForLlavaMPT, main_export
from optimum_llava_ov.export.adapter import export_adapter


pytestmark = pytest.mark.genai


GOLDEN = Golden("linear_fp16_sharded")
RANK, ALPHA = 4, 2.0
QUESTION = "What is in the picture?"
# PEFT's names for the classes that a LLaVA-MPT is trained with: the original code's and transformers' MPT, and ours
PREFIXES = ("base_model.model.transformer", "base_model.model.language_model.transformer")


@pytest.fixture(scope="module")
def image():
    return GOLDEN.image("img2_224x224")


@pytest.fixture(scope="module")
def merged(torch_models):
    """The torch model with an adapter merged in, and the tensors of the adapter by the names of their modules."""
    model = copy.deepcopy(torch_models[GOLDEN.name])
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in model.language_model.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            a = 0.1 * torch.randn(RANK, module.in_features, generator=generator)
            b = 0.1 * torch.randn(module.out_features, RANK, generator=generator)
            module.weight.data += ALPHA / RANK * b @ a
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    assert len(tensors) == 2 * 4 * 3
    return model, tensors


@pytest.fixture(scope="module")
def adapters(merged, tmp_path_factory):
    folder, (_, tensors) = tmp_path_factory.mktemp("adapters"), merged
    files = {prefix: folder / f"{prefix}.safetensors" for prefix in PREFIXES}
    for prefix, file in files.items():
        save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, file)
    return {prefix: openvino_genai.Adapter(file) for prefix, file in files.items()}


@pytest.fixture(scope="module")
def answers(merged, torch_models, processors, image):
    """Without and with the adapter."""
    texts = [answer(model, processors[GOLDEN.name], image) for model in (torch_models[GOLDEN.name], merged[0])]
    assert texts[0] != texts[1]
    return texts


def answer(model, processor, image):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(pipeline, image, **kwargs):
    images = [openvino.Tensor(np.array(image)[None])]
    return pipeline.generate(QUESTION, images=images, max_new_tokens=12, ignore_eos=True, **kwargs).texts[0]


def pipeline_with(bundle, adapter, backend):
    config = openvino_genai.AdapterConfig(adapter, ALPHA / RANK)  # GenAI does not read PEFT's adapter_config.json
    return openvino_genai.VLMPipeline(bundle, "CPU", ATTENTION_BACKEND=backend, adapters=config, **EXACT)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_answers_of_the_merged_model(bundles, adapters, answers, image, backend, prefix, capfd):
    pipeline = pipeline_with(bundles[GOLDEN.name], adapters[prefix], backend)
    assert ask(pipeline, image) == answers[1]
    assert "Unused LoRA" not in capfd.readouterr().err


def test_an_adapter_can_be_switched_off(bundles, adapters, answers, image):
    pipeline = pipeline_with(bundles[GOLDEN.name], adapters[PREFIXES[0]], "SDPA")
    none = openvino_genai.AdapterConfig()
    assert [ask(pipeline, image), ask(pipeline, image, adapters=none), ask(pipeline, image)] == [answers[1], *answers]


@pytest.fixture(scope="module", params=[8, 4], ids=["int8", "int4"])
def compressed(request, bundles, merged, processors, image, tmp_path_factory):
    """A bundle with compressed weights, and its answers without the adapter and with the adapter added to these weights."""
    config = {"bits": request.param, "sym": False} | ({"group_size": 64, "ratio": 1.0} if request.param == 4 else {})
    folder = tmp_path_factory.mktemp("compressed")
    OVModelForLlavaMPT.from_pretrained(
        bundles[GOLDEN.name], quantization_config=config, compile=False
    ).save_pretrained(folder)
    reference = OVModelForLlavaMPT.from_pretrained(folder, ov_config=EXACT)
    texts = [answer(reference, processors[GOLDEN.name], image)]
    reference.clear_requests()
    add(merged[1], reference.ov_models["lm_model"])
    texts.append(answer(reference, processors[GOLDEN.name], image))
    assert texts[0] != texts[1]
    return folder, texts


def add(tensors, graph):
    """Put weights in float32, with the adapter added, in the place of compressed ones."""
    layers = {
        node.friendly_name.partition("transformer.")[2].partition("/")[0]: node
        for node in graph.get_ops()
        if node.get_type_name() == "MatMul"
    }
    for name in {name.partition(".lora")[0] for name in tensors}:
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        layer = layers[name]
        weights = openvino.Core().compile_model(openvino.Model([layer.input_value(1)], []), "CPU", EXACT)([])[0]
        constant = openvino.op.Constant(weights + ALPHA / RANK * (b @ a).numpy())
        layer.input(1).replace_source_output(constant.output(0))


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_compressed_weights(compressed, adapters, image, backend, capfd):
    """The adapter is computed beside the weights, whatever their precision."""
    bundle, expected = compressed
    pipeline = pipeline_with(bundle, adapters[PREFIXES[0]], backend)
    assert ask(pipeline, image) == expected[1]
    assert "Unused LoRA" not in capfd.readouterr().err


class TestCommand:
    """`optimum-cli llava-ov adapter`, for fine-tunes of the original code that GenAI cannot read."""

    QUESTIONS = ("What is in the picture?", "Where is it?")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        """A copy of the golden fine-tune, whose projector was trained too, with a head that has LoRA."""
        folder = tmp_path_factory.mktemp("separate")
        for name in ("checkpoint", "base", "clip"):
            shutil.copytree(Golden("lora").folder / name, folder / name, copy_function=shutil.copy)
        file = folder / "checkpoint" / "adapter_model.bin"
        generator = torch.Generator().manual_seed(0)
        a, b = (0.2 * torch.randn(*shape, generator=generator) for shape in ((8, 64), (600, 8)))
        head = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
        torch.save(torch.load(file) | {f"base_model.model.{name}": tensor for name, tensor in head.items()}, file)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def bundles(cls, folder):
        """With the LoRA merged, and without it."""
        options = {"merged": {}, "separate": {"lora": "separate"}}
        for name, model_kwargs in options.items():
            main_export(
                folder / "checkpoint", folder / name, ov_config=OVConfig(dtype="fp32"), model_kwargs=model_kwargs
            )
        return {name: folder / name for name in options}

    @pytest.fixture
    def adapter(self, folder, tmp_path, optimum_cli):
        status, output, _ = optimum_cli("llava-ov", "adapter", folder / "checkpoint", tmp_path / "task.safetensors")
        assert status == 0
        assert "LoRA of 22 layers" in output
        assert f'--model {folder / "checkpoint"} --model-kwargs \'{{"lora": "separate"}}\'' in output
        return openvino_genai.Adapter(tmp_path / "task.safetensors")

    @pytest.mark.parametrize("backend", ["SDPA", "PA"])
    def test_tokens_of_the_merged_bundle(self, bundles, adapter, image, backend, capfd):
        options = {"ATTENTION_BACKEND": backend, **EXACT}
        expected = self.answers(openvino_genai.VLMPipeline(bundles["merged"], "CPU", **options), image)
        adapters = openvino_genai.AdapterConfig(adapter)
        pipeline = openvino_genai.VLMPipeline(bundles["separate"], "CPU", adapters=adapters, **options)
        assert self.answers(pipeline, image) == expected
        assert "nused LoRA" not in capfd.readouterr().err
        without = openvino_genai.VLMPipeline(bundles["separate"], "CPU", **options)
        assert self.answers(without, image) != expected

    def test_continuous_batching(self, bundles, adapter, image):
        def generate(bundle, **options):
            pipeline = openvino_genai.ContinuousBatchingPipeline(
                bundle, openvino_genai.SchedulerConfig(), "CPU", {**EXACT, **options}
            )
            config = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
            images = [[openvino.Tensor(np.array(image)[None])]] * len(self.QUESTIONS)
            results = pipeline.generate(list(self.QUESTIONS), images, [config] * len(self.QUESTIONS))
            return [result.texts for result in results]

        adapters = openvino_genai.AdapterConfig(adapter)
        assert generate(bundles["separate"], adapters=adapters) == generate(bundles["merged"])

    def answers(self, pipeline, image):
        config = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
        images = [openvino.Tensor(np.array(image)[None])]
        return [
            pipeline.generate(question, images=images, generation_config=config).texts for question in self.QUESTIONS
        ]

    def test_the_bundle_says_what_is_missing(self, bundles):
        card = (bundles["separate"] / "README.md").read_text()
        assert "These weights are without the LoRA of the language model." in card
        assert '"lora": "separate"' in card
        assert "without the LoRA" not in (bundles["merged"] / "README.md").read_text()

    def test_adapters_in_a_row_are_one(self, folder, bundles, tmp_path, image):
        """The sum of their products. Both are in 16 bits, as they were."""
        kwargs = {"adapters": [str(folder / "checkpoint")]}
        export_adapter(folder / "checkpoint", tmp_path / "two.safetensors", kwargs)
        export_adapter(folder / "checkpoint", tmp_path / "one.safetensors")
        one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in {name.partition(".lora_")[0] for name in one}:
            a, b = (one[f"{name}.lora_{side}.weight"] for side in "AB")
            assert torch.equal(two[f"{name}.lora_A.weight"], torch.cat([a, a]))
            assert torch.equal(two[f"{name}.lora_B.weight"], torch.cat([b, b], dim=1))

    def test_no_file_is_replaced(self, folder, tmp_path, optimum_cli):
        (tmp_path / "task.safetensors").write_text("mine")
        status, _, errors = optimum_cli("llava-ov", "adapter", folder / "checkpoint", tmp_path / "task.safetensors")
        assert status == 1
        assert "task.safetensors exists already. Choose another name" in errors
        assert (tmp_path / "task.safetensors").read_text() == "mine"

    @pytest.mark.parametrize("name", ["projector_only", "llava15_vicuna"])
    def test_no_lora(self, name, tmp_path, optimum_cli):
        golden = Golden(name)
        kwargs = ("--model-kwargs", json.dumps({"base_model": str(golden.folder / "base")})) if "only" in name else ()
        status, _, errors = optimum_cli("llava-ov", "adapter", golden.checkpoint, tmp_path / "a.safetensors", *kwargs)
        assert status == 1
        assert "has no LoRA of a language model" in errors
        assert not list(tmp_path.iterdir())

    def test_another_value(self, folder):
        with pytest.raises(ValueError, match="lora is 'apart'. Expected 'merged' or 'separate'"):
            main_export(folder / "checkpoint", folder / "none", model_kwargs={"lora": "apart"})
