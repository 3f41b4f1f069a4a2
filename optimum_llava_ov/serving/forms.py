"""Write answers in the forms of OpenAI: complete, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from optimum_llava_ov.serving.generation import Generation, Piece
from optimum_llava_ov.serving.models import ServedModel
from optimum_llava_ov.serving.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TokenLogprob,
    Usage,
)


class Form:
    """Write the answers to one request.

    Args:
        request: The request.
        model: The model that answers.
        generation: Computes the answers.
    """

    def __init__(self, request: Any, model: ServedModel, generation: Generation):
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._request = request
        self._name = model.name
        self._tokenizer = model.engine.processor.tokenizer
        self._generation = generation
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[float]] = {}

    prefix: str
    object: str  # of a chunk

    def beginning(self) -> list[dict[str, Any]]:
        """Return the chunks before the first token."""
        return []

    def collect(self, piece: Piece) -> None:
        """Keep a piece for [`complete`]."""
        self._tokens.setdefault(piece.choice, []).extend(piece.tokens)
        self._logprobs.setdefault(piece.choice, []).extend(piece.logprobs)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        raise NotImplementedError

    def complete(self) -> Any:
        """Return the whole answer, as a model of `schemas.py`."""
        raise NotImplementedError

    def end(self) -> list[dict[str, Any]]:
        """Return the chunks after the last token."""
        usage = self._usage().model_dump()
        return [self._chunk([]) | {"usage": usage}] if self._include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self._name,
            "choices": choices,
        }
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _usage(self) -> Usage:
        prompt, answer = self._generation.prompt_tokens, self._generation.answer_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)

    def _texts_of(self, tokens: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([token]) for token in tokens]


class ChatForm(Form):
    """Write answers of [`ChatRequest`]."""

    prefix, object = "chatcmpl", "chat.completion.chunk"
    _request: ChatRequest

    def beginning(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([_choice(index, delta=delta)]) for index in range(self._request.n)]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._chat_logprobs(piece.tokens, piece.logprobs)
        delta = {"content": piece.text} if piece.text or logprobs else {}
        choice = _choice(piece.choice, delta=delta) | {"finish_reason": piece.finish_reason}
        if logprobs is not None:
            choice["logprobs"] = logprobs.model_dump()
        return self._chunk([choice])

    def complete(self) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=text.complete()),
                logprobs=self._chat_logprobs(self._tokens[index], self._logprobs[index]),
                finish_reason=self._generation.finish_reasons[index] or "stop",
            )
            for index, text in enumerate(self._generation.texts)
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self._name, choices=choices, usage=self._usage())

    def _chat_logprobs(self, tokens: list[int], logprobs: list[float]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(token=text, logprob=logprob, bytes=list(text.encode()))
                for text, logprob in zip(self._texts_of(tokens), logprobs)
            ]
        )


class CompletionForm(Form):
    """Write answers of [`CompletionRequest`]."""

    prefix, object = "cmpl", "text_completion"
    _request: CompletionRequest

    def chunk(self, piece: Piece) -> dict[str, Any]:
        offset = len(self._generation.texts[piece.choice].text) - len(piece.text)
        logprobs = self._completion_logprobs(piece.tokens, piece.logprobs, offset)
        choice = _choice(piece.choice, text=piece.text) | {"finish_reason": piece.finish_reason}
        if logprobs is not None:
            choice["logprobs"] = logprobs.model_dump()
        return self._chunk([choice])

    def complete(self) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=text.complete(),
                logprobs=self._completion_logprobs(self._tokens[index], self._logprobs[index], 0),
                finish_reason=self._generation.finish_reasons[index],
            )
            for index, text in enumerate(self._generation.texts)
        ]
        return Completion(id=self.id, created=self.created, model=self._name, choices=choices, usage=self._usage())

    def _completion_logprobs(self, tokens: list[int], logprobs: list[float], offset: int) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        texts = self._texts_of(tokens)
        offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
        return CompletionLogprobs(tokens=texts, token_logprobs=logprobs, text_offset=offsets)


def _choice(index: int, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": None}
