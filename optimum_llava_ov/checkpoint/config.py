"""`config.json` of an original LLaVA-MPT checkpoint: reading it, and refusing what we would compute wrongly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

# Not from `transformers`: this module is imported while modules of transformers are, and this one is ready by then
from transformers.configuration_utils import PretrainedConfig

from optimum_llava_ov.errors import UnsupportedCheckpointError


if TYPE_CHECKING:
    from transformers import MptConfig


class LlavaMptConfig(PretrainedConfig):
    """Configuration of an original LLaVA-MPT checkpoint (`model_type: "llava_mpt"`), flat as it is on disk.

    The names are those of the original code: MosaicML's for the language model (`d_model`, `n_heads`, `n_layers`,
    `attn_config`, ...), LLaVA's for the rest (`mm_vision_tower`, `mm_projector_type`, `mm_vision_select_layer`, ...). They are
    explained in `docs/checkpoints.md`.

    Args:
        vision_config (`CLIPVisionConfig`, *optional*):
            The vision tower's own configuration. It lives in another repository and is filled in when that is read.
        im_start_token_id, im_end_token_id (`int`, *optional*):
            Ids of `<im_start>` and `<im_end>`, from the tokenizer, if the checkpoint puts them around an image.
        image_token_id (`int`, *optional*):
            Id of `<image>`, which the original spells -200 and no tokenizer of its knows.
        padded_vocab_size (`int`, *optional*):
            Rows of the checkpoint's embedding table; `vocab_size` are those in use.
    """

    model_type = "llava_mpt"

    # Class attributes are the original code's defaults for options a checkpoint may leave out.
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
    image_token_id: int | None = None
    padded_vocab_size: int | None = None

    @property
    def text_config(self) -> MptConfig:
        """The language model's part, with the names and defaults of transformers."""
        return mpt_config(self)

    @property
    def select_feature(self) -> str:
        return self.mm_vision_select_feature or "patch"

    @property
    def projector_type(self) -> str:
        return self.mm_projector_type or "linear"

    @property
    def num_border_tokens(self) -> int:
        """Rows that frame the patches of one image: `<im_start>` and `<im_end>`, or none."""
        return 2 if self.mm_use_im_start_end else 0


def mpt_config(config: PretrainedConfig) -> MptConfig:
    """Language model part of a flat LLaVA-MPT configuration.

    Only what has a meaning is copied: `attn_config` as transformers re-saves it contains an empty `model_type` and training
    options, with types that newer versions reject.
    """
    from transformers import MptConfig

    attn_config = config.attn_config
    softmax_scale, clip_qkv = attn_config.get("softmax_scale"), attn_config.get("clip_qkv")
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
            "alibi_bias_max": int(attn_config.get("alibi_bias_max", 8)),
            "clip_qkv": None if clip_qkv is None else float(clip_qkv),
            "softmax_scale": None if softmax_scale is None else float(softmax_scale),
        },
        use_cache=True,
    )


_REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "expansion_ratio", "attn_config")

# option -> values for which our graph is the original's. `None` stands for "absent or null".
_COMPUTED = {
    "no_bias": (True,),
    "norm_type": (None, "low_precision_layernorm", "layernorm"),
    "sep_image_conv_front": (None, False),
    "use_mm_proj": (None, True),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "image_aspect_ratio": (None, "square", "pad"),
    "tie_word_embeddings": (None, True),
    "mm_use_im_start_end": (None, False, True),
}
_COMPUTED_ATTENTION = {
    "alibi": (True,),
    "attn_type": (None, "multihead_attention"),
    "prefix_lm": (None, False),
    "qk_ln": (None, False),
    "attn_uses_sequence_id": (None, False),
}


def check_config(config: PretrainedConfig) -> None:
    """Refuse, by the option's name, a configuration that our graph does not compute.

    transformers' MPT silently drops biases, `qk_ln` and prefix-LM; a model converted from such a checkpoint would load,
    run and be wrong.

    Raises:
        [`UnsupportedCheckpointError`]: naming every such option, what was found and what is supported.
    """
    missing = [name for name in _REQUIRED if getattr(config, name, None) is None]
    if missing:
        raise UnsupportedCheckpointError(
            f"config.json of the LLaVA-MPT checkpoint lacks {', '.join(missing)}. Expected a configuration as the original "
            "LLaVA code writes it (MosaicML MPT options beside `mm_*` options)."
        )

    problems = []
    for name, allowed in _COMPUTED.items():
        value = getattr(config, name, None)
        if value not in allowed:
            problems.append(f"{name}={value!r} (supported: {_spell(allowed)})")
    for name, allowed in _COMPUTED_ATTENTION.items():
        value = config.attn_config.get(name)
        if value not in allowed:
            problems.append(f"attn_config.{name}={value!r} (supported: {_spell(allowed)})")

    projector_type = getattr(config, "mm_projector_type", None) or "linear"
    if projector_type not in ("linear", "identity") and not re.fullmatch(r"mlp\d+x_gelu", projector_type):
        problems.append(f"mm_projector_type={projector_type!r} (supported: linear, identity, mlp<N>x_gelu)")
    if projector_type == "identity" and config.mm_hidden_size not in (None, config.d_model):
        problems.append(f"mm_projector_type='identity' with mm_hidden_size={config.mm_hidden_size} != d_model={config.d_model}")
    if not isinstance(config.mm_vision_select_layer, int):
        problems.append(f"mm_vision_select_layer={config.mm_vision_select_layer!r} (supported: one layer's number)")
    logit_scale = getattr(config, "logit_scale", None)
    if isinstance(logit_scale, str) and logit_scale != "inv_sqrt_d_model":
        problems.append(f"logit_scale={logit_scale!r} (supported: a number, 'inv_sqrt_d_model')")
    if config.d_model % config.n_heads:
        problems.append(f"d_model={config.d_model} is not a multiple of n_heads={config.n_heads}")

    if problems:
        raise UnsupportedCheckpointError(
            "This checkpoint asks for what optimum-llava-ov does not compute, and a conversion would give wrong text: "
            + "; ".join(problems)
            + ". Nothing was converted."
        )


def _spell(values: tuple) -> str:
    return ", ".join("absent" if value is None else str(value) for value in values)
