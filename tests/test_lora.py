"""LoRA adapters at run time, in GenAI: an adapter gives the answer of the model that it was merged into."""

import copy

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from conftest import EXACT, Golden
from safetensors.torch import save_file

from optimum_llava_ov import OVModelForLlavaMPT


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
    processor, texts = processors[GOLDEN.name], []
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    for model in (torch_models[GOLDEN.name], merged[0]):
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        texts.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts[0] != texts[1]
    return texts


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


def test_compressed_weights(bundles, adapters, answers, image, tmp_path, capfd):
    """The adapter is computed beside the weights, whatever their precision. In 8 bits the answer is still the same."""
    for bits in (8, 4):
        config = {"bits": bits, "sym": False} | ({"group_size": 64, "ratio": 1.0} if bits == 4 else {})
        OVModelForLlavaMPT.from_pretrained(
            bundles[GOLDEN.name], quantization_config=config, compile=False
        ).save_pretrained(tmp_path / f"int{bits}")
        capfd.readouterr()
        pipeline = pipeline_with(tmp_path / f"int{bits}", adapters[PREFIXES[0]], "SDPA")
        with_adapter, without = ask(pipeline, image), ask(pipeline, image, adapters=openvino_genai.AdapterConfig())
        assert with_adapter != without
        assert "Unused LoRA" not in capfd.readouterr().err
        assert bits == 4 or with_adapter[:12] == answers[1][:12]
