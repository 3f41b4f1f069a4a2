"""LLaVA-MPT: MosaicML's options of the language model, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_llava_ov.checkpoint.config import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, OriginalLlavaConfig
from optimum_llava_ov.checkpoint.options import (
    Rule,
    broken_rules,
    either,
    integer,
    number,
    one_of,
    optional,
    positive,
)


if TYPE_CHECKING:
    from transformers import MptConfig, PreTrainedTokenizerFast

    from optimum_llava_ov.checkpoint.repository import Repository

MAX_SCALE = 10_000

_ATTENTION_OPTIONS = {
    "alibi": one_of(True),
    "alibi_bias_max": optional(integer(1, 64)),
    "attn_type": one_of(None, "multihead_attention"),
    "prefix_lm": one_of(None, False),
    "qk_ln": one_of(None, False),
    "attn_uses_sequence_id": one_of(None, False),
    "clip_qkv": optional(number(0, MAX_SCALE)),  # 0 is off
    "softmax_scale": optional(positive(MAX_SCALE)),
}
# transformers writes an empty `model_type` and options of training too. Some versions do not accept them on loading.
_BUNDLE_ATTENTION_OPTIONS = (
    "attn_type",
    "attn_pdrop",
    "attn_impl",
    "clip_qkv",
    "softmax_scale",
    "prefix_lm",
    "qk_ln",
    "attn_uses_sequence_id",
    "alibi",
    "alibi_bias_max",
)


class LlavaMptConfig(OriginalLlavaConfig):
    """Configuration of an original LLaVA-MPT checkpoint (`model_type: "llava_mpt"`).

    The language model's options have MosaicML's names: `d_model`, `n_heads`, `n_layers`, `attn_config`, ...

    transformers' MPT silently drops biases, `qk_ln` and prefix-LM. A model converted from such a checkpoint would load
    and run, but its answers would be wrong. So these are refused.
    """

    model_type = "llava_mpt"
    family = "MPT"
    text_model_type = "mpt"
    original_architectures = ("LlavaMPTForCausalLM", "LlavaMptForCausalLM")
    base_architectures = ("MPTForCausalLM", "MptForCausalLM")
    torch_class = "LlavaMptForConditionalGeneration"
    prefix = "transformer."
    table = "wte.weight"
    vocabulary = "tokenizer.json"
    required = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "expansion_ratio", "attn_config")
    options = {
        "d_model": integer(1, MAX_WIDTH),
        "n_heads": integer(1, MAX_HEADS),
        "n_layers": integer(1, MAX_LAYERS),
        "max_seq_len": integer(1, 1 << 31),
        "expansion_ratio": integer(1, 64),
        "attn_config": Rule(lambda value: isinstance(value, dict), "an object"),
        "logit_scale": optional(either(one_of("inv_sqrt_d_model"), positive(MAX_SCALE))),
        "no_bias": one_of(True),
        "norm_type": one_of(None, "low_precision_layernorm", "layernorm"),
        "tie_word_embeddings": one_of(None, True),
    }

    @classmethod
    def known_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = super().known_options(values)
        if isinstance(attn_config := known.get("attn_config"), dict):
            known["attn_config"] = {name: value for name, value in attn_config.items() if name in _ATTENTION_OPTIONS}
        return known

    @classmethod
    def nested_problems(cls, values: dict[str, Any]) -> list[str]:
        attn_config = values["attn_config"]
        return broken_rules(attn_config, _ATTENTION_OPTIONS, "attn_config.") if isinstance(attn_config, dict) else []

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[str]:
        d_model, n_heads = values["d_model"], values["n_heads"]
        return [f"d_model={d_model} is not a multiple of n_heads={n_heads}"] if d_model % n_heads else []

    @property
    def text_config(self) -> MptConfig:
        """Configuration of the language model.

        Only options that inference reads are copied: `attn_config`, as transformers saves it again, contains an empty
        `model_type` and training options, with types that newer versions reject.
        """
        # Imports transformers' table of configurations, which imports this module when it is registered there
        from transformers import MptConfig

        alibi_bias_max, softmax_scale, clip_qkv = (
            self.attn_config.get(name) for name in ("alibi_bias_max", "softmax_scale", "clip_qkv")
        )
        return MptConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            expansion_ratio=self.expansion_ratio,
            max_seq_len=self.max_seq_len,
            vocab_size=self.vocab_size,
            logit_scale=getattr(self, "logit_scale", None),
            attn_config={
                "alibi": True,
                "alibi_bias_max": 8 if alibi_bias_max is None else alibi_bias_max,
                "clip_qkv": None if clip_qkv is None else float(clip_qkv),
                "softmax_scale": None if softmax_scale is None else float(softmax_scale),
            },
            use_cache=True,
            eos_token_id=self.eos_token_id,
            tie_word_embeddings=True,
        )

    def bundle_text_config(self, values: dict[str, Any]) -> dict[str, Any]:
        attn_config = values["attn_config"]
        return {**values, "attn_config": {name: attn_config[name] for name in _BUNDLE_ATTENTION_OPTIONS}}

    def load_tokenizer(self, repository: Repository) -> PreTrainedTokenizerFast:
        from optimum_llava_ov.checkpoint.tokenizer import load_bpe_tokenizer

        return load_bpe_tokenizer(repository, self.mm_use_im_start_end)
