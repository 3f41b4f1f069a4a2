"""Describe the checkpoints that `random_checkpoint.py` writes: shapes, configuration and tokenizer of each family.

`mpt` is LLaVA-Lightning-MPT-7B-preview, `llama` is LLaVA-1.5, `mistral` is LLaVA-Med-1.5, and `yi` is LLaVA-1.6-34B.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_llava_ov.checkpoint.sentencepiece import SentencePieceModel


GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
TINY = GOLDEN / "linear_fp16_sharded"
LLAMA = GOLDEN / "llava15_vicuna" / "checkpoint"
MISTRAL = GOLDEN / "llava16_mistral_anyres" / "checkpoint"
YI = GOLDEN / "yi_tokenizer"
SHARD_BYTES = 10e9

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

CLIP_CONFIG: Config = {
    "architectures": ["CLIPVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 224,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "torch_dtype": "float32",
}
# Real numbers of layers, but narrow: what an export takes besides the weights
NARROW_CLIP: Config = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
NARROW: Config = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "mm_hidden_size": NARROW_CLIP["hidden_size"],
}


@dataclass(frozen=True)
class Family:
    """Describe the checkpoints of one family.

    Attributes:
        sizes (`dict[str, Config]`): What `config.json` says for each size.
        base (`Callable[[], Config]`): Returns what `config.json` says for all sizes.
        shapes (`Callable[[Config], Shapes]`): Returns the shapes of language model and projector, in the order of the
            original.
        write_tokenizer (`Callable[[Path, Config], None]`): Writes the files of the tokenizer into a folder.
        dtype (`torch.dtype`): Type of the weights.
        safetensors (`bool`): Whether the shards are `.safetensors` files and not `.bin` files.
        image_size (`int`): Width and height of the tower's images, in pixels.
    """

    sizes: dict[str, Config]
    base: Callable[[], Config]
    shapes: Callable[[Config], Shapes]
    write_tokenizer: Callable[[Path, Config], None]
    dtype: torch.dtype = torch.float16
    safetensors: bool = False
    image_size: int = 336

    def config(self, size: str, narrow: bool = False, layers: int | None = None) -> Config:
        """Return the original `config.json`.

        With `narrow`, the layers are as many as in `size`, but small. With `layers`, there are only so many.
        """
        base = self.base()
        name = f"{base['_name_or_path']}-{size}"
        config = {**base, **self.sizes[size], "_name_or_path": name, "mm_vision_tower": "../clip"}
        config |= NARROW if narrow else {}
        name = "n_layers" if "n_layers" in config else "num_hidden_layers"
        return config if layers is None else config | {name: layers}

    def vision_config(self, size: str, narrow: bool = False) -> Config:
        """Return the `config.json` of the vision tower, CLIP ViT-L/14."""
        config = {**CLIP_CONFIG, "image_size": self.image_size}
        if size == "tiny":
            config["num_hidden_layers"] = 3
        return config | NARROW_CLIP if narrow or size == "tiny" else config


def mpt_config() -> Config:
    return {**json.loads((GOLDEN / "real_config.json").read_text()), "_name_or_path": "random-llava-mpt"}


def mpt_shapes(config: Config) -> Shapes:
    width = config["d_model"]
    inner = config["expansion_ratio"] * width
    shapes: Shapes = {"transformer.wte.weight": (config["vocab_size"], width)}
    for layer in range(config["n_layers"]):
        shapes |= {
            f"transformer.blocks.{layer}.norm_1.weight": (width,),
            f"transformer.blocks.{layer}.attn.Wqkv.weight": (3 * width, width),
            f"transformer.blocks.{layer}.attn.out_proj.weight": (width, width),
            f"transformer.blocks.{layer}.norm_2.weight": (width,),
            f"transformer.blocks.{layer}.ffn.up_proj.weight": (inner, width),
            f"transformer.blocks.{layer}.ffn.down_proj.weight": (width, inner),
        }
    return shapes | {
        "transformer.norm_f.weight": (width,),
        "transformer.mm_projector.weight": (width, config["mm_hidden_size"]),
        "transformer.mm_projector.bias": (width,),
    }


def write_mpt_tokenizer(folder: Path, config: Config) -> None:
    """Write the tokenizer of the small checkpoint with the real ids: 50254 spaces, 50277 ChatML, 50279 images."""
    tokenizer = json.loads((TINY / "checkpoint" / "tokenizer.json").read_text())
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    known = len(vocab)
    shift = config["vocab_size"] - 1 - max(token["id"] for token in added)
    for token in added:
        if token["id"] >= known:
            token["id"] += shift
    vocab |= {f"filler_{number}": number for number in range(known, known + shift)}
    write_json(folder / "tokenizer.json", tokenizer)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TINY / "checkpoint" / name, folder / name)
    ids = {token["content"]: token["id"] for token in added}
    generation = json.loads((TINY / "checkpoint" / "generation_config.json").read_text())
    generation["eos_token_id"] = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    write_json(folder / "generation_config.json", generation)


def llama_config() -> Config:
    return {
        **json.loads((LLAMA / "config.json").read_text()),
        "_name_or_path": "random-llava-v1.5",
        "mm_hidden_size": CLIP_CONFIG["hidden_size"],
        "vocab_size": 32000,
    }


def mistral_config() -> Config:
    return {
        **llama_config(),
        "_name_or_path": "random-llava-med-v1.5-mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }


def yi_config() -> Config:
    """Return the configuration of LLaVA-1.6-34B, but with its tower in `clip` alone."""
    return {
        **llama_config(),
        "_name_or_path": "random-llava-v1.6",
        "bos_token_id": 1,
        "eos_token_id": 7,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "mm_patch_merge_type": "spatial_unpad",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e6,
        "torch_dtype": "bfloat16",
        "vocab_size": 64000,
    }


def llama_shapes(config: Config) -> Shapes:
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    cached = head * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (cached, width),
            f"{prefix}.self_attn.v_proj.weight": (cached, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.self_attn.rotary_emb.inv_freq": (head // 2,),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {
        "model.norm.weight": (width,),
        "model.mm_projector.0.weight": (width, config["mm_hidden_size"]),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }


def mistral_shapes(config: Config) -> Shapes:
    """Return the shapes without rotary frequencies, which newer versions of transformers do not save."""
    return {name: shape for name, shape in llama_shapes(config).items() if not name.endswith("inv_freq")}


def yi_shapes(config: Config) -> Shapes:
    return mistral_shapes(config) | {"model.image_newline": (config["hidden_size"],)}


def write_llama_tokenizer(folder: Path, config: Config) -> None:
    _write_sentencepiece(folder, LLAMA, config)


def write_mistral_tokenizer(folder: Path, config: Config) -> None:
    _write_sentencepiece(folder, MISTRAL, config)


def write_yi_tokenizer(folder: Path, config: Config) -> None:
    _write_sentencepiece(folder, YI, config)


def _write_sentencepiece(folder: Path, source: Path, config: Config) -> None:
    """Write the tokenizer of a small checkpoint with as many pieces as the real one has: `vocab_size`.

    The new pieces are joined from two known ones, so there are about as many merges as in the real tokenizer. They
    are appended to the file: in protobuf, a repeated field may continue at the end of a message.
    """
    model = SentencePieceModel.read(source / "tokenizer.model")
    lowest = min(piece.score for piece in model.pieces)
    missing = config["vocab_size"] - len(model.pieces)
    new = [_protobuf_piece(text, lowest - 1 - number) for number, text in zip(range(missing), _joined_pieces(model))]
    (folder / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes() + b"".join(new))
    for file in source.glob("*_*.json"):
        if file.stem in ("tokenizer_config", "special_tokens_map"):
            shutil.copyfile(file, folder / file.name)
    tokens = {"bos_token_id": 1, "eos_token_id": config["eos_token_id"], "pad_token_id": 0}
    write_json(folder / "generation_config.json", tokens)


def _joined_pieces(model: SentencePieceModel) -> Iterator[str]:
    """Yield texts that are not yet pieces. `▁` is only at the beginning, because pieces do not span words."""
    texts = [piece.text for piece in model.pieces if piece.text.removeprefix("▁").isalpha()]
    seen = {piece.text for piece in model.pieces}
    for left in texts:
        for right in texts:
            if not right.startswith("▁") and left + right not in seen:
                seen.add(left + right)
                yield left + right


def _protobuf_piece(text: str, score: float) -> bytes:
    """Encode one `pieces` field of `sentencepiece_model.proto`: text (1), score (2), and a normal type (3)."""
    content = text.encode()
    piece = b"\x0a" + bytes([len(content)]) + content + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
    return b"\x0a" + bytes([len(piece)]) + piece


def vision_shapes(config: Config) -> Shapes:
    """Return shapes of the tensors of a CLIP vision tower."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + 1
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        **_with_bias("pre_layrnorm", width),
        **_with_bias("post_layernorm", width),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        shapes |= _with_bias(f"{prefix}.layer_norm1", width) | _with_bias(f"{prefix}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"{prefix}.self_attn.{name}", width, width)
        shapes |= _with_bias(f"{prefix}.mlp.fc1", inner, width) | _with_bias(f"{prefix}.mlp.fc2", width, inner)
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def _with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def number_of_shards(num_bytes: int) -> int:
    """Return the number of weight files. transformers saves at most 10 GB in one, and all families have several."""
    return max(2, math.ceil(num_bytes / SHARD_BYTES))


def _llama_size(width: int, layers: int, heads: int, inner: int, cached_heads: int | None = None) -> Config:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": cached_heads or heads,
        "intermediate_size": inner,
    }


FAMILIES = {
    "mpt": Family(
        sizes={
            "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 32},
            "1.3b": {"d_model": 2048, "n_layers": 24, "n_heads": 16},
        },
        base=mpt_config,
        shapes=mpt_shapes,
        write_tokenizer=write_mpt_tokenizer,
        image_size=224,
    ),
    "llama": Family(
        sizes={
            "7b": _llama_size(4096, 32, 32, 11008),
            "13b": _llama_size(5120, 40, 40, 13824),
            "1.3b": _llama_size(2048, 24, 16, 5504),
            "tiny": {"num_hidden_layers": 3, **NARROW},
        },
        base=llama_config,
        shapes=llama_shapes,
        write_tokenizer=write_llama_tokenizer,
    ),
    "mistral": Family(
        sizes={
            "7b": _llama_size(4096, 32, 32, 14336, 8),
            "1.3b": _llama_size(2048, 24, 16, 5504, 4),
            "tiny": {"num_hidden_layers": 3, **NARROW, "num_key_value_heads": 2},
        },
        base=mistral_config,
        shapes=mistral_shapes,
        write_tokenizer=write_mistral_tokenizer,
        dtype=torch.bfloat16,
        safetensors=True,
    ),
    "yi": Family(
        sizes={
            "34b": _llama_size(7168, 60, 56, 20480, 8),
            "tiny": {"num_hidden_layers": 3, **NARROW, "num_key_value_heads": 2},
        },
        base=yi_config,
        shapes=yi_shapes,
        write_tokenizer=write_yi_tokenizer,
        dtype=torch.bfloat16,
        safetensors=True,
    ),
}


def add_family_arguments(parser: argparse.ArgumentParser, default_size: str) -> None:
    """Add `--family` and `--size`."""
    sizes = {size: None for family in FAMILIES.values() for size in family.sizes}
    parser.add_argument("--family", choices=FAMILIES, default="mpt")
    parser.add_argument("--size", choices=sizes, default=default_size)


def add_layers_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--layers`."""
    help_text = "number of layers of the language model, for a model that is as wide as the size but not as deep"
    parser.add_argument("--layers", type=int, help=help_text)


def check_family_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program if the family does not have the size."""
    sizes = FAMILIES[arguments.family].sizes
    if arguments.size not in sizes:
        parser.error(f"{arguments.family} does not have the size {arguments.size}, but {', '.join(sizes)}")
