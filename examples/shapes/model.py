"""Build the example model with initial weights, from the files that describe it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from data import Words
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.models.merge import merge_image_features


EMBEDDING_STD = 0.1


def build_model(checkpoint: OriginalCheckpoint, first_clip: Path | None) -> OriginalLlavaForConditionalGeneration:
    """Build the model that a checkpoint's settings describe. Its weights are not read.

    Args:
        first_clip: folder of the tower to begin with. Patches may have another size. A random tower if `None`.
    """
    model = OriginalLlavaForConditionalGeneration(checkpoint.config)
    num_layers = checkpoint.config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            continue
        if name.endswith(("down_proj.weight", "fc2.weight", "self_attn.out_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))
        else:
            nn.init.normal_(parameter, std=0.04 if parameter.ndim == 2 else 0.02)
    nn.init.normal_(model.embed_tokens.weight, std=EMBEDDING_STD)
    # A checkpoint with a head of its own begins with the words of the table, too
    model.language_model.lm_head.weight = model.embed_tokens.weight
    for module in model.language_model.modules():
        if hasattr(module, "Wqkv"):
            _initialize_attention(module.out_proj, [module.Wqkv])
        elif hasattr(module, "q_proj"):
            _initialize_attention(module.o_proj, [module.q_proj, module.k_proj, module.v_proj], module.head_dim)
    if first_clip is not None:
        _copy_tower(model.image_encoder.features, first_clip)
    return model


def _initialize_attention(output: nn.Linear, inputs: list[nn.Linear], rotary_size: int | None = None) -> None:
    """Initialize attention so that a token attends to similar tokens and copies them.

    Method: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828.
    Without it, the model needs most of the training to find the cell that a word describes.

    Args:
        inputs: one module for query, key and value, or three.
        rotary_size: size of a head if its numbers are rotated with the position. Those that are rotated fast, first in
            each half, say little about similarity, so they are small.
    """
    size = output.weight.shape[0]
    query_key, value = (nn.init.orthogonal_(torch.empty(size, size)) for _ in range(2))
    if rotary_size:
        scale = torch.linspace(0.4, 1.2, rotary_size // 2).repeat(2 * size // rotary_size)
        query_key *= scale.unsqueeze(1)
    weights = torch.cat([0.9 * query_key, 0.9 * query_key, value])
    with torch.no_grad():
        for module, weight in zip(inputs, weights.chunk(len(inputs)), strict=True):
            module.weight.copy_(weight)
        output.weight.copy_(EMBEDDING_STD * value.T)


def _copy_tower(features: nn.Module, folder: Path) -> None:
    """Copy a tower from disk. The kernel that reads a patch is resized, so that it sees the same in larger patches."""
    tensors = {name.removeprefix("vision_model."): t for name, t in load_file(folder / "model.safetensors").items()}
    name = "embeddings.patch_embedding.weight"
    kernel, size = tensors[name].float(), features.embeddings.patch_size
    tensors[name] = F.interpolate(kernel, size=(size, size), mode="bicubic") * (kernel.shape[-1] / size) ** 2
    features.load_state_dict(tensors, strict=False)  # without the layers after the selected one


def begin_with_words(model: OriginalLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make projector and language model ready for codes.

    All embeddings get a part in common. By it, two heads of the first layer attend to the token before and to the one
    before that, so that a token knows which word it follows.
    """
    project_words(model, tokenizer)
    common = F.normalize(torch.randn(model.embed_tokens.weight.shape[1]), dim=0)
    with torch.no_grad():
        model.image_encoder.projector[2].bias.copy_(0.5 * common)
        model.embed_tokens.weight += 0.5 * common
        _attend_to_previous(model.language_model.model.layers[0].self_attn, common)


def project_words(model: OriginalLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the projector turn the code of a patch (`data.code`) into the sum of the embeddings of its words."""
    first, second = model.image_encoder.projector[0], model.image_encoder.projector[2]
    words, table = Words(tokenizer), model.embed_tokens.weight.detach()
    empty = torch.zeros(table.shape[1])
    shapes, colours = ([empty, *table[ids[1:]]] for ids in (words.shapes, words.colours))
    embeddings = torch.stack([*shapes, *colours, *(table[ids].sum(0) / len(ids) ** 0.5 for ids in words.places)])
    num_codes = len(embeddings)
    with torch.no_grad():
        # gelu(x) - gelu(-x) = x
        first.weight.zero_()
        first.weight[:num_codes, :num_codes] = 2 * torch.eye(num_codes)
        first.weight[num_codes : 2 * num_codes, :num_codes] = -2 * torch.eye(num_codes)
        nn.init.normal_(first.weight[2 * num_codes :, :num_codes], std=0.1)
        nn.init.normal_(second.weight, std=0.01)
        second.weight[:, :num_codes] = embeddings.T / 2
        second.weight[:, num_codes : 2 * num_codes] = -embeddings.T / 2


def _attend_to_previous(attention: nn.Module, common: torch.Tensor) -> None:
    """Set query and key of the first two heads so that the position one, or two, before has the largest score."""
    size = attention.head_dim
    theta = attention.config.rope_parameters["rope_theta"]
    angles = theta ** (-2 * torch.arange(size // 2) / size)  # by which a position turns each pair of numbers
    fast = (torch.arange(size // 2) < 4).float()
    for head, distance in ((0, 1), (1, 2)):
        query = torch.cat([fast * torch.cos(distance * angles), -fast * torch.sin(distance * angles)])
        key = torch.cat([fast, torch.zeros_like(fast)])
        for module, vector in ((attention.q_proj, query), (attention.k_proj, key)):
            module.weight[head * size : (head + 1) * size] = 1.4 * torch.outer(vector, common)


def read_codes(model: OriginalLlavaForConditionalGeneration, features: torch.Tensor, codes: torch.Tensor) -> float:
    """Make a projector that learned from codes read a tower's features: put the best linear map to codes before it.

    Args:
        features: `(images, patches, vision_size)`.
        codes: `(images, patches, 22)`, what they should be read as.

    Returns:
        The root of the mean squared error of the codes.
    """
    inputs = F.pad(features.flatten(0, 1), (0, 1), value=1.0).double()
    codes = codes.flatten(0, 1).double()
    solution = torch.linalg.lstsq(inputs, codes).solution
    first = model.image_encoder.projector[0]
    with torch.no_grad():
        weight = first.weight[:, : codes.shape[1]].double() @ solution.T
        first.weight.copy_(weight[:, :-1])
        first.bias += weight[:, -1]
    return float((inputs @ solution - codes).square().mean().sqrt())


def forward(
    model: OriginalLlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    features: torch.Tensor,
    num_shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of a batch whose first `num_shared` tokens are the same in all sequences, and computed once.

    Returns:
        Logits `(batch, tokens - num_shared, vocab_size)`, and those of the image features as words `(images,
        patches, vocab_size)`.
    """
    table, config = model.embed_tokens.weight, model.config
    patches = images = model.image_encoder.projector(features)
    if config.num_border_tokens:
        # From the table, which is trained
        borders = table[[config.im_start_token_id, config.im_end_token_id]].expand(len(features), -1, -1)
        images = torch.cat([borders[:, :1], patches, borders[:, 1:]], dim=1)
    embeds = merge_image_features(input_ids, F.embedding(input_ids, table), images, config.image_token_id)
    cache = DynamicCache()
    model.language_model(embeds[:1, :num_shared], attention_mask[:1, :num_shared], past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = (tensor.expand(len(embeds), -1, -1, -1) for tensor in (layer.keys, layer.values))
    logits = model.language_model(embeds[:, num_shared:], attention_mask, past_key_values=cache).logits
    return logits, patches @ table.T
