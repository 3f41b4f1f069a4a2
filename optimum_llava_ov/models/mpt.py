"""MPT, the decoder of LLaVA-MPT: pre-norm blocks, fused query-key-value, ALiBi, no biases, head tied to the embedding.

After MosaicML's `modeling_mpt.py`, inference only. The names of the modules are those of the checkpoint. transformers
has an `MptForCausalLM` too, but its ALiBi is a constant of `max_seq_len` positions counted from the end: it stops at
2048 tokens, loses precision in bf16, and PagedAttention drops it (see [`attention_bias`]).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, MptConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.models.alibi import alibi_slopes, attention_bias
from optimum_llava_ov.models.head import build_head


class MptAttention(nn.Module):
    def __init__(self, config: MptConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.softmax_scale = config.attn_config.softmax_scale or 1 / math.sqrt(self.head_dim)
        self.clip_qkv = config.attn_config.clip_qkv
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor, bias: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        batch_size, query_length, d_model = hidden_states.shape
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            # (batch, head, token, dim)
            part.view(batch_size, query_length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.softmax_scale)
        return self.out_proj(context.transpose(1, 2).reshape(batch_size, query_length, d_model))


class MptMLP(nn.Module):
    def __init__(self, config: MptConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.expansion_ratio * config.d_model, bias=False)
        self.down_proj = nn.Linear(config.expansion_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class MptBlock(nn.Module):
    def __init__(self, config: MptConfig, layer_idx: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)
        self.attn = MptAttention(config, layer_idx)
        self.norm_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)
        self.ffn = MptMLP(config)

    def forward(self, hidden_states: torch.Tensor, bias: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm_1(hidden_states), bias, past_key_values)
        return hidden_states + self.ffn(self.norm_2(hidden_states))


class MptTransformer(nn.Module):
    """Blocks and final norm. The embedding table belongs to [`OriginalLlavaForConditionalGeneration`].

    Args:
        config ([`MptConfig`]): as made by [`LlavaMptConfig.text_config`].
    """

    def __init__(self, config: MptConfig):
        super().__init__()
        self.blocks = nn.ModuleList(MptBlock(config, layer_idx) for layer_idx in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)

    def forward(self, hidden_states: torch.Tensor, bias: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, bias, past_key_values)
        return self.norm_f(hidden_states)


class MptLanguageModel(nn.Module):
    """Decoder over embeddings.

    Its modules have the names that PEFT's adapters for MPT use: `transformer.blocks.0.attn.Wqkv`, ...

    Args:
        config ([`MptConfig`]): as made by [`LlavaMptConfig.text_config`]. The last of its
            `vocab_size` tokens is `<image>`.
    """

    def __init__(self, config: MptConfig):
        super().__init__()
        self.config = config
        self.transformer = MptTransformer(config)
        self.lm_head = build_head(config.d_model, config.vocab_size)
        scale = config.logit_scale
        self.logit_scale = 1 / math.sqrt(config.d_model) if scale == "inv_sqrt_d_model" else scale

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            inputs_embeds: `(batch, query, hidden_size)` float.
            attention_mask: `(batch, past + query)` integers, 0 for padding.
            position_ids: `(batch, query)`, ignored: ALiBi uses distances. GenAI always sets this input.
            past_key_values: cache of earlier positions, extended in place.
            logits_to_keep: number of last positions to compute logits for; 0 for all.

        Returns:
            `logits` `(batch, query or logits_to_keep, vocab_size)`; `past_key_values`.
        """
        config = self.config
        slopes = alibi_slopes(config.n_heads, config.attn_config.alibi_bias_max).to(
            inputs_embeds.device, inputs_embeds.dtype
        )
        bias = attention_bias(attention_mask, inputs_embeds.shape[1], slopes)
        hidden_states = self.transformer(inputs_embeds, bias, past_key_values)
        if logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if self.logit_scale is not None:
            # Before the head: GenAI computes only the last logits if the graph ends with the head and its bias.
            hidden_states = hidden_states * self.logit_scale
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states), past_key_values=past_key_values)
