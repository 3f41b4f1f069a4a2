"""Convert a checkpoint as the OpenVINO notebook "llava-multimodal-chatbot" does for LLaVA-MPT, with our own code.

    python benchmarks/notebook_conversion.py CHECKPOINT OUT [--compression int4|none] [--stored-weights]

writes four models and the files that [`notebook_pipeline`] needs for prompts:

- `image_encoder`: tower and projector, 8 bits, any number of images;
- `token_embed`: the embedding table, as stored;
- `llava_input_embed`: the language model with inputs `inputs_embeds` and `attention_mask`, for the prompt;
- `llava_with_past`: the language model again, with inputs `input_ids`, `attention_mask` and the cache of earlier
tokens.
  Its batch size is 1.

The language model is that of the original code (`llava/model/language_model/mpt`, LLaVA v1.1.3): ALiBi is a constant
of `max_seq_len` positions, attention is matmul, softmax and matmul, keys are stored transposed, and the cache is among
inputs and outputs. As in the notebook, weights are loaded in float32, and each model is traced in one piece,
compressed in memory and saved.

`--stored-weights` keeps the stored type of the weights, which favours the notebook: 7B in float32 takes 27 GB.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import nncf
import openvino as ov
import torch
from openvino.frontend.pytorch.patch_model import __make_16bit_traceable as make_16bit_traceable
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.alibi import alibi_slopes
from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration
from optimum_llava_ov.models.mpt import MptAttention, MptBlock, MptLanguageModel
from optimum_llava_ov.models.vision import ImageEncoder


IMAGE_ENCODER, TOKEN_EMBED = "image_encoder.xml", "token_embed.xml"
FIRST_STAGE, SECOND_STAGE = "llava_input_embed.xml", "llava_with_past.xml"
PROMPT_LENGTH = 307  # of the notebook's example
IMAGE_ENCODER_COMPRESSION = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
LANGUAGE_COMPRESSION = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 128, "ratio": 0.8}

Past = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class NotebookAttention(nn.Module):
    def __init__(self, attention: MptAttention):
        super().__init__()
        self.num_heads, self.softmax_scale = attention.num_heads, attention.softmax_scale
        self.Wqkv, self.out_proj = attention.Wqkv, attention.out_proj

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        query, key, value = self.Wqkv(hidden_states).chunk(3, dim=2)
        query, value = self._heads(query), self._heads(value)
        key = self._heads(key).transpose(2, 3)  # (batch, head, dim, token)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=3), torch.cat([past[1], value], dim=2)
        query_length, key_length = query.shape[2], key.shape[3]

        weights = query.matmul(key) * self.softmax_scale
        bias = bias[:, :, :, max(0, bias.shape[3] - key_length) :]
        weights = weights + bias
        if past is None:  # a single new token attends to all tokens
            future = (
                ~torch.ones(key_length, key_length, dtype=torch.float16).tril().bool()[-query_length:, -key_length:]
            )
            weights = weights.masked_fill(future.view(1, 1, query_length, key_length), torch.finfo(weights.dtype).min)
        context = torch.softmax(weights, dim=-1).matmul(value)
        return self.out_proj(context.transpose(1, 2).flatten(2)), (key, value)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(states.shape[0], states.shape[1], self.num_heads, -1).transpose(1, 2)


class NotebookBlock(nn.Module):
    def __init__(self, block: MptBlock):
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.ffn = (
            block.norm_1,
            NotebookAttention(block.attn),
            block.norm_2,
            block.ffn,
        )

    def forward(self, hidden_states: torch.Tensor, bias: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None):
        attended, present = self.attn(self.norm_1(hidden_states), bias, past)
        hidden_states = hidden_states + attended
        return hidden_states + self.ffn(self.norm_2(hidden_states)), present


class NotebookLanguageModel(nn.Module):
    """Run the MPT of the original code with the weights of our model, which must not be used any more."""

    def __init__(self, model: MptLanguageModel):
        super().__init__()
        config = model.config
        self.lm_head, self.norm_f, self.logit_scale = model.lm_head, model.transformer.norm_f, model.logit_scale
        self.wte = nn.Embedding(config.vocab_size, config.d_model, device="meta")
        self.wte.weight = self.lm_head.weight
        self.blocks = nn.ModuleList(NotebookBlock(block) for block in model.transformer.blocks)
        positions = torch.arange(1 - config.max_seq_len, 1, dtype=torch.float32).view(1, 1, 1, -1)
        slopes = alibi_slopes(config.n_heads, config.attn_config.alibi_bias_max).view(1, -1, 1, 1)
        self.register_buffer("attn_bias", positions * slopes, persistent=False)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Past]:
        """Compute logits.

        Args:
            input_ids: `(batch, 1)`, with a cache. Without a cache, give `inputs_embeds`.
            inputs_embeds: `(batch, query, d_model)` float.
            attention_mask: `(batch, past + query)`, 0 for padding.
            past_key_values: For each layer, keys `(batch, heads, head_dim, past)` and values
                `(batch, heads, past, head_dim)`.

        Returns:
            Logits `(batch, query, vocab_size)`, and the cache with the new tokens.
        """
        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        key_length = attention_mask.shape[-1]
        bias = self.attn_bias[:, :, :, max(0, self.attn_bias.shape[-1] - key_length) :]
        bias = bias.masked_fill(~attention_mask.bool().view(-1, 1, 1, key_length), torch.finfo(bias.dtype).min)
        presents = []
        for layer, block in enumerate(self.blocks):
            hidden_states, present = block(hidden_states, bias, past_key_values[layer] if past_key_values else None)
            presents.append(present)
        logits = self.lm_head(self.norm_f(hidden_states))
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        return logits, tuple(presents)


class _EncodeImages(nn.Module):
    """Run `encode_images` of the original code. Its prompts contain `<im_start>` and `<im_end>` as tokens."""

    def __init__(self, encoder: ImageEncoder):
        super().__init__()
        self.features, self.projector = encoder.features, encoder.projector

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.projector(self.features(images))


class _SecondStage(nn.Module):
    """Take arguments in the order of the model's inputs."""

    def __init__(self, model: NotebookLanguageModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.LongTensor, past_key_values: Past, attention_mask: torch.Tensor):
        return self.model(input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask)


def convert(checkpoint_name: str | Path, folder: Path, compression: bool = True, stored_weights: bool = False) -> None:
    """Convert an original checkpoint to the notebook's four models.

    Args:
        compression: Compress as the notebook's INT4. `False` saves uncompressed models.
        stored_weights: Do not convert the weights to float32 first.
    """
    checkpoint = OriginalCheckpoint.open(checkpoint_name)
    if (
        checkpoint.config.padded_vocab_size != checkpoint.config.image_token_id
        or checkpoint.config.image_aspect_ratio == "pad"
    ):
        raise ValueError(
            "The notebook does not support padded vocabularies or padded images. Its models would be wrong."
        )
    model = LlavaMptForConditionalGeneration.from_checkpoint(checkpoint)
    del model.embed_tokens  # a copy with one more token, which the notebook does not use
    model.image_encoder.features.encoder.config._attn_implementation = "eager"
    images, language = _EncodeImages(model.image_encoder), NotebookLanguageModel(model.language_model)
    for part in (images, language):
        make_16bit_traceable(part) if stored_weights else part.float()
    del model

    folder.mkdir(parents=True, exist_ok=True)
    _save_prompt_files(checkpoint, folder)
    side = checkpoint.config.vision_config.image_size
    with torch.no_grad():
        _convert_images(images, side, folder, compression)
        del images
        _trace_and_save(language.wte, torch.ones((1, 10), dtype=torch.long), folder / TOKEN_EMBED, None)
        _convert_language(language, checkpoint.config.d_model, folder, compression)


def _convert_images(images: nn.Module, side: int, folder: Path, compression: bool) -> None:
    options = IMAGE_ENCODER_COMPRESSION if compression else None
    _trace_and_save(
        images, torch.zeros((1, 3, side, side)), folder / IMAGE_ENCODER, options, input=[(-1, 3, side, side)]
    )


def _convert_language(language: NotebookLanguageModel, d_model: int, folder: Path, compression: bool) -> None:
    options = LANGUAGE_COMPRESSION if compression else None
    prompt = {
        "inputs_embeds": torch.zeros((1, PROMPT_LENGTH, d_model)),
        "attention_mask": torch.ones((1, PROMPT_LENGTH), dtype=torch.long),
    }
    past = _example_past(language)
    caches = [f"{layer}.{name}" for layer in range(len(past)) for name in ("key", "value")]
    outputs = ["logits", *(f"present.{cache}" for cache in caches)]
    _trace_and_save(language, prompt, folder / FIRST_STAGE, options, outputs=outputs)

    step = {
        "input_ids": torch.ones((1, 1), dtype=torch.long),
        "past_key_values": past,
        "attention_mask": torch.ones((1, PROMPT_LENGTH + 1), dtype=torch.long),
    }
    shapes: dict[str, list[int]] = {"input_ids": [1, -1]}
    for layer, (key, value) in enumerate(past):
        shapes[f"past_key_values.{layer}.key"] = [*key.shape[:3], -1]
        shapes[f"past_key_values.{layer}.value"] = [*value.shape[:2], -1, value.shape[3]]
    shapes["attention_mask"] = [1, -1]
    _trace_and_save(_SecondStage(language), step, folder / SECOND_STAGE, options, outputs=outputs, inputs=shapes)


def _example_past(language: NotebookLanguageModel) -> Past:
    """Return a cache with the shapes of the example prompt. The notebook runs the model for it."""
    heads = language.blocks[0].attn.num_heads
    width = language.wte.weight.shape[1] // heads
    keys, values = torch.zeros(1, heads, width, PROMPT_LENGTH), torch.zeros(1, heads, PROMPT_LENGTH, width)
    return tuple((keys.clone(), values.clone()) for _ in language.blocks)


def _trace_and_save(
    model: nn.Module,
    example,
    file: Path,
    compression: dict | None,
    outputs: list[str] | None = None,
    inputs: dict[str, list[int]] | None = None,
    **options,
) -> None:
    """Trace a model, set names and shapes of inputs and outputs, compress and save it."""
    ov_model = ov.convert_model(model, example_input=example, **options)
    for port, (name, shape) in zip(ov_model.inputs, (inputs or {}).items()):
        if port.get_node().element_type.is_dynamic():
            port.get_node().set_element_type(ov.Type.f32)
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_tensor().set_names({name})
    for port, name in zip(ov_model.outputs, outputs or []):
        port.get_tensor().set_names({name})
    ov_model.validate_nodes_and_infer_types()
    if compression:
        ov_model = nncf.compress_weights(ov_model, **compression)
    ov.save_model(ov_model, file)
    del ov_model
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    gc.collect()


def _save_prompt_files(checkpoint: OriginalCheckpoint, folder: Path) -> None:
    checkpoint.tokenizer.save_pretrained(folder)
    settings = {name: value for name, value in checkpoint.image_processor.items() if not name.endswith("_type")}
    CLIPImageProcessorPil(**settings).save_pretrained(folder)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--compression", choices=("int4", "none"), default="int4")
    parser.add_argument("--stored-weights", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("CI", "true")
    convert(arguments.checkpoint, arguments.out, arguments.compression == "int4", arguments.stored_weights)


if __name__ == "__main__":
    main()
