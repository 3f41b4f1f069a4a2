"""Write an original LLaVA checkpoint as GGUF files, as llama.cpp's own converters do.

llama.cpp's converters do not read the original format. A LLaVA-1.5 becomes two files: the language model with its
tokenizer, and the vision tower with its projector (`mmproj`). llama.cpp supports MPT without images, so a LLaVA-MPT
becomes the language model only, without a tokenizer. Needs the package `gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPVisionConfig

from optimum_llava_ov.checkpoint.sentencepiece import SentencePieceModel
from optimum_llava_ov.checkpoint.tensors import map_tensors


PROJECTOR = "mm_projector."


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file: matrices are fp16, vectors are fp32.

    Attributes:
        name (`str`): Name in the file.
        tensor (`torch.Tensor`): Tensor of the checkpoint, memory-mapped.
        heads (`int`, *optional*): Number of heads of a query or key matrix, whose rows are reordered: llama.cpp
            rotates neighbours, and transformers rotates halves of a head.
    """

    name: str
    tensor: torch.Tensor
    heads: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tensor.ndim == 1 else torch.float16

    def values(self) -> np.ndarray:
        tensor = self.tensor.to(self.dtype)
        if self.heads:
            halves = tensor.view(self.heads, 2, -1, tensor.shape[-1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor.contiguous().numpy()


def write_language_model(checkpoint: Path, file: Path) -> None:
    """Write the language model in fp16."""
    config = json.loads((checkpoint / "config.json").read_text())
    write = _write_mpt if "d_model" in config else _write_llama
    write(checkpoint, config, file)


def _write_mpt(checkpoint: Path, config: dict, file: Path) -> None:
    writer = _writer(file, gguf.MODEL_ARCH.MPT, checkpoint.parent.name)
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(config["expansion_ratio"] * config["d_model"])
    writer.add_head_count(config["n_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])

    name_of = _names(gguf.MODEL_ARCH.MPT, config["n_layers"])
    _write(writer, file, [Entry(name_of(n), tensor) for n, tensor in tensors(checkpoint) if PROJECTOR not in n])


def _write_llama(checkpoint: Path, config: dict, file: Path) -> None:
    """Write a LLaMA or a Mistral, which are the same architecture in llama.cpp."""
    heads, cached_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = _writer(file, gguf.MODEL_ARCH.LLAMA, checkpoint.parent.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(cached_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])

    pieces = SentencePieceModel.read(checkpoint / "tokenizer.model").pieces
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text.encode() for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([int(piece.type) for piece in pieces])
    ids = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(True)

    name_of = _names(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    reordered = {"q_proj": heads, "k_proj": cached_heads}
    _write(
        writer,
        file,
        [
            Entry(name_of(name), tensor, reordered.get(name.split(".")[-2]))
            for name, tensor in tensors(checkpoint)
            if PROJECTOR not in name and not name.endswith("inv_freq")
        ],
    )


def write_mmproj(checkpoint: Path, file: Path) -> None:
    """Write the vision tower and the projector in fp16.

    Raises:
        `ValueError`: llama.cpp does not compute the projector.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if (projector := config.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        raise ValueError(f"The projector is {projector}. llama.cpp computes mlp2x_gelu only.")
    tower = checkpoint / config["mm_vision_tower"]
    vision = CLIPVisionConfig.from_pretrained(tower)
    processor = json.loads((tower / "preprocessor_config.json").read_text())
    select_layer = config["mm_vision_select_layer"]

    writer = _writer(file, gguf.MODEL_ARCH.MMPROJ, checkpoint.parent.name)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config["hidden_size"])
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    writer.add_array(
        "clip.vision.feature_layer",
        [select_layer if select_layer >= 0 else vision.num_hidden_layers + 1 + select_layer],
    )

    name_of = _names(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    entries = [
        Entry(name_of(f"vision_tower.{name}"), tensor)
        for name, tensor in tensors(tower)
        # The features are those of an earlier layer, before the last norm
        if name.startswith("vision_model.") and "post_layernorm" not in name and not name.endswith("position_ids")
    ]
    entries += [
        Entry(name.replace("model.mm_projector.", "mm."), tensor)
        for name, tensor in tensors(checkpoint)
        if PROJECTOR in name
    ]
    _write(writer, file, entries)


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all weight files, memory-mapped."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        yield from map_tensors(file).items()


def _writer(file: Path, arch: gguf.MODEL_ARCH, name: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(_part(file), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    return writer


def _names(arch: gguf.MODEL_ARCH, layers: int) -> Callable[[str], str]:
    names = gguf.get_tensor_name_map(arch, layers)

    def name_of(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no tensor for {name}.")
        return found

    return name_of


def _write(writer: gguf.GGUFWriter, file: Path, entries: list[Entry]) -> None:
    """Write the tensors one by one, so that only one is in memory."""
    for entry in entries:
        dtype = np.dtype(str(entry.dtype).removeprefix("torch."))
        writer.add_tensor_info(entry.name, entry.tensor.shape, dtype, dtype.itemsize * entry.tensor.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tqdm(entries, desc=file.name):
        writer.write_tensor_data(entry.values())
    writer.close()
    _part(file).rename(file)


def _part(file: Path) -> Path:
    return file.with_suffix(".part")
