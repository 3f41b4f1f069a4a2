"""Fine-tunes of the original's training: what is recognised, where the base is found, and what is refused before weights are read."""

import json
import logging
import shutil

import pytest
import torch
from conftest import Golden

from optimum_llava_ov import InvalidCheckpointError, UnsupportedCheckpointError
from optimum_llava_ov.checkpoint.fine_tune import Kind, Lineage
from optimum_llava_ov.checkpoint.merge import merge
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_tensors


LORA, PROJECTOR = Golden("lora"), Golden("projector_only")


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

    def test_not_in_the_folder_above(self, folder):
        checkpoint = folder()
        (checkpoint / "non_lora_trainables.bin").unlink()
        with pytest.raises(InvalidCheckpointError, match="Copy it from there.*global_step"):
            trace(checkpoint)


def test_adapter_that_is_none(folder):
    checkpoint = folder()
    with pytest.raises(InvalidCheckpointError, match="'../clip' is not an adapter"):
        trace(checkpoint, adapters=["../clip"])
