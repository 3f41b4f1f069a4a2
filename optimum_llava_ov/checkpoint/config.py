"""Read `config.json` of an original LLaVA-MPT checkpoint, and refuse what this package does not compute."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not from `transformers`: this module may be imported while `transformers` itself still is
from transformers.configuration_utils import PretrainedConfig

from optimum_llava_ov.checkpoint.options import (
    MAX_SETTINGS_BYTES,
    Rule,
    broken_rules,
    either,
    integer,
    number,
    one_of,
    optional,
    positive,
    read_json,
    shown,
    text,
)
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


if TYPE_CHECKING:
    from transformers import MptConfig

# Larger than in any known model. A model of this size is still built in a second.
MAX_LAYERS = 512
MAX_PROJECTOR_LAYERS = 16
MAX_WIDTH = 65_536
MAX_HEADS = 1_024
MAX_VOCABULARY = 1 << 22
MAX_SCALE = 10_000


class LlavaMptConfig(PretrainedConfig):
    """Configuration of an original LLaVA-MPT checkpoint (`model_type: "llava_mpt"`), flat as it is on disk.

    The names are those of the original code: MosaicML's for the language model (`d_model`, `n_heads`, `n_layers`,
    `attn_config`, ...), and LLaVA's for the rest (`mm_vision_tower`, `mm_projector_type`, `mm_vision_select_layer`,
    ...). `docs/checkpoints.md` explains them.

    Args:
        vision_config (`CLIPVisionConfig`, *optional*):
            The vision tower's own configuration. It is in another repository, and is filled in when that is read.
        im_start_token_id, im_end_token_id (`int`, *optional*):
            Ids of `<im_start>` and `<im_end>` in the tokenizer, if the checkpoint puts them around an image.
        eos_token_id (`list[int]`, *optional*):
            Ids that end an answer: `<|im_end|>` and the checkpoint's own end of text.
        image_token_id (`int`, *optional*):
            Id of `<image>`. The original writes -200, and its tokenizers do not have this token.
        padded_vocab_size (`int`, *optional*):
            Number of rows of the checkpoint's embedding table. `vocab_size` counts the used ones, and `<image>`.
    """

    model_type = "llava_mpt"

    # Defaults of the original code, for options that a checkpoint may leave out
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str | None = None
    mm_use_im_start_end: bool = False
    image_aspect_ratio: str | None = None
    vision_config: Any = None
    im_start_token_id: int | None = None
    im_end_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    image_token_id: int | None = None
    padded_vocab_size: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> LlavaMptConfig:
        """Take the known options of a `config.json`. Drop all others: some choose code (`_attn_implementation`)."""
        known = {name: config_dict[name] for name in _OPTIONS if config_dict.get(name) is not None}
        # The dtype that the Auto classes load by default. They would look up any other name in torch.
        known |= {name: config_dict[name] for name in ("dtype", "torch_dtype") if config_dict.get(name) in _DTYPES}
        if isinstance(known.get("attn_config"), dict):
            known["attn_config"] = {
                name: value for name, value in known["attn_config"].items() if name in _ATTENTION_OPTIONS
            }
        return super().from_dict(known, **kwargs)

    @property
    def text_config(self) -> MptConfig:
        """Configuration of the language model, with the names and defaults of transformers."""
        return mpt_config(self)

    @property
    def select_feature(self) -> str:
        return self.mm_vision_select_feature or "patch"

    @property
    def projector_type(self) -> str:
        return self.mm_projector_type or "linear"

    @property
    def num_border_tokens(self) -> int:
        """Number of embeddings around the patches of one image: 2 for `<im_start>` and `<im_end>`, or 0."""
        return 2 if self.mm_use_im_start_end else 0


def mpt_config(config: PretrainedConfig) -> MptConfig:
    """Return the configuration of the language model in a flat LLaVA-MPT configuration.

    Only options that inference reads are copied: `attn_config`, as transformers saves it again, contains an empty
    `model_type` and training options, with types that newer versions reject.
    """
    # Imports transformers' table of configurations, which imports this module when it is registered there
    from transformers import MptConfig

    alibi_bias_max, softmax_scale, clip_qkv = (
        config.attn_config.get(name) for name in ("alibi_bias_max", "softmax_scale", "clip_qkv")
    )
    return MptConfig(
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_layers=config.n_layers,
        expansion_ratio=config.expansion_ratio,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        logit_scale=getattr(config, "logit_scale", None),
        attn_config={
            "alibi": True,
            "alibi_bias_max": 8 if alibi_bias_max is None else alibi_bias_max,
            "clip_qkv": None if clip_qkv is None else float(clip_qkv),
            "softmax_scale": None if softmax_scale is None else float(softmax_scale),
        },
        use_cache=True,
        eos_token_id=getattr(config, "eos_token_id", None),
    )


_REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "expansion_ratio", "attn_config")
_PROJECTORS = ("linear", "identity", *(f"mlp{depth}x_gelu" for depth in range(MAX_PROJECTOR_LAYERS + 1)))
_DTYPES = ("float16", "bfloat16", "float32")

# All options that are read, and the values for which our graph computes what the original does
_OPTIONS = {
    "d_model": integer(1, MAX_WIDTH),
    "n_heads": integer(1, MAX_HEADS),
    "n_layers": integer(1, MAX_LAYERS),
    "vocab_size": integer(1, MAX_VOCABULARY),
    "max_seq_len": integer(1, 1 << 31),
    "expansion_ratio": integer(1, 64),
    "attn_config": Rule(lambda value: isinstance(value, dict), "an object"),
    "logit_scale": optional(either(one_of("inv_sqrt_d_model"), positive(MAX_SCALE))),
    "no_bias": one_of(True),
    "norm_type": one_of(None, "low_precision_layernorm", "layernorm"),
    "sep_image_conv_front": one_of(None, False),
    "use_mm_proj": one_of(None, True),
    "mm_vision_tower": optional(text()),
    "mm_hidden_size": optional(integer(1, MAX_WIDTH)),
    "mm_projector_type": Rule(
        lambda value: value is None or value in _PROJECTORS,
        f"absent, linear, identity, mlp<N>x_gelu with N up to {MAX_PROJECTOR_LAYERS}",
    ),
    "mm_vision_select_layer": optional(integer(-MAX_LAYERS, MAX_LAYERS)),
    "mm_vision_select_feature": one_of(None, "patch", "cls_patch"),
    "image_aspect_ratio": one_of(None, "square", "pad"),
    "tie_word_embeddings": one_of(None, True),
    "mm_use_im_start_end": one_of(None, False, True),
}
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


def names_our_model(file: Path) -> bool:
    """Return whether a `config.json` names a LLaVA-MPT. A damaged one counts too: this package reports it."""
    try:
        return read_json(file).get("model_type") == LlavaMptConfig.model_type
    except InvalidCheckpointError:
        with suppress(OSError), file.open("rb") as stream:
            return f'"{LlavaMptConfig.model_type}"'.encode() in stream.read(MAX_SETTINGS_BYTES)
        return False


def read_config(file: Path) -> LlavaMptConfig:
    """Read the configuration of an original checkpoint from its `config.json`.

    Raises:
        [`InvalidCheckpointError`]: the file is not a JSON object.
        [`UnsupportedCheckpointError`]: it describes another kind of model, or a model that our graph does not compute.
    """
    values = read_json(file)
    if values.get("model_type") != "llava_mpt":
        raise UnsupportedCheckpointError(
            f"Found model_type {shown(values.get('model_type'))} in {file}, expected 'llava_mpt': this package "
            "converts original-format LLaVA-MPT checkpoints, such as liuhaotian/LLaVA-Lightning-MPT-7B-preview."
        )
    _check_values(values, file)
    return LlavaMptConfig.from_dict(values)


def _check_values(values: dict[str, Any], file: Path) -> None:
    """Refuse a configuration that our graph does not compute, and name the options.

    transformers' MPT silently drops biases, `qk_ln` and prefix-LM. A model converted from such a checkpoint would load
    and run, but its answers would be wrong.
    """
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise UnsupportedCheckpointError(
            f"{file} of the LLaVA-MPT checkpoint lacks {', '.join(missing)}. Expected a configuration as the original "
            "LLaVA code writes it (MosaicML MPT options beside `mm_*` options)."
        )

    problems = broken_rules(values, _OPTIONS)
    if isinstance(values["attn_config"], dict):
        problems += broken_rules(values["attn_config"], _ATTENTION_OPTIONS, "attn_config.")
    if not problems:  # each value is valid; check them together
        d_model, n_heads, mm_hidden_size = values["d_model"], values["n_heads"], values.get("mm_hidden_size")
        if values.get("mm_projector_type") == "identity" and mm_hidden_size not in (None, d_model):
            problems.append(f"mm_projector_type='identity' with mm_hidden_size={mm_hidden_size} != d_model={d_model}")
        if d_model % n_heads:
            problems.append(f"d_model={d_model} is not a multiple of n_heads={n_heads}")
    if problems:
        raise UnsupportedCheckpointError(
            f"{file} asks for what optimum-llava-ov does not compute, and a conversion would give wrong text: "
            + "; ".join(problems)
            + ". Nothing was converted."
        )
