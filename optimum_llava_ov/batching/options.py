"""Turn the options of a request into GenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openvino_genai

from optimum_llava_ov.chat.genai_engine import GenAIEngine


@dataclass(frozen=True)
class RequestOptions:
    """Hold the options of one request.

    Attributes:
        max_new_tokens (`int`): Maximum length of the answer, in tokens.
        temperature (`float`): 0 for greedy decoding.
        top_p (`float`), top_k (`int` or `None`): Limits for sampling.
        seed (`int` or `None`): Seed for sampling. Default: random.
        stop_strings (`Sequence[str]`): Texts that end an answer, besides those of the bundle.
        logprobs (`bool`): Whether the probabilities of tokens are needed.
        repetition_penalty, presence_penalty, frequency_penalty (`float`): As in GenAI.
        ignore_eos (`bool`): Whether to go on after an end-of-text token.
        schema (`dict` or `None`): JSON schema that the answer must have. See [`SchemaChecker`].
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop_strings: Sequence[str] = ()
    logprobs: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    schema: dict[str, Any] | None = None

    def generation_config(self, engine: GenAIEngine) -> openvino_genai.GenerationConfig:
        """Return GenAI's configuration.

        Raises:
            `ValueError`: GenAI does not accept a value.
        """
        config = engine.generation_config(
            {
                "max_new_tokens": self.max_new_tokens,
                "do_sample": self.temperature > 0,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "stop_strings": [*self.stop_strings] or None,
                "repetition_penalty": self.repetition_penalty,
                **({"eos_token_id": None} if self.ignore_eos else {}),
            }
        )
        if self.seed is not None:
            config.rng_seed = self.seed
        config.logprobs = int(self.logprobs)
        config.presence_penalty = self.presence_penalty
        config.frequency_penalty = self.frequency_penalty
        if self.schema is not None:
            config.structured_output_config = structured_output(self.schema)
        return config


def structured_output(schema: dict[str, Any]) -> openvino_genai.StructuredOutputConfig:
    structured = openvino_genai.StructuredOutputConfig()
    structured.json_schema = json.dumps(schema)
    return structured
