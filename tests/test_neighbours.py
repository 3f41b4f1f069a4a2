"""Habits of others that must hold beside this package, each in a process that has done nothing else before."""

import filecmp
import json
import sys
from pathlib import Path

import openvino
import pytest
import torch
from conftest import EXACT, GOLDENS, Golden, files, run
from optimum.exporters.openvino import convert
from optimum.intel import OVConfig, OVModelForVisualCausalLM
from optimum.intel.openvino import modeling_visual_language
from transformers import AutoModelForImageTextToText

from optimum_llava_ov import OVModelForLlavaMPT, main_export
from optimum_llava_ov.bundle.precision import weight_bytes


pytestmark = pytest.mark.slow


CHECKPOINT = GOLDENS[0].checkpoint


def test_names_of_the_hosts_can_be_imported_first():
    """What is tried is said in `import_order.py`."""
    result = run(sys.executable, Path(__file__).with_name("import_order.py"), check=False, fresh=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tried = json.loads(result.stdout)
    assert tried["failures"] == {}
    assert {"transformers.models.auto.modeling_auto", "transformers.trainer", "optimum.intel.openvino"} <= set(
        tried["ours first"]
    )
    assert len(tried["ours first"]) > 60
    assert len(tried["ours last"]) > 3


AUTO_CLASSES = """
import json, sys
import optimum_llava_ov
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

checkpoint = sys.argv[1]
load = AutoModelForImageTextToText.from_pretrained
asked = {
    "nothing": {},
    "dtype": {"dtype": torch.float32},
    "torch_dtype": {"torch_dtype": torch.float32},
    "a name": {"dtype": "float32"},
    "a device": {"dtype": torch.bfloat16, "device_map": "cpu"},
    "config": {"config": AutoConfig.from_pretrained(checkpoint, dtype=torch.float32)},
}
models = {name: load(checkpoint, **kwargs) for name, kwargs in asked.items()}
processor = AutoProcessor.from_pretrained(checkpoint)
found = {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}
found["mixed"] = [name for name, model in models.items() if len({weight.dtype for weight in model.parameters()}) > 1]
found["class"] = type(models["dtype"]).__name__
found["as stored"] = load(checkpoint, dtype="auto").language_model.lm_head.weight.dtype == torch.float16
found["config.dtype"] = str(models["dtype"].config.dtype)
found["is known"] = isinstance(models["dtype"], AutoModelForImageTextToText._model_mapping[type(models["dtype"].config)])
found["processor"] = type(processor).__name__
found["prompt"] = processor(text="<image>hello", images=__import__("PIL.Image").Image.new("RGB", (8, 8)), return_tensors="pt")["input_ids"].shape[1] > 16
found["tokenizer"] = AutoTokenizer.from_pretrained(checkpoint)("hello")["input_ids"] == processor.tokenizer("hello")["input_ids"]
found["optimum"] = [name for name in sys.modules if name.startswith("optimum.")]
print(json.dumps(found))
"""


def test_auto_classes_know_an_original_checkpoint():
    """With nothing imported but this package and transformers."""
    found = json.loads(run(sys.executable, "-c", AUTO_CLASSES, CHECKPOINT, fresh=True).stdout)
    assert found == {
        "nothing": "float16",  # what config.json says
        "dtype": "float32",
        "torch_dtype": "float32",
        "a name": "float32",
        "a device": "bfloat16",
        "config": "float32",
        "mixed": [],
        "class": "LlavaMptForConditionalGeneration",
        "as stored": True,
        "config.dtype": "torch.float32",
        "is known": True,
        "processor": "LlavaProcessor",
        "prompt": True,
        "tokenizer": True,
        "optimum": [],
    }


def test_a_torch_model_can_be_exported(tmp_path, models):
    """By Optimum's function; the model can be used afterwards, and its weights are what counts."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    written = convert.export_from_model(model, tmp_path / "bundle", task="image-text-to-text")
    assert {tmp_path / "bundle" / name for name in written} <= set((tmp_path / "bundle").iterdir())
    ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids=ids).logits
    exported = OVModelForLlavaMPT.from_pretrained(tmp_path / "bundle", ov_config=EXACT)
    torch.testing.assert_close(exported(input_ids=ids).logits, expected, atol=5e-4, rtol=0)

    model.language_model.transformer.norm_f.weight.mul_(2)
    convert.export_from_model(model, tmp_path / "changed", ov_config=OVConfig(dtype="fp32"))
    changed = OVModelForLlavaMPT.from_pretrained(tmp_path / "changed", ov_config=EXACT)
    torch.testing.assert_close(changed(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3, rtol=0)
    assert not torch.allclose(changed(input_ids=ids).logits, expected, atol=0.1)
    assert files(tmp_path / "changed") == files(tmp_path / "bundle")


def test_only_weights_of_a_torch_model_are_rounded(tmp_path):
    """In fp16, constants such as the frequencies of rotary embeddings stay exact, and so does the model itself."""
    golden = Golden("llava15_vicuna")
    model = AutoModelForImageTextToText.from_pretrained(golden.checkpoint, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    convert.export_from_model(model, tmp_path / "bundle", ov_config=OVConfig(dtype="fp16"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    main_export(golden.checkpoint, tmp_path / "same", ov_config=OVConfig(dtype="fp16"))
    for part in ("language_model", "text_embeddings_model", "vision_embeddings_model"):
        names = [tmp_path / folder / f"openvino_{part}.bin" for folder in ("bundle", "same")]
        assert filecmp.cmp(*names, shallow=False), part


@pytest.mark.parametrize("quantization_config", [{"bits": 4}, {"bits": 8}], ids=["4 bits", "8 bits"])
def test_the_hosts_class_compresses_as_ours(quantization_config):
    """The default recipe is that of LLaVA-MPT, also where the host's own does not fit the model's width."""
    options = {"export": True, "compile": False, "quantization_config": quantization_config}
    hosts = OVModelForVisualCausalLM.from_pretrained(CHECKPOINT, **options)
    ours = OVModelForLlavaMPT.from_pretrained(CHECKPOINT, **options)
    assert type(hosts) is OVModelForLlavaMPT
    for part, graph in ours.ov_models.items():
        assert weight_bytes(hosts.ov_models[part]) == weight_bytes(graph)


OFFLINE = """
import sys
from pathlib import Path
import optimum_llava_ov
from optimum.intel import OVModelForVisualCausalLM

for folder in (*sys.argv[1:], Path(sys.argv[1])):
    print(type(OVModelForVisualCausalLM.from_pretrained(folder, compile=False)).__name__)
"""


def test_the_hosts_class_takes_folders_without_a_network(bundles):
    """A bundle, and a checkpoint without `export=True`. The host would look for both in the Hub's cache."""
    result = run(sys.executable, "-c", OFFLINE, bundles[GOLDENS[0].name], CHECKPOINT, env={"HF_HUB_OFFLINE": "1"})
    assert result.stdout.split() == ["OVModelForLlavaMPT"] * 3
    assert all("/3 [" in line for line in result.stderr.splitlines() if line.strip()), (
        result.stderr
    )  # no warnings, but progress


def test_the_hosts_table_has_a_class(bundles):
    """As the host's tests use it: to ask what a model is, and for what belongs to the class."""
    llava = modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING["llava"]
    assert isinstance(llava, type)
    assert llava.auto_model_class is AutoModelForImageTextToText
    model = OVModelForVisualCausalLM.from_pretrained(bundles[GOLDENS[0].name], compile=False)
    assert type(model) is OVModelForLlavaMPT
    assert isinstance(model, llava)
    assert modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING["llava_mpt"] is llava


def test_our_class_does_not_need_the_hosts_table(bundles, monkeypatch):
    """As with a version of the host that we do not know, where nothing of it is changed."""
    stock = modeling_visual_language._OVLlavaForCausalLM
    monkeypatch.setitem(modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING, "llava", stock)
    bundle = bundles[GOLDENS[0].name]
    assert type(OVModelForLlavaMPT.from_pretrained(bundle, compile=False)) is OVModelForLlavaMPT
    assert isinstance(
        OVModelForLlavaMPT.from_pretrained(bundle, compile_only=True).ov_models["lm_model"], openvino.CompiledModel
    )


def test_attributes_that_others_read(bundles, torch_models):
    """LangChain's `HuggingFacePipeline` reads `name_or_path`, the host's tests `_support_new_processing`, many `num_parameters()`."""
    bundle = bundles[GOLDENS[0].name]
    model = OVModelForLlavaMPT.from_pretrained(bundle, compile=False)
    assert Path(model.name_or_path) == bundle
    assert model._support_new_processing
    in_torch = torch_models[GOLDENS[0].name]
    layers = [layer for layer in in_torch.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    expected = sum(layer.weight.numel() for layer in (in_torch.embed_tokens, *layers))
    assert model.num_parameters() == expected
    assert 0 < model.num_parameters(exclude_embeddings=True) < expected
    assert model.num_parameters(only_trainable=True) == 0
