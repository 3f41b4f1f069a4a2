"""Write and read the example models, with the files and the names of the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from families import HERE, Family
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration


def copy_settings(family: Family, folder: Path) -> OriginalCheckpoint:
    """Copy everything but the weights of the model that ships: configuration, tokenizer, image processor."""
    for name in (family.checkpoint, family.clip):
        if folder.resolve() != HERE:
            weights = shutil.ignore_patterns("*.bin", "*.index.json", "*.safetensors")
            shutil.copytree(HERE / name, folder / name, ignore=weights, dirs_exist_ok=True)
    return OriginalCheckpoint.open(folder / family.checkpoint)


def load(checkpoint: OriginalCheckpoint) -> OriginalLlavaForConditionalGeneration:
    """Load a model that `save` wrote, to train it further."""
    model = OriginalLlavaForConditionalGeneration.from_checkpoint(checkpoint, torch.float32)
    if checkpoint.config.text_config.tie_word_embeddings:
        model.language_model.lm_head.weight = model.embed_tokens.weight
    return model


def save(model: OriginalLlavaForConditionalGeneration, family: Family, folder: Path) -> None:
    """Write the weights of the checkpoint and of its vision tower."""
    config = model.config
    tensors = {config.prefix + config.table: model.embed_tokens.weight[: config.num_known_tokens]}
    decoder = model.language_model.named_parameters()
    tensors |= {name: parameter for name, parameter in decoder if not name.startswith("lm_head.")}
    projector = model.image_encoder.projector.named_parameters()
    tensors |= {f"{config.prefix}mm_projector.{name}": parameter for name, parameter in projector}
    if not config.text_config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.language_model.lm_head.weight[: config.num_known_tokens]
    tensors = {name: tensor.detach().half().clone() for name, tensor in tensors.items()}
    write_shards(folder / family.checkpoint, tensors)

    # The model has no layers after the selected one, but a tower on disk is complete
    tower = CLIPVisionModel(config.vision_config)
    tower.vision_model.load_state_dict(model.image_encoder.features.state_dict(), strict=False)
    state_dict = {
        f"vision_model.{name}": parameter.detach().half().clone()
        for name, parameter in tower.vision_model.named_parameters()
    }
    save_file(state_dict, folder / family.clip / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write two files and their index, as the original is sharded."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards, weight_map, written = ({}, {}), {}, 0
    for name, tensor in tensors.items():
        shard = int(written >= total / 2)
        shards[shard][name] = tensor
        weight_map[name] = f"pytorch_model-{shard + 1:05d}-of-00002.bin"
        written += tensor.nbytes
    for index, shard in enumerate(shards):
        torch.save(shard, folder / f"pytorch_model-{index + 1:05d}-of-00002.bin")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
