"""Run the same weights in llama.cpp, a LLaVA-1.5 with its image encoder (mtmd).

    # llama.cpp is built for this processor
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf

    python benchmarks/random_checkpoint.py random --family llama --size 7b
    python benchmarks/llama.py convert random/checkpoint gguf  # Q4_K_M.gguf, Q4_0.gguf, mmproj.gguf
    # After `convert --keep-f16`
    python benchmarks/llama.py check random/checkpoint gguf  # compares with torch
    python benchmarks/llama.py logits gguf/F16.gguf 1,2,3 out.npy

`engines.py --contenders ours llama-Q4_K_M llama-Q4_0` measures it. llama.cpp supports MPT without images.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image


TYPES = ("Q4_K_M", "Q4_0")
BATCH, MICRO_BATCH = 2048, 512  # llama.cpp's own defaults
MMPROJ = "mmproj.gguf"


def convert(checkpoint: Path, folder: Path, types: list[str], threads: int, keep_f16: bool) -> None:
    """Write `folder/F16.gguf`, and quantize it with llama.cpp's own quantizer. Write `folder/mmproj.gguf` in fp16.

    An MPT has no `mmproj.gguf`. Files that exist are not made again.
    """
    import llama_files

    folder.mkdir(parents=True, exist_ok=True)
    original = folder / "F16.gguf"
    if (checkpoint / "tokenizer.model").exists() and not (folder / MMPROJ).exists():
        llama_files.write_mmproj(checkpoint, folder / MMPROJ)
    missing = [file for name in types if not (file := folder / f"{name}.gguf").exists()]
    if (missing or keep_f16) and not original.exists():
        llama_files.write_language_model(checkpoint, original)
    for file in missing:
        quantize(original, file.with_suffix(".part"), file.stem, threads)
        file.with_suffix(".part").rename(file)
    if not keep_f16:
        original.unlink(missing_ok=True)


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


class VisionModel(Model):
    """Run a model with its image encoder, with the defaults of llama.cpp's own programs.

    Args:
        file: Language model.
        mmproj: Vision tower and projector.
        context: Maximum number of tokens of prompt and answer.
        threads: Number of threads.
    """

    def __init__(self, file: Path, mmproj: Path, context: int, threads: int):
        super().__init__(file, context, threads)
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = options.print_timings = False
        options.n_threads = threads
        self.encoder = mtmd_cpp.mtmd_init_from_file(bytes(mmproj), self.model, options)
        if not self.encoder:
            raise RuntimeError(f"llama.cpp could not load {mmproj}. See its messages.")

    def ask(self, prompt: str, image: Image.Image) -> int:
        """Process a prompt with one `<image>`. Return its number of tokens. Logits are those of the last token.

        llama.cpp adds BOS.
        """
        chunks = self._tokenize(prompt, image)
        past = llama_cpp.llama_pos()
        status = mtmd_cpp.mtmd_helper_eval_chunks(
            self.encoder, self.context, chunks, 0, 0, BATCH, True, ctypes.byref(past)
        )
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        if status:
            raise RuntimeError("llama.cpp could not process the prompt. See its messages.")
        llama_cpp.llama_synchronize(self.context)
        return past.value

    def encode(self, image: Image.Image) -> np.ndarray:
        """Return the embeddings `(tokens, hidden_size)` float32 of an image."""
        chunks = self._tokenize("<image>", image)
        parts = [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]
        (part,) = [p for p in parts if mtmd_cpp.mtmd_input_chunk_get_type(p) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        if mtmd_cpp.mtmd_encode_chunk(self.encoder, part):
            raise RuntimeError("llama.cpp could not encode the image. See its messages.")
        shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(part), llama_cpp.llama_model_n_embd(self.model)
        embeddings = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.encoder), shape).copy()
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return embeddings

    def _tokenize(self, prompt: str, image: Image.Image) -> mtmd_cpp.mtmd_input_chunks_p:
        content = prompt.replace("<image>", mtmd_cpp.mtmd_default_marker().decode()).encode()
        text = mtmd_cpp.mtmd_input_text(content, len(content), True, True)
        pixels = image.convert("RGB").tobytes()
        bitmap = mtmd_cpp.mtmd_bitmap_init(*image.size, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        status = mtmd_cpp.mtmd_tokenize(self.encoder, chunks, ctypes.byref(text), bitmaps, 1)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        if status:
            raise RuntimeError(f"llama.cpp could not tokenize {prompt!r}. See its messages.")
        return chunks


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

    command = commands.add_parser("check", help="compare F16.gguf and mmproj.gguf with torch")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("folder", type=Path)

    command = commands.add_parser("logits")
    command.add_argument("file", type=Path)
    command.add_argument("input_ids", type=lambda text: [int(token) for token in text.split(",")])
    command.add_argument("out", type=Path, help="(tokens, vocab_size) float32, as .npy")

    arguments = parser.parse_args()
    if arguments.command == "convert":
        convert(arguments.checkpoint, arguments.folder, arguments.types, arguments.threads, arguments.keep_f16)
    elif arguments.command == "check":
        from llama_check import check

        check(arguments.checkpoint, arguments.folder, arguments.threads)
    else:
        model = Model(arguments.file, len(arguments.input_ids), arguments.threads)
        np.save(arguments.out, np.stack([model.decode([token]) or model.logits() for token in arguments.input_ids]))


if __name__ == "__main__":
    main()
