"""Adapters that PEFT has made over each family: an export gives the model that PEFT's own merge gives in torch."""

import json

import pytest
import torch
from conftest import EXACT, Golden
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from optimum_llava_ov import OriginalLlavaForConditionalGeneration, OVModelForLlava


pytestmark = pytest.mark.slow


GOLDENS = [Golden("linear_fp16_sharded"), Golden("mlp2x_fp32_pad"), Golden("llava16_mistral_anyres")]
by_family = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
LINEAR = {
    "linear_fp16_sharded": ["Wqkv", "out_proj", "up_proj", "down_proj"],
    "mlp2x_fp32_pad": ["Wqkv", "out_proj", "up_proj", "down_proj"],
    "llava16_mistral_anyres": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANDOM = {"init_lora_weights": False}  # otherwise an adapter changes nothing before it is trained


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    golden = request.getfixturevalue("golden")
    return OriginalLlavaForConditionalGeneration.from_pretrained(golden.checkpoint, dtype="float32")


def change(module):
    """As a training of the whole module."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.2).add_(0.1 * weight.std() * torch.randn_like(weight))


def assert_exports_as(merged, folder, golden, optimum_cli):
    """Logits at every position, and greedy tokens."""
    bundle = folder.parent / "bundle"
    status, _, errors = optimum_cli(
        "export", "openvino", "--model", folder, "--weight-format", "fp32",
        "--model-kwargs", json.dumps({"base_model": str(golden.checkpoint)}), bundle,
    )  # fmt: skip
    assert status == 0, errors
    exported, processor = (
        OVModelForLlava.from_pretrained(bundle, ov_config=EXACT),
        AutoProcessor.from_pretrained(bundle),
    )
    base = OriginalLlavaForConditionalGeneration.from_pretrained(golden.checkpoint, dtype="float32")
    for case in ("text_only", "image_start"):
        prompt = golden.cases[case]["prompt"].replace("<im_start><image><im_end>", "<image>")
        inputs = processor(text=prompt, images=golden.images(case), return_tensors="pt")
        with torch.no_grad():
            expected, before = merged(**inputs).logits[..., :-1], base(**inputs).logits[..., :-1]
        assert (before - expected).abs().max() > 0.5, "the adapter changes too little for a test"
        assert (exported(**inputs).logits[..., :-1] - expected).abs().max() < 5e-4, case
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert torch.equal(exported.generate(**inputs, **options), merged.generate(**inputs, **options)), case


@by_family
def test_adapter_and_projector_of_the_original_code(golden, model, tmp_path, optimum_cli):
    """LoRA over the language model, by the original's names, and a projector that was trained as a whole."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR[golden.name], **RANDOM)
    adapter = get_peft_model(model.language_model, config)
    adapter.save_pretrained(tmp_path / "task")
    change(model.image_encoder.projector)
    prefix = f"base_model.model.{model.config.prefix}mm_projector."
    torch.save(model.image_encoder.projector.state_dict(prefix=prefix), tmp_path / "task" / "non_lora_trainables.bin")
    values = json.loads((golden.checkpoint / "config.json").read_text())
    values["mm_vision_tower"] = str(golden.folder / "clip")
    (tmp_path / "task" / "config.json").write_text(json.dumps(values))
    adapter.merge_and_unload()
    assert_exports_as(model, tmp_path / "task", golden, optimum_cli)


@by_family
def test_adapter_of_peft_over_the_whole_llava(golden, model, tmp_path, optimum_cli):
    """Rank-stabilized, target modules as an expression, and the projector in `modules_to_save`. No `config.json`."""
    names = "|".join(LINEAR[golden.name])
    config = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=rf"language_model\..*\.({names})",
        modules_to_save=["projector"], rank_pattern={"down_proj": 2}, **RANDOM,
    )  # fmt: skip
    adapter = get_peft_model(model, config)
    change(model.image_encoder.projector.modules_to_save["default"])
    adapter.save_pretrained(tmp_path / "task", save_embedding_layers=False)
    file = tmp_path / "task" / "adapter_model.safetensors"
    # As the original's modules are named
    renames = {"image_encoder.projector": f"{model.config.prefix}mm_projector", "language_model.": ""}
    tensors = {}
    for name, tensor in load_file(file).items():
        for ours, originals in renames.items():
            name = name.replace(ours, originals)
        tensors[name] = tensor
    assert any("mm_projector" in name for name in tensors)
    save_file(tensors, file)
    assert_exports_as(adapter.merge_and_unload(), tmp_path / "task", golden, optimum_cli)
