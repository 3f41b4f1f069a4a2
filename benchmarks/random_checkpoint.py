"""Write a LLaVA checkpoint in the original format, of full size, with random weights.

    python benchmarks/random_checkpoint.py OUT [--family mpt|llama|mistral|yi] [--size 7b] [--layers N] [--seed 0]

makes `OUT/checkpoint` (language model, projector, tokenizer) and `OUT/clip` (its vision tower, CLIP ViT-L/14 in fp32).
Names, shapes, types and files are those of LLaVA-Lightning-MPT-7B-preview (`mpt`), LLaVA-1.5 (`llama`), LLaVA-Med-1.5
(`mistral`) or LLaVA-1.6-34B (`yi`); see `random_families.py`. The real weights are not needed to measure an export or
an engine. 7b takes 15 GB of disk, 13b takes 28 GB, and 34b takes 71 GB. The language model is written through mapped
files. The tower is built in memory, which takes 1.6 GB. The checksums inside the `.bin` files are missing; torch does
not check them. Needs torch >= 2.6.
"""

from __future__ import annotations

import argparse
import json
import mmap
from pathlib import Path

import torch
from random_families import (
    FAMILIES,
    TINY,
    Config,
    Family,
    Shapes,
    add_family_arguments,
    add_layers_argument,
    check_family_arguments,
    number_of_shards,
    vision_shapes,
    write_json,
)
from safetensors.torch import save_file
from tqdm import tqdm


SAFETENSORS_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


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


def write_random_checkpoint(
    folder: Path,
    size: str,
    seed: int = 0,
    family: str = "mpt",
    narrow: bool = False,
    layers: int | None = None,
) -> None:
    """Write `folder/checkpoint` and `folder/clip`, and config.json of the checkpoint last. See [`is_complete`].

    With `narrow`, the layers are as many as in `size`, but small. With `layers`, there are only so many.
    """
    kind = FAMILIES[family]
    config, vision_config = kind.config(size, narrow, layers), kind.vision_config(size, narrow)
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    checkpoint.mkdir(parents=True, exist_ok=True)
    clip.mkdir(exist_ok=True)
    (checkpoint / "config.json").unlink(missing_ok=True)

    language, vision = kind.shapes(config), vision_shapes(vision_config)
    total = _num_bytes(language, kind.dtype) + _num_bytes(vision, torch.float32)
    with tqdm(total=total, desc=f"Random {family} {size} checkpoint", unit="B", unit_scale=True) as progress:
        _write_language(checkpoint, kind, language, seed, progress)
        _write_vision(clip, vision_config, vision, seed + 1, progress)
    kind.write_tokenizer(checkpoint, config)
    write_json(checkpoint / "config.json", config)


def random_folder(workdir: Path, size: str, family: str = "mpt", layers: int | None = None) -> Path:
    """Return the folder in `workdir` for a random checkpoint. It may not exist yet. See [`is_complete`]."""
    name = f"random-{size}" if family == "mpt" else f"random-{family}-{size}"
    return workdir / (name if layers is None else f"{name}-{layers}-layers")


def is_complete(folder: Path) -> bool:
    """Return whether [`write_random_checkpoint`] has finished in `folder`."""
    return (folder / "checkpoint" / "config.json").is_file()


def _write_language(folder: Path, family: Family, shapes: Shapes, seed: int, progress: tqdm) -> None:
    values = RandomValues(seed, family.dtype)
    num_bytes = _num_bytes(shapes, family.dtype)
    stem, suffix = ("model", "safetensors") if family.safetensors else ("pytorch_model", "bin")
    map_shard = _map_safetensors if family.safetensors else _map_bin
    weight_map = {}
    shards = _split(shapes, number_of_shards(num_bytes))
    for number, shard in enumerate(shards, start=1):
        file = folder / f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        for name, tensor in map_shard(file, shard, family.dtype).items():
            _fill(name, tensor, values)
            progress.update(tensor.nbytes)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def _map_bin(file: Path, shapes: Shapes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Save a file of torch with empty tensors. Return the tensors of the mapped file, to be filled."""
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=_dtype(name, dtype)) for name, shape in shapes.items()}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(file, mmap=True, weights_only=True)


def _map_safetensors(file: Path, shapes: Shapes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Write a safetensors file with empty tensors. Return the tensors of the mapped file, to be filled.

    The format: size of the header (8 bytes), header (JSON, padded to a multiple of 8 bytes), data.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    offset = 8 + len(text)
    with file.open("wb+") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(offset + end)
        mapped = mmap.mmap(opened.fileno(), 0)
    return {
        name: torch.frombuffer(
            mapped, dtype=dtype, count=torch.Size(shape).numel(), offset=offset + header[name]["data_offsets"][0]
        ).view(shape)
        for name, shape in shapes.items()
    }


def _write_vision(folder: Path, config: Config, shapes: Shapes, seed: int, progress: tqdm) -> None:
    values = RandomValues(seed, torch.float32)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape)
        _fill(name, tensors[name], values)
        progress.update(tensors[name].nbytes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    processor = json.loads((TINY / "clip" / "preprocessor_config.json").read_text())
    size = config["image_size"]
    write_json(folder / "preprocessor_config.json", {**processor, "crop_size": size, "size": size})


def _fill(name: str, tensor: torch.Tensor, values: RandomValues) -> None:
    if "norm" in name:
        tensor.fill_(0 if name.endswith(".bias") else 1)
    elif name.endswith("inv_freq"):
        tensor.copy_(10000 ** -(torch.arange(len(tensor)) / len(tensor)))
    else:
        values.fill(tensor)


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("inv_freq") else dtype


def _split(shapes: Shapes, parts: int) -> list[Shapes]:
    """Split tensors into consecutive groups of about the same size."""
    groups: list[Shapes] = [{} for _ in range(parts)]
    total, seen = sum(torch.Size(shape).numel() for shape in shapes.values()), 0
    for name, shape in shapes.items():
        groups[min(parts - 1, seen * parts // total)][name] = shape
        seen += torch.Size(shape).numel()
    return groups


def _num_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(_dtype(name, dtype).itemsize * torch.Size(shape).numel() for name, shape in shapes.items())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    add_family_arguments(parser, default_size="7b")
    add_layers_argument(parser)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_family_arguments(parser, arguments)
    write_random_checkpoint(arguments.out, arguments.size, arguments.seed, arguments.family, layers=arguments.layers)


if __name__ == "__main__":
    main()
