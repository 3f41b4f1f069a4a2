"""Compute ALiBi so that it stays correct in OpenVINO: with PagedAttention, in bf16, and for long prompts.

Method: Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
https://arxiv.org/abs/2108.12409. Slopes for head counts that are not a power of two: `gen_slopes` in MosaicML's
llm-foundry, `models/layers/attention.py`.
"""

from __future__ import annotations

import math

import torch


def alibi_slopes(num_heads: int, bias_max: int = 8) -> torch.Tensor:
    """Return the slope of each head, `(num_heads,)` float32, all positive."""
    power_of_two = 2 ** math.ceil(math.log2(num_heads))
    exponents = torch.arange(1, power_of_two + 1, dtype=torch.float32) * (bias_max / power_of_two)
    slopes = 1.0 / torch.pow(2, exponents)
    if power_of_two != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def attention_bias(attention_mask: torch.Tensor, query_length: int, slopes: torch.Tensor) -> torch.Tensor:
    """Return the sum of causal mask, padding mask and ALiBi, which all layers add to their attention scores.

    Three properties must not change. Each has a test:

    - The operations `Abs -> Unsqueeze -> Multiply(negative slopes) -> Broadcast -> Unsqueeze -> Add(mask, .)` are one
      of the few forms of ALiBi that OpenVINO's SDPA-to-PagedAttention transformation recognises
      (`sdpa_to_paged_attention/state_management_pattern.cpp`, "jais"). It silently drops all other forms. The
      Broadcast does not change a value. If it had the shape of the scores, OpenVINO's CPU plugin would multiply with
      ones of that shape, 2 GB for 4,000 tokens at 7B. If it had no shape, the conversion of the graph would drop it.
    - Positions are subtracted as integers. bf16 cannot represent all integers above 256. This way small distances,
      which matter most, stay exact.
    - Lengths come from the mask, not from the configuration, so the length of a prompt is not limited.

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
    # The lowest of fp16, not of float32: the sum with ALiBi must stay finite in every precision OpenVINO may choose.
    mask = torch.where(visible, zero, torch.full_like(zero, torch.finfo(torch.float16).min)).unsqueeze(1)

    alibi = -slopes.view(-1, 1, 1) * distance.to(slopes.dtype).abs().unsqueeze(0)
    alibi = alibi.expand(slopes.shape[0], -1, -1)
    return mask + alibi.unsqueeze(0)
