"""The head of a language model: logits of all tokens, and of tokens that are never chosen."""

from __future__ import annotations

import torch
from torch import nn


# Logits processors read the logits of the ids in the prompt, so tokens that are never chosen need one that is never
# the largest. It is far below every logit. It is finite and exact in float32, bf16 and fp16, so its products and
# differences are never NaN.
NEVER = -32768.0


def build_head(hidden_size: int, vocab_size: int) -> nn.Linear:
    """Build a head that never chooses the last token, `<image>`."""
    head = nn.Linear(hidden_size, vocab_size)
    head.bias = nn.Parameter(head_bias(vocab_size, vocab_size - 1), requires_grad=False)
    return head


def head_bias(vocab_size: int, num_known_tokens: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the bias of the head, `(vocab_size,)`: 0 for tokens of the checkpoint, `NEVER` for the others."""
    bias = torch.zeros(vocab_size, dtype=dtype)
    bias[num_known_tokens:] = NEVER
    return bias
