"""Run the language model of a LLaVA-MPT in llama.cpp, which supports MPT without images.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf  # builds llama.cpp for this processor

    python benchmarks/random_checkpoint.py random --size 7b
    python benchmarks/llama.py convert random/checkpoint gguf  # Q4_K_M.gguf, Q4_0.gguf
    # To compare with another engine, after `convert --keep-f16`
    python benchmarks/llama.py logits gguf/F16.gguf 1,2,3 out.npy

`engines.py --contenders ours llama-Q4_K_M llama-Q4_0` measures it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np


TYPES = ("Q4_K_M", "Q4_0")
BATCH, MICRO_BATCH = 2048, 512  # as in llama-bench


def convert(checkpoint: Path, folder: Path, types: list[str], threads: int, keep_f16: bool) -> None:
    """Write `folder/F16.gguf`, and quantize it with llama.cpp's own quantizer."""
    folder.mkdir(parents=True, exist_ok=True)
    original = folder / "F16.gguf"
    if not original.exists():
        write_gguf(checkpoint, original)
    for name in types:
        quantize(original, folder / f"{name}.gguf", name, threads)
    if not keep_f16:
        original.unlink()


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write unchanged fp16 matrices, and norms in fp32, as llama.cpp's own converter does. Write no tokenizer."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file.with_suffix(".part"), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MPT])
    writer.add_name(checkpoint.parent.name)
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(config["expansion_ratio"] * config["d_model"])
    writer.add_head_count(config["n_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, config["n_layers"])
    for name, values in tensors(checkpoint):
        if "mm_projector" not in name:
            new_name = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(new_name, values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()
    file.with_suffix(".part").rename(file)


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of all shards, memory-mapped."""
    import torch

    for shard in sorted(checkpoint.glob("pytorch_model*.bin")):
        for name, tensor in torch.load(shard, mmap=True, weights_only=True).items():
            yield name, tensor.numpy()


def quantize(source: Path, target: Path, name: str, threads: int) -> None:
    """Quantize `source` to llama.cpp's type `name`, and write `target`."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    options.nthread = threads
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {name}. See its messages.")


class Model:
    """Run a model in one context with llama.cpp's own interface and defaults."""

    def __init__(self, file: Path, context: int, threads: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {file}. See its messages.")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_batch, options.n_ubatch = BATCH, MICRO_BATCH
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def decode(self, tokens: list[int]) -> None:
        """Process tokens after the earlier tokens. Logits are those of the last token."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)  # must stay alive, because the batch points to it
            batch = llama_cpp.llama_batch_get_one(array, len(part))
            if llama_cpp.llama_decode(self.context, batch):
                raise RuntimeError(f"llama.cpp could not process {len(part)} tokens. See its messages.")
        llama_cpp.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        """Return logits `(vocab_size,)` float32 of the last token."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab_size,)).copy()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("convert")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("folder", type=Path)
    command.add_argument("--types", nargs="*", default=list(TYPES))
    command.add_argument("--keep-f16", action="store_true", help="keep F16.gguf (13 GB at 7B)")

    command = commands.add_parser("logits")
    command.add_argument("file", type=Path)
    command.add_argument("input_ids", type=lambda text: [int(token) for token in text.split(",")])
    command.add_argument("out", type=Path, help="(tokens, vocab_size) float32, as .npy")

    arguments = parser.parse_args()
    if arguments.command == "convert":
        convert(arguments.checkpoint, arguments.folder, arguments.types, arguments.threads, arguments.keep_f16)
    else:
        model = Model(arguments.file, len(arguments.input_ids), arguments.threads)
        np.save(arguments.out, np.stack([model.decode([token]) or model.logits() for token in arguments.input_ids]))


if __name__ == "__main__":
    main()
