"""ALiBi, written so that it survives OpenVINO: PagedAttention, bf16, and prompts longer than the training context.

Method: Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
https://arxiv.org/abs/2108.12409. Slopes for head counts that are no power of two: `gen_slopes` in MosaicML's
llm-foundry, `models/layers/attention.py`.
"""

from __future__ import annotations

import math

import torch


def alibi_slopes(num_heads: int, bias_max: int = 8) -> torch.Tensor:
    """Slope of every head, `(num_heads,)` float32, all positive."""
    power_of_two = 2 ** math.ceil(math.log2(num_heads))
    exponents = torch.arange(1, power_of_two + 1, dtype=torch.float32) * (bias_max / power_of_two)
    slopes = 1.0 / torch.pow(2, exponents)
    if power_of_two != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def attention_bias(attention_mask: torch.Tensor, query_length: int, slopes: torch.Tensor) -> torch.Tensor:
    """What is added to the attention scores: causal mask, padding mask and ALiBi, once for all layers.

    Three properties are load-bearing, each with a test:

    - The operations `Abs -> Unsqueeze -> Multiply(negative slopes) -> Broadcast -> Unsqueeze -> Add(mask, .)` are one
      of the few shapes of ALiBi that OpenVINO's SDPA-to-PagedAttention transformation recognises
      (`sdpa_to_paged_attention/state_management_pattern.cpp`, "jais"). It drops any other without a word. The
      Broadcast changes nothing; were its shape that of the scores, OpenVINO's CPU plugin would compute it as a product
      with ones of that shape, two gigabytes for 4,000 tokens at 7B, and one without any shape is dropped when the
      graph is converted.
    - Positions are subtracted as integers. In bf16, integers above 256 do not exist; distances that are small, and
      therefore matter, stay exact this way.
    - Lengths come from the mask, not from the configuration, so there is no longest prompt.

    Args:
        attention_mask: `(batch, past + query)` integers, 0 for padding.
        query_length: number of new positions.
        slopes: `(heads,)` float.

    Returns:
        `(batch, heads, query, past + query)`, in the dtype of `slopes`.
    """
    key_length = attention_mask.shape[1]
    key_positions = torch.arange(key_length, device=attention_mask.device)
    query_positions = torch.arange(query_length, device=attention_mask.device) + (key_length - query_length)
    distance = key_positions.unsqueeze(0) - query_positions.unsqueeze(1)

    visible = (distance <= 0).unsqueeze(0) & (attention_mask != 0).unsqueeze(1)
    zero = torch.zeros((), dtype=slopes.dtype, device=slopes.device)
    # fp16's lowest, not float32's: the sum with ALiBi must stay finite in every precision OpenVINO may choose.
    mask = torch.where(visible, zero, torch.full_like(zero, torch.finfo(torch.float16).min)).unsqueeze(1)

    alibi = -slopes.view(-1, 1, 1) * distance.to(slopes.dtype).abs().unsqueeze(0)
    alibi = alibi.expand(slopes.shape[0], -1, -1)
    return mask + alibi.unsqueeze(0)
