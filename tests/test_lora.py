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
