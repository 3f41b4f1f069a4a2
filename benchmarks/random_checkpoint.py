"""Write a LLaVA-MPT checkpoint in the original format, of full size, with random weights.

    python benchmarks/random_checkpoint.py OUT --size 7b [--seed 0]

makes `OUT/checkpoint` (language model, projector, tokenizer) and `OUT/clip` (its vision tower, CLIP ViT-L/14 in fp32).
Names, shapes, types and files are those of LLaVA-Lightning-MPT-7B-preview. The real weights are not needed to measure
an export. 7b takes 15 GB of disk. The language model is written through mapped files. The tower is built in memory,
which takes 1.6 GB. The checksums inside the `.bin` files are missing; torch does not check them. Needs torch >= 2.6.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm


GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
TINY = GOLDEN / "linear_fp16_sharded"

SIZES = {
    "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 32},
    "1.3b": {"d_model": 2048, "n_layers": 24, "n_heads": 16},
}
VOCAB_SIZE = 50282
NUM_SHARDS = 2

CLIP_CONFIG = {
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

Shapes = dict[str, tuple[int, ...]]


class RandomValues:
    """Fill tensors with normal values (standard deviation 0.02) faster than drawing them all.

    One block is drawn. A tensor gets the block or its negative, repeated from a random position. The length of the
    block is a prime number, so that rows of a matrix do not repeat and no two tensors are equal. OpenVINO would store
    equal tensors once.
    """

    LENGTH = 16_777_213

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        block = torch.empty(self.LENGTH).normal_(0, 0.02, generator=self.generator).to(dtype)
        self.blocks = (block, -block)

    def fill(self, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        block = self.blocks[self._draw(2)]
        start, position = 0, self._draw(self.LENGTH)
        while start < flat.numel():
            length = min(flat.numel() - start, self.LENGTH - position)
            flat[start : start + length] = block[position : position + length]
            start, position = start + length, 0

    def _draw(self, stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=self.generator))


def write_random_checkpoint(folder: Path, size: str, seed: int = 0) -> None:
    """Write `folder/checkpoint` and `folder/clip`, and config.json of the checkpoint last. See [`is_complete`]."""
    config = language_config(size)
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    checkpoint.mkdir(parents=True, exist_ok=True)
    clip.mkdir(exist_ok=True)
    (checkpoint / "config.json").unlink(missing_ok=True)

    language, vision = language_shapes(config), vision_shapes(CLIP_CONFIG)
    total = 2 * _numel(language) + 4 * _numel(vision)
    with tqdm(total=total, desc=f"Random {size} checkpoint", unit="B", unit_scale=True) as progress:
        _write_language(checkpoint, language, seed, progress)
        _write_vision(clip, vision, seed + 1, progress)
    _write_tokenizer(checkpoint)
    _write_json(checkpoint / "config.json", config)


def is_complete(folder: Path) -> bool:
    """Return whether [`write_random_checkpoint`] has finished in `folder`."""
    return (folder / "checkpoint" / "config.json").is_file()


def language_config(size: str) -> dict:
    """Return the original `config.json` for another size."""
    config = json.loads((GOLDEN / "real_config.json").read_text())
    return {**config, **SIZES[size], "_name_or_path": f"random-llava-mpt-{size}", "mm_vision_tower": "../clip"}


def language_shapes(config: dict) -> Shapes:
    """Return shapes of the tensors of language model and projector, in the original order."""
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


def vision_shapes(config: dict) -> Shapes:
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


def _write_language(folder: Path, shapes: Shapes, seed: int, progress: tqdm) -> None:
    values = RandomValues(seed, torch.float16)
    weight_map = {}
    for number, shard in enumerate(_split(shapes, NUM_SHARDS), start=1):
        file = folder / f"pytorch_model-{number:05}-of-{NUM_SHARDS:05}.bin"
        _write_shard(file, shard, values, progress)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": 2 * _numel(shapes)}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "pytorch_model.bin.index.json", index)


def _write_shard(file: Path, shapes: Shapes, values: RandomValues, progress: tqdm) -> None:
    """Save a file with empty tensors, then fill them in the mapped file."""
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(file, mmap=True, weights_only=True)
    for name, tensor in tensors.items():
        _fill(name, tensor, values)
        progress.update(tensor.nbytes)


def _write_vision(folder: Path, shapes: Shapes, seed: int, progress: tqdm) -> None:
    values = RandomValues(seed, torch.float32)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape)
        _fill(name, tensors[name], values)
        progress.update(tensors[name].nbytes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", CLIP_CONFIG)
    processor = json.loads((TINY / "clip" / "preprocessor_config.json").read_text())
    size = CLIP_CONFIG["image_size"]
    _write_json(folder / "preprocessor_config.json", {**processor, "crop_size": size, "size": size})


def _fill(name: str, tensor: torch.Tensor, values: RandomValues) -> None:
    if "norm" in name:
        tensor.fill_(0 if name.endswith(".bias") else 1)
    else:
        values.fill(tensor)


def _write_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the small checkpoint with the real ids: 50254 spaces, 50277 ChatML, 50279 images."""
    tokenizer = json.loads((TINY / "checkpoint" / "tokenizer.json").read_text())
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    known = len(vocab)
    shift = VOCAB_SIZE - 1 - max(token["id"] for token in added)
    for token in added:
        if token["id"] >= known:
            token["id"] += shift
    vocab |= {f"filler_{number}": number for number in range(known, known + shift)}
    _write_json(folder / "tokenizer.json", tokenizer)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TINY / "checkpoint" / name, folder / name)
    ids = {token["content"]: token["id"] for token in added}
    generation = json.loads((TINY / "checkpoint" / "generation_config.json").read_text())
    generation["eos_token_id"] = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    _write_json(folder / "generation_config.json", generation)


def _split(shapes: Shapes, parts: int) -> list[Shapes]:
    """Split tensors into consecutive groups of about the same size."""
    groups: list[Shapes] = [{} for _ in range(parts)]
    total, seen = _numel(shapes), 0
    for name, shape in shapes.items():
        groups[min(parts - 1, seen * parts // total)][name] = shape
        seen += torch.Size(shape).numel()
    return groups


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.out, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
