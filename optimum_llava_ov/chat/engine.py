"""Answers by this package's own model: `generate` of transformers on a session's cache."""

from __future__ import annotations

from typing import Any

from transformers import StoppingCriteriaList

from optimum_llava_ov.chat.cache import SessionModel
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer, Cancelled
from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT


class OpenVINOEngine:
    """Everything that `generate` can: streamers, stopping criteria, logits processors."""

    def __init__(self, model: OVModelForLlavaMPT, processor: Any):
        self.model = SessionModel(model)
        self.processor = processor

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, stopping_criteria=(), **options: Any) -> None:
        tokenizer = self.processor.tokenizer
        if options.get("stop_strings"):
            options["tokenizer"] = tokenizer
        _, answer.stats.reused_tokens = self.model.answer(
            prompt,
            lambda picture: self.processor.image_processor(picture, return_tensors="pt")["pixel_values"],
            lambda: answer.cancelled,
            streamer=AnswerStreamer(tokenizer, answer, streamer),
            stopping_criteria=StoppingCriteriaList([Cancelled(answer), *stopping_criteria]),
            **options,
        )

    def reset(self) -> None:
        self.model.reset()
