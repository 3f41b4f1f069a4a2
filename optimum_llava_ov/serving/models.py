"""The models of a server, and how they read requests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openvino

from optimum_llava_ov.batching.engine import BatchEngine
from optimum_llava_ov.batching.options import RequestOptions
from optimum_llava_ov.batching.schema import SchemaChecker
from optimum_llava_ov.bundle.settings import context_length
from optimum_llava_ov.chat.messages import Message, assistant_message, system_message, user_message
from optimum_llava_ov.chat.prompt import build_prompt
from optimum_llava_ov.images import check_number_of_images
from optimum_llava_ov.serving.admission import Places
from optimum_llava_ov.serving.errors import ApiError
from optimum_llava_ov.serving.images import ImageCache, PreparedImage, read_source
from optimum_llava_ov.serving.schemas import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    JsonObjectFormat,
    JsonSchemaFormat,
)
from optimum_llava_ov.serving.settings import Settings


PREPARING = 2  # threads that prepare requests; GenAI encodes the images of one request at a time


@dataclass(frozen=True)
class Job:
    """Hold one prompt as the engine takes it.

    Attributes:
        text (`str`): The prompt with one `<image>` for each image.
        images (`list[openvino.Tensor]`): See [`image_tensor`].
        num_tokens (`int`): Number of tokens of the prompt, with image tokens.
        options (`RequestOptions`): Options of the request.
        num_answers (`int`): Number of answers to this prompt. Each is a request to the engine, because GenAI would
            pass on several answers to one request only when all are complete.
    """

    text: str
    images: list[openvino.Tensor]
    num_tokens: int
    options: RequestOptions
    num_answers: int


class ServedModel:
    """A bundle that answers requests.

    Args:
        name: What requests call it.
        engine: Runs the bundle. It must compute `settings.max_running` answers at a time.
    """

    def __init__(self, name: str, engine: BatchEngine, settings: Settings):
        self.name = name
        self.engine = engine
        self.settings = settings
        self.created = int(time.time())
        self.context_window = context_length(engine.config.text_config)
        self.places = Places(settings.max_running, settings.max_queue)
        self.images = ImageCache(engine.processor, settings.images, settings.image_cache_bytes)
        self.threads = ThreadPoolExecutor(PREPARING, f"prepare-{name}")
        self._schemas = SchemaChecker(engine.bundle)

    def gauges(self) -> Mapping[str, float]:
        usage = self.engine.usage()
        return {
            "requests_running": self.places.running,
            "requests_waiting": self.places.waiting,
            "batch_requests": usage.requests,
            "cache_usage_ratio": usage.cache,
            "cache_bytes": usage.cache_bytes,
            "image_cache_hits": self.images.hits,
            "image_cache_misses": self.images.misses,
        }

    def close(self) -> None:
        self.threads.shutdown()
        self.engine.close()

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """Read a request for an answer in a conversation.

        Raises:
            [`ApiError`]: The request is wrong; says what.
            `ValueError`: An image or a text is wrong; says what.
        """
        images: list[PreparedImage] = []
        number = sum(isinstance(part, ImagePart) for message in request.messages for part in _parts(message))
        check_number_of_images(number, self.settings.images)
        messages = [self._message(index, message, images) for index, message in enumerate(request.messages)]
        prompt = build_prompt(messages, self.engine.processor, self.engine.config)
        schema = self._schema_of(request)
        options = self._options(request, request.max_completion_tokens or request.max_tokens, len(prompt), schema)
        return [Job(prompt.text, [image.tensor for image in images], len(prompt), options, request.n)]

    def _schema_of(self, request: ChatRequest) -> dict[str, Any] | None:
        wanted = request.response_format
        if isinstance(wanted, JsonObjectFormat):
            return {"type": "object"}
        if not isinstance(wanted, JsonSchemaFormat):
            return None
        schema = wanted.json_schema.json_schema
        try:
            self._schemas.check(schema)
        except ValueError as error:
            raise ApiError(str(error), code="invalid_schema", param="response_format") from error
        return schema

    def completion_jobs(self, request: CompletionRequest) -> list[Job]:
        """Read a request that continues texts.

        Raises:
            [`ApiError`]: The request is wrong; says what.
        """
        jobs = []
        for text in [request.prompt] if isinstance(request.prompt, str) else request.prompt:
            tokens = self.engine.processor.tokenizer(_unicode(text))["input_ids"]
            if not tokens or self.engine.config.image_token_index in tokens:
                raise ApiError("A prompt must be a text that is not empty and has no <image>.", param="prompt")
            options = self._options(request, request.max_tokens, len(tokens), None)
            jobs.append(Job(text, [], len(tokens), options, request.n))
        return jobs

    def _message(self, index: int, message: ChatMessage, images: list[PreparedImage]) -> Message:
        new = [self._prepare(part.image_url.url) for part in _parts(message) if isinstance(part, ImagePart)]
        text = message.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text if not isinstance(part, ImagePart))
        if new and message.role != "user":
            raise ApiError(
                f"A message with the role {message.role} has images. Only the role user may have them.",
                param="messages",
            )
        images += new
        if message.role in ("system", "developer"):
            if index:
                raise ApiError("A message with the role system must be the first message.", param="messages")
            return system_message(text)
        _unicode(text)
        return user_message(text, [i.image for i in new]) if message.role == "user" else assistant_message(text)

    def _prepare(self, url: str) -> PreparedImage:
        return self.images.prepare(read_source(url, self.settings.images, self.settings.hosts))

    def _options(
        self, request: Any, max_tokens: int | None, prompt_tokens: int, schema: dict[str, Any] | None
    ) -> RequestOptions:
        limit, room = self.settings.max_tokens, self.context_window - prompt_tokens
        if room < (max_tokens or 1):
            raise ApiError(
                f"The prompt has {prompt_tokens} tokens, and the answer may have {max_tokens or 1}. Together they "
                f"exceed the context window of {self.context_window} tokens. Make the conversation or max_tokens "
                "shorter.",
                code="context_length_exceeded",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        if max_tokens is not None and max_tokens > limit:
            raise ApiError(f"max_tokens is {max_tokens}. This server allows up to {limit}.", param="max_tokens")
        seed = request.seed
        return RequestOptions(
            max_new_tokens=max_tokens or min(limit, room),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=None if seed is None else seed % 2**63,
            stop_strings=[*(self.engine.stop_strings or ()), *request.stops],
            logprobs=request.logprobs is not None and request.logprobs is not False,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            ignore_eos=request.ignore_eos,
            schema=schema,
        )


def _parts(message: ChatMessage) -> list[Any]:
    return [] if isinstance(message.content, str) else message.content


def _unicode(text: str) -> str:
    """Return the text if a tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"A text is not Unicode: {error.reason} at position {error.start}.") from error
    return text
