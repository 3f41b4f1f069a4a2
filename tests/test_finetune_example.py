"""`examples/finetune`: what it trains is converted exactly, what ships has learned, and its pages run."""

import json
import os
import re
import shutil
import sys

import nbformat
import pytest
import torch
from conftest import EXACT, EXAMPLES, quick_programs, run
from hub_server import HubServer
from nbclient import NotebookClient
from optimum.intel import OVConfig
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor

from optimum_llava_ov import OriginalLlavaForConditionalGeneration, OVModelForLlava, main_export
from optimum_llava_ov.evaluation.evaluate import evaluate
from optimum_llava_ov.samples.files import read_samples


pytestmark = pytest.mark.slow


ROOT = EXAMPLES.parent
EXAMPLE, BASE = EXAMPLES / "finetune", EXAMPLES / "shapes" / "checkpoint-llama"
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
SHIPPED = EXAMPLE / "ring-lora"


def of_tutorial(program: str) -> list[str]:
    """The words of the page's command that runs a program."""
    (line,) = re.findall(rf"^    (python examples/finetune/{program} .+)$", TUTORIAL, re.MULTILINE)
    return line.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the tutorial has trained: its commands, with little data and few steps."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "examples").symlink_to(EXAMPLES)
    run(*of_tutorial("data.py"), "--num-train", "12", "--num-held-out", "30", cwd=folder)
    run(*of_tutorial("train.py"), "--steps", "4", "--batch-size", "4", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def base_bundle(export_once):
    return export_once("shapes-llama-ov", BASE)


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once("ring-ov", SHIPPED)


def test_export_gives_the_tokens_of_peft(folder, tmp_path):
    """PEFT reads what the training has written, and computes the same."""
    lora = folder / "ring-lora"
    assert {file.name for file in lora.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"
    }  # fmt: skip
    model = OriginalLlavaForConditionalGeneration.from_pretrained(BASE, dtype="float32")
    prefix, tokens = "base_model.model.", model.config.num_known_tokens
    trained = {n.removeprefix(prefix): w.float() for n, w in torch.load(lora / "non_lora_trainables.bin").items()}
    with torch.no_grad():
        model.embed_tokens.weight[:tokens] = trained.pop("model.embed_tokens.weight")
        model.language_model.lm_head.weight[:tokens] = trained.pop("lm_head.weight")
    projector = {name.removeprefix("model.mm_projector."): weight for name, weight in trained.items()}
    model.image_encoder.projector.load_state_dict(projector)
    config = LoraConfig.from_pretrained(lora)
    config.task_type = None  # else PEFT asks for methods of transformers' models
    PeftModel.from_pretrained(model.language_model, lora, config=config)  # changes the layers in place

    main_export(lora, tmp_path / "bundle", ov_config=OVConfig(dtype="fp32"))
    exported = OVModelForLlava.from_pretrained(tmp_path / "bundle", ov_config=EXACT)
    processor = AutoProcessor.from_pretrained(tmp_path / "bundle")
    plain = OriginalLlavaForConditionalGeneration.from_pretrained(BASE, dtype="float32")
    for sample in read_samples(folder / "rings" / "held_out.jsonl")[:3]:
        inputs = sample.inputs(processor)
        with torch.no_grad():
            expected, untrained = model(**inputs).logits[..., :-1], plain(**inputs).logits[..., :-1]
        assert (exported(**inputs).logits[..., :-1] - expected).abs().max() < 5e-4
        assert (untrained - expected).abs().max() > 0.05
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(exported.generate(**inputs, **options), model.generate(**inputs, **options))


def test_labels_are_the_answers(folder):
    """Each token that the model must write, and no other."""
    code = (
        "import json, sys; sys.path.insert(0, 'examples/finetune'); import train\n"
        "model = train.OriginalLlavaForConditionalGeneration.from_pretrained(train.BASE, dtype='float32')\n"
        "processor = train.AutoProcessor.from_pretrained(train.BASE)\n"
        "samples = train.DataSet(train.Path('rings'), model, processor).samples\n"
        "print(json.dumps([processor.decode(labels[labels != -100]) for _, labels, _ in samples]))"
    )
    texts = json.loads(run(sys.executable, "-c", code, cwd=folder).stdout)
    conversations = json.loads((folder / "rings" / "train.json").read_text())
    for text, sample in zip(texts, conversations, strict=True):
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        assert [part.strip() for part in text.split("</s>")] == [*answers, ""]


def test_has_learned_and_not_forgotten(folder, base_bundle, bundle, tmp_path):
    ring = shutil.copytree(bundle, tmp_path / "ring-ov")
    options = {"max_new_tokens": 60, "work_dir": tmp_path / "work"}
    (rings,) = evaluate([ring], base_bundle, folder / "rings" / "held_out.jsonl", **options).values()
    assert rings.reference_accuracy <= 0.2
    assert rings.accuracy >= 0.9
    (shapes,) = evaluate([ring], base_bundle, num_samples=24, **options).values()
    assert shapes.accuracy >= shapes.reference_accuracy - 0.05  # one answer


def test_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 1_000_000


@pytest.mark.hub
def test_card_on_the_hub(bundle, tmp_path):
    with HubServer(tmp_path / "hub") as server:
        run("optimum-cli", "llava-ov", "push", bundle, "me/ring-ov", env=server.env(tmp_path / "home"))
        card = server.files("me/ring-ov")["README.md"].decode()
    assert "| checkpoint-llama | base model |" in card
    assert "| ring-lora | LoRA adapter, rank 16, alpha 32 |  | apache-2.0 |" in card
    assert "license: apache-2.0" in card


def test_notebook(tmp_path, monkeypatch):
    """It runs from the first cell to the last, with little data and few steps. What is stored are outputs of a whole run."""
    notebook = nbformat.read(EXAMPLE / "finetune.ipynb", as_version=4)
    stored = "".join(
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    (after, before), _ = re.findall(r"^ring-ov .* (\d+\.\d)% \(reference (\d+\.\d)%\)$", stored, re.MULTILINE)
    assert float(before) <= 20
    assert float(after) >= 90

    shutil.copytree(EXAMPLES / "shapes", tmp_path / "shapes")
    here = shutil.copytree(EXAMPLE, tmp_path / "finetune", ignore=shutil.ignore_patterns("ring-lora"))
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = "NUM_TRAIN, STEPS, NUM_HELD_OUT, NUM_OLD = 8, 2, 2, 2"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{quick_programs(tmp_path / 'bin')}:{os.environ['PATH']}")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert any("Wrote the fine-tune to my-lora" in text for text in texts)
    assert any(re.search(r"^ring-ov: \S", text, re.MULTILINE) for text in texts)
    assert "Nothing was published (--dry-run)." in texts[-1]
