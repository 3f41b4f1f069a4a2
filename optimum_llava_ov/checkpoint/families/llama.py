"""LLaVA with a LLaMA language model: LLaMA 1 and 2, Vicuna, Yi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from optimum_llava_ov.checkpoint.config import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, OriginalLlavaConfig
from optimum_llava_ov.checkpoint.options import Rule, flag, integer, one_of, optional, positive


if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

    from optimum_llava_ov.checkpoint.repository import Repository

MAX_POSITIONS = 1 << 31


def _is_linear(value: Any) -> bool:
    """Return whether a `rope_scaling` divides positions by a factor."""
    factor = positive(1_000)
    return isinstance(value, dict) and value.get("type") == "linear" and factor.accepts(value.get("factor"))


class LlavaLlamaConfig(OriginalLlavaConfig):
    """Configuration of an original LLaVA checkpoint with a LLaMA (`LlavaLlamaForCausalLM`).

    Its `model_type` is "llava_llama" in newer checkpoints, and "llava" in those that the authors published. Absent
    options have the defaults of transformers 4.37, with which the original runs.
    """

    model_type = "llava_llama"
    family = "LLaMA"
    text_model_type = "llama"
    # The last is the same model: ShareGPT4V's own name for it
    original_architectures: ClassVar[tuple[str, ...]] = (
        "LlavaLlamaForCausalLM",
        "LlavaLLaMAForCausalLM",
        "Share4VLlamaForCausalLM",
    )
    base_architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    required: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    options = {
        "hidden_size": integer(1, MAX_WIDTH),
        "intermediate_size": integer(1, 8 * MAX_WIDTH),
        "num_hidden_layers": integer(1, MAX_LAYERS),
        "num_attention_heads": integer(1, MAX_HEADS),
        "num_key_value_heads": optional(integer(1, MAX_HEADS)),
        "head_dim": optional(integer(1, MAX_WIDTH)),
        "hidden_act": one_of(None, "silu"),
        "max_position_embeddings": optional(integer(1, MAX_POSITIONS)),
        "rms_norm_eps": optional(positive(1)),
        "rope_theta": optional(positive(1e12)),
        "rope_scaling": Rule(
            lambda value: value is None or _is_linear(value), 'absent, {"type": "linear", "factor": <number>}'
        ),
        "attention_bias": optional(flag()),
        "tie_word_embeddings": optional(flag()),
    }
    # Whether the original uses the fast tokenizer, which ignores some settings of the slow one
    fast_tokenizer: ClassVar[bool] = False

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[str]:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        groups = values.get("num_key_value_heads") or heads
        if size % heads or (size // heads) % 2:
            return [f"hidden_size={size} is not an even multiple of num_attention_heads={heads}"]
        problems = []
        if heads % groups:
            problems.append(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
        if values.get("head_dim") not in (None, size // heads):
            problems.append(f"head_dim={values['head_dim']} is not hidden_size / num_attention_heads")
        return problems

    def _decoder_options(self) -> dict[str, Any]:
        """Return the options that the decoders of LLaMA and Mistral have in common."""
        scaling = getattr(self, "rope_scaling", None)
        rope = {"rope_type": "linear", "factor": float(scaling["factor"])} if scaling else {"rope_type": "default"}
        heads = self.num_attention_heads
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(self, "num_key_value_heads", None) or heads,
            "head_dim": self.hidden_size // heads,
            "hidden_act": "silu",
            "rms_norm_eps": getattr(self, "rms_norm_eps", None) or 1e-6,
            "rope_parameters": {**rope, "rope_theta": float(getattr(self, "rope_theta", None) or 10_000.0)},
            "tie_word_embeddings": bool(getattr(self, "tie_word_embeddings", False)),
            "use_cache": True,
            "bos_token_id": None,  # the tokenizer says what begins a prompt
            "eos_token_id": self.eos_token_id,
        }

    @property
    def text_config(self) -> PretrainedConfig:
        # Imports transformers' table of configurations, which imports this module when it is registered there
        from transformers import LlamaConfig

        config: LlamaConfig = LlamaConfig(
            **self._decoder_options(),
            max_position_embeddings=getattr(self, "max_position_embeddings", None) or 2048,
            attention_bias=bool(getattr(self, "attention_bias", False)),
        )
        return config

    def load_tokenizer(self, repository: Repository) -> PreTrainedTokenizerFast:
        from optimum_llava_ov.checkpoint.sentencepiece import load_sentencepiece_tokenizer

        return load_sentencepiece_tokenizer(
            repository,
            fast=self.fast_tokenizer,
            use_im_patch=self.mm_use_im_patch_token,
            use_im_start_end=self.mm_use_im_start_end,
        )
