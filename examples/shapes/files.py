"""Write and read the example model, with the files and the names of the original."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import CONFIG, PREPROCESSOR, VISION_CONFIG
from safetensors.torch import save_file
from tokenizer import ADDED_TOKENS, END_OF_TEXT
from tokenizers import Tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel

from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration


def load(folder: Path) -> tuple[LlavaMptForConditionalGeneration, Tokenizer]:
    """Load a model that `save` wrote, to train it further."""
    model = LlavaMptForConditionalGeneration.from_pretrained(
        folder / "checkpoint", dtype=torch.float32
    ).requires_grad_(True)
    model.image_encoder.borders.requires_grad_(False)
    return model.train(), Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))


def save(model: LlavaMptForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `checkpoint/` and `clip/`, with the files and the names of the original."""
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    checkpoint.mkdir(parents=True, exist_ok=True)
    clip.mkdir(parents=True, exist_ok=True)

    tokenizer.save(str(checkpoint / "tokenizer.json"))
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    _write_json(checkpoint / "tokenizer_config.json", {**settings, **names, "tokenizer_class": "GPTNeoXTokenizer"})
    special = {"additional_special_tokens": list(ADDED_TOKENS[:2]), **names, "pad_token": END_OF_TEXT}
    _write_json(checkpoint / "special_tokens_map.json", special)
    _write_json(checkpoint / "config.json", {**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    eos_token_id = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, "<|im_end|>")]
    generation = {
        "_from_model_config": True,
        "transformers_version": "4.28.0.dev0",
        "use_cache": True,
        "eos_token_id": eos_token_id,
    }
    _write_json(checkpoint / "generation_config.json", generation)

    tensors = {"transformer.wte.weight": model.language_model.lm_head.weight[: model.config.image_token_id]}
    for name, parameter in model.language_model.transformer.named_parameters():
        tensors[f"transformer.{name}"] = parameter
    for name, parameter in model.image_encoder.projector.named_parameters():
        tensors[f"transformer.mm_projector.{name}"] = parameter
    _write_shards(checkpoint, {name: tensor.detach().half().clone() for name, tensor in tensors.items()})

    # The model has no layers after the selected one, but a tower on disk is complete
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION_CONFIG))
    tower.vision_model.load_state_dict(model.image_encoder.features.state_dict(), strict=False)
    state_dict = {
        f"vision_model.{name}": parameter.detach().half().clone()
        for name, parameter in tower.vision_model.named_parameters()
    }
    save_file(state_dict, clip / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        clip / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": VISION_CONFIG}
    )
    _write_json(clip / "preprocessor_config.json", PREPROCESSOR)


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
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
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
