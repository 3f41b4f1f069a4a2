"""Build the example model: its configuration in the original format, and its initial weights."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from optimum_llava_ov.checkpoint.families.mpt import LlavaMptConfig
from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration
from optimum_llava_ov.models.merge import merge_image_features


IMAGE_SIZE, PATCH_SIZE = 96, 32
PREPROCESSOR = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "crop_size": IMAGE_SIZE,
    "size": IMAGE_SIZE,
}
VISION_CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "image_size": IMAGE_SIZE,
    "intermediate_size": 512,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": PATCH_SIZE,
}
# With a larger alibi_bias_max than usual, half of the heads have such small slopes that they attend to images at any
# distance
CONFIG = {
    "_name_or_path": "llava-mpt-shapes",
    "architectures": ["LlavaMPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 96,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "freeze_mm_mlp_adapter": False,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "mm_hidden_size": VISION_CONFIG["hidden_size"],
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "../clip",
    "model_type": "llava_mpt",
    "n_heads": 8,
    "n_layers": 4,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "sep_image_conv_front": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "verbose": 0,
}
EMBEDDING_STD = 0.1


def build_model(tokenizer: Tokenizer) -> LlavaMptForConditionalGeneration:
    config = LlavaMptConfig.from_dict({**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    config.vision_config = CLIPVisionConfig(**VISION_CONFIG)
    config.im_start_token_id, config.im_end_token_id = (
        tokenizer.token_to_id(token) for token in ("<im_start>", "<im_end>")
    )
    config.image_token_id = config.padded_vocab_size = config.vocab_size
    config.vocab_size += 1  # <image>
    model = LlavaMptForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            continue
        if name.endswith(("down_proj.weight", "fc2.weight", "self_attn.out_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * CONFIG["n_layers"]))
        else:
            nn.init.normal_(parameter, std=0.04 if parameter.ndim == 2 else 0.02)
    nn.init.normal_(model.language_model.lm_head.weight, std=EMBEDDING_STD)
    for block in model.language_model.transformer.blocks:
        _initialize_attention(block.attn)
    return model


def _initialize_attention(attention: nn.Module) -> None:
    """Initialize attention so that a token attends to similar tokens and copies them.

    Method: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828.
    Without it, the model needs most of the training to find the cell that a word describes.
    """
    size = attention.out_proj.weight.shape[0]
    query_key, value = (nn.init.orthogonal_(torch.empty(size, size)) for _ in range(2))
    with torch.no_grad():
        attention.Wqkv.weight.copy_(torch.cat([0.9 * query_key, 0.9 * query_key, value]))
        attention.out_proj.weight.copy_(EMBEDDING_STD * value.T)


def forward(
    model: LlavaMptForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    features: torch.Tensor,
) -> torch.Tensor:
    """Compute logits with head, embedding table and image borders tied, as in a loaded checkpoint."""
    table, config = model.language_model.lm_head.weight, model.config
    embeds = F.embedding(input_ids, table)
    borders = (
        table[[config.im_start_token_id, config.im_end_token_id]]
        .unsqueeze(1)
        .expand(-1, len(features), -1)
        .unsqueeze(2)
    )
    images = torch.cat([borders[0], model.image_encoder.projector(features), borders[1]], dim=1)
    embeds = merge_image_features(input_ids, embeds, images, config.image_token_id)
    return model.language_model(embeds, attention_mask).logits
