"""LLaVA with a Mistral language model: LLaVA-Med, BakLLaVA, LLaVA-1.6 Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_llava_ov.checkpoint.families.llama import MAX_POSITIONS, LlavaLlamaConfig
from optimum_llava_ov.checkpoint.options import integer, one_of, optional


if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DEFAULT_WINDOW = 4096  # of transformers 4.37, where `sliding_window` is absent


class LlavaMistralConfig(LlavaLlamaConfig):
    """Configuration of an original LLaVA checkpoint with a Mistral (`LlavaMistralForCausalLM`).

    A sliding window is not computed. A checkpoint that has one is accepted if it was trained on prompts that fit into
    the window (`tokenizer_model_max_length`); then the window is the length of the bundle's context.
    """

    model_type = "llava_mistral"
    family = "Mistral"
    text_model_type = "mistral"
    original_architectures = ("LlavaMistralForCausalLM",)
    base_architectures = ("MistralForCausalLM",)
    required = (*LlavaLlamaConfig.required, "num_key_value_heads")
    options = {
        **LlavaLlamaConfig.options,
        "rope_scaling": one_of(None),
        "attention_bias": one_of(None, False),
        "sliding_window": optional(integer(1, MAX_POSITIONS)),
        "tokenizer_model_max_length": optional(integer(1, MAX_POSITIONS)),
    }
    fast_tokenizer = True

    @classmethod
    def known_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        return super().known_options(values) | {"sliding_window": values.get("sliding_window", _DEFAULT_WINDOW)}

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[str]:
        problems = super().contradictions(values)
        window, longest = values.get("sliding_window", _DEFAULT_WINDOW), values.get("tokenizer_model_max_length")
        if window is not None and (longest is None or longest > window):
            problems.append(
                f"sliding_window={window} is in use: the checkpoint was trained on prompts of up to "
                f"{'an unknown number of' if longest is None else longest} tokens (tokenizer_model_max_length)"
            )
        return problems

    @property
    def text_config(self) -> PretrainedConfig:
        from transformers import MistralConfig

        longest = getattr(self, "max_position_embeddings", None) or 131_072
        window = self.sliding_window
        return MistralConfig(
            **self._decoder_options(),
            max_position_embeddings=longest if window is None else min(longest, window),
            sliding_window=None,
        )
