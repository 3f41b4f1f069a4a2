"""Build the language model in torch: MPT's own module, or the one of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, Cache, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.models.head import build_head
from optimum_llava_ov.models.mpt import MptLanguageModel


# Modules of this package. All other language models are those of transformers.
_OWN = {"mpt": MptLanguageModel}


class TransformersLanguageModel(nn.Module):
    """A decoder of transformers over embeddings. Its modules have the names that they have in transformers.

    Args:
        config: configuration of the language model.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.model = AutoModel.from_config(config, attn_implementation="sdpa")
        self.model.embed_tokens = None
        self.model.loss_function = None  # tracing reads it, and transformers warns of its default
        self.lm_head = build_head(config.hidden_size, config.vocab_size)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            inputs_embeds: `(batch, query, hidden_size)` float.
            attention_mask: `(batch, past + query)` integers, 0 for padding.
            position_ids: `(batch, query)`.
            past_key_values: cache of earlier positions, extended in place.
            use_cache: ignored; there is a cache if `past_key_values` is given. Optimum sets it.
            logits_to_keep: number of last positions to compute logits for; 0 for all.

        Returns:
            `logits` `(batch, query or logits_to_keep, vocab_size)`; `past_key_values`.
        """
        hidden_states = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state
        if logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states), past_key_values=past_key_values)


def build_language_model(config: PretrainedConfig) -> nn.Module:
    """Build the decoder of an original checkpoint, without an embedding table.

    Both kinds have the `forward` of [`TransformersLanguageModel`], and a head with a bias (see `models/head.py`). The
    last of the `vocab_size` tokens is `<image>`.
    """
    return _OWN.get(config.model_type, TransformersLanguageModel)(config)


def compute_buffers(model: nn.Module) -> None:
    """Compute what a checkpoint does not store: rotary frequencies, in float32 and on the CPU."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "inv_freq"):
                setattr(module, name, type(child)(child.config))
