"""Caption images with continuous batching: as many at a time as the machine holds, in their order."""

from __future__ import annotations

import hashlib
import itertools
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import openvino
from PIL import Image

from optimum_llava_ov.batching.engine import BatchEngine, BatchRequest
from optimum_llava_ov.batching.load import load_batch_engine
from optimum_llava_ov.batching.options import RequestOptions
from optimum_llava_ov.batching.schema import SchemaChecker
from optimum_llava_ov.batching.text import AnswerText
from optimum_llava_ov.bundle.settings import context_length
from optimum_llava_ov.captions.places import Places
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.chat.prompt import build_prompt
from optimum_llava_ov.errors import EngineFailureError, ImageError
from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits, see_image


PROMPT = "Describe the image in detail."
RUNNING = 16
STEP_TOKENS = 1024  # of prompts in one step. Nobody waits for the next token, and long steps are more efficient
ATTEMPTS = 3  # at an image whose engine fails


@dataclass(frozen=True)
class Question:
    """Ask about one image.

    Attributes:
        key (`str`): Name of the image. With a temperature above 0, it seeds the answer.
        prompt (`str`): The question.
        image: A `PIL.Image` that the model sees (see [`see_image`]), or an exception that says why there is none.
        place: What the caller needs to find the image again.
    """

    key: str
    prompt: str
    image: Image.Image | Exception
    place: Any = None


@dataclass
class Caption:
    """Hold the answer about one image.

    Attributes:
        text (`str` or `None`): The caption. `None` after an error.
        tokens (`int`): Number of tokens of the answer.
        finish_reason (`str` or `None`): "stop" or "length".
        seconds (`float`): Time in the batch.
        error (`str` or `None`): Why there is no caption.
    """

    text: str | None = None
    tokens: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass
class _Running:
    """An image in the batch."""

    question: Question
    text: AnswerText
    began: float = field(default_factory=time.monotonic)
    request: BatchRequest | None = None
    finish_reason: str | None = None
    attempts: int = 0
    caption: Caption | None = None


class Captioner:
    """Caption images. Loads the model when it is first needed, so it can be sent to other processes.

    A batch is a dictionary of lists, as in `datasets.Dataset.map(captioner, batched=True)` and Ray Data's
    `map_batches`. Captions are greedy, and the same in every batch, unless `temperature` is above 0.

    Example:
        captioner = Captioner("llava-ov", prompt="Describe the image.")
        dataset = dataset.map(captioner, batched=True, batch_size=64)

    Args:
        bundle: Folder or model id of a bundle.
        prompt: The question about each image.
        max_new_tokens: Maximum length of a caption, in tokens.
        temperature: Sampling temperature. The key of an image is its seed.
        top_p: Limit for sampling.
        schema: JSON schema that each caption has.
        running: Number of images in the batch.
        device: OpenVINO device.
        ov_config: Properties of OpenVINO.
        image_limits: Limits of an image.
        image_column: Column of a batch with images: paths, bytes, `PIL.Image`s, or values of `datasets`.
        prompt_column: Column of a batch with prompts.
        key_column: Column of a batch with keys.
        ignore_eos: Whether to go on after an end-of-text token, so that all captions have the same length.
    """

    def __init__(
        self,
        bundle: str,
        prompt: str = PROMPT,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        schema: dict[str, Any] | None = None,
        running: int = RUNNING,
        device: str = "CPU",
        ov_config: dict[str, str] | None = None,
        image_limits: ImageLimits = DEFAULT_LIMITS,
        image_column: str = "image",
        prompt_column: str | None = None,
        key_column: str | None = None,
        ignore_eos: bool = False,
    ):
        self.bundle = str(bundle)
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.schema = schema
        self.running = running
        self.device = device
        self.ov_config = ov_config
        self.image_limits = image_limits
        self.image_column = image_column
        self.prompt_column = prompt_column
        self.key_column = key_column
        self.ignore_eos = ignore_eos
        self._engine: BatchEngine | None = None
        self._places: Places | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_places": None}

    @property
    def engine(self) -> BatchEngine:
        """Return the engine. Load it if it is not loaded.

        Raises:
            `ValueError`: It is not a bundle, or the JSON schema is not supported.
        """
        if self._engine is None:
            # Every image is another one: a cache of prefixes would only take memory
            engine = load_batch_engine(
                self.bundle,
                self.device,
                self.ov_config,
                prefix_caching=False,
                max_sequences=self.running,
                max_batched_tokens=STEP_TOKENS,
            )
            if self.schema is not None:
                SchemaChecker(engine.bundle).check(self.schema)
            self._engine, self._places = engine, Places(self.running)
        return self._engine

    def close(self) -> None:
        """Free the model. It is loaded again if it is needed."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the columns of a batch, with `caption`, `tokens`, `finish_reason`, `seconds` and `error`."""
        images = batch[self.image_column]
        prompts = [self.prompt] * len(images) if self.prompt_column is None else batch[self.prompt_column]
        keys = range(len(images)) if self.key_column is None else batch[self.key_column]
        questions = (
            Question(str(key), str(prompt), self.see(image)) for key, prompt, image in zip(keys, prompts, images)
        )
        captions = [caption for _, caption in self.captions(questions)]
        columns = {
            "caption": [caption.text for caption in captions],
            "tokens": [caption.tokens for caption in captions],
            "finish_reason": [caption.finish_reason for caption in captions],
            "seconds": [caption.seconds for caption in captions],
            "error": [caption.error for caption in captions],
        }
        return {**batch, **columns}

    def see(self, image: Any) -> Image.Image | Exception:
        """Return an image as the model sees it, or the error of an image that cannot be read."""
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        try:
            return see_image(image, self.engine.processor.image_processor, self.image_limits)
        except (ImageError, OSError) as error:
            return error

    def captions(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Caption]]:
        """Caption a stream of images. The next images are taken while earlier ones are in the batch.

        Several threads may call this. Their streams share the places of the batch, the one that began first before the
        others.

        Yields:
            The questions with their captions, in the same order.
        """
        events: queue.SimpleQueue[tuple[_Running, Any] | None] = queue.SimpleQueue()
        order: deque[_Running] = deque()
        remaining, more, engine = iter(questions), True, self.engine
        stream = self._places.stream(lambda: events.put(None))  # type: ignore[union-attr]  # made with the engine
        try:
            while True:
                refused = False
                # Captions that wait for a longer one before them are limited, too
                while more and not refused and (room := 4 * self.running - len(order)):
                    places = stream.take(room)
                    refused = not places
                    new = list(itertools.islice(remaining, places))
                    more = len(new) == places
                    stream.give_back(places - len(new))
                    if not more:
                        stream.end()
                    with engine.hold() if new else nullcontext():
                        for question in new:
                            order.append(self._begin(question, events))
                            stream.give_back(order[-1].caption is not None)
                while order and (caption := order[0].caption) is not None:
                    yield order.popleft().question, caption
                if not order and not more:
                    return
                if (stream.taken or refused) and (event := events.get()) is not None:
                    stream.give_back(self._take(*event, events))
        finally:
            for running in order:
                if running.request is not None:
                    running.request.cancel()
            stream.close()

    def _begin(self, question: Question, events: queue.SimpleQueue) -> _Running:
        running = _Running(question, AnswerText(self.engine.processor.tokenizer, self.engine.stop_strings or ()))
        if isinstance(question.image, Exception):
            running.caption = Caption(error=str(question.image) or type(question.image).__name__)
            return running
        try:
            self._submit(running, question.image, events)
        except EngineFailureError:  # it could not be loaded again
            raise
        except ValueError as error:  # also an image that cannot be cut into tiles, and a prompt with <image>
            running.caption = Caption(error=str(error))
        return running

    def _submit(self, running: _Running, image: Image.Image, events: queue.SimpleQueue) -> None:
        question, engine = running.question, self.engine
        prompt = build_prompt([user_message(question.prompt, [image])], engine.processor, engine.config)
        window = context_length(engine.config.text_config)
        if len(prompt) + self.max_new_tokens > window:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens. With {self.max_new_tokens} tokens for the caption it exceeds "
                f"the context window of {window} tokens."
            )
        seed = int.from_bytes(hashlib.sha256(question.key.encode("utf-8", "replace")).digest()[:4], "big")
        config = RequestOptions(
            self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            stop_strings=engine.stop_strings or (),
            ignore_eos=self.ignore_eos,
            schema=self.schema,
        ).generation_config(engine)
        running.attempts += 1
        tensor: openvino.Tensor = image_tensor(image, engine.processor)
        put: Callable[[Any], None] = lambda event: events.put((running, event))  # noqa: E731
        running.request = engine.submit(prompt.text, [tensor], config, put, put)

    def _take(self, running: _Running, event: Any, events: queue.SimpleQueue) -> bool:
        """Take new tokens, or the end. Return whether the image has left the batch."""
        if isinstance(event, list):
            for step in event:
                if self.engine.stop_strings:
                    running.text.add(step.tokens)
                else:  # the text is not needed before the end
                    running.text.tokens += step.tokens
                running.finish_reason = step.finish_reason or running.finish_reason
                if running.text.stopped and running.request is not None:
                    running.finish_reason = "stop"
                    running.request.cancel()
            return False
        image = running.question.image
        if isinstance(event, EngineFailureError) and isinstance(image, Image.Image) and running.attempts < ATTEMPTS:
            running.text = AnswerText(self.engine.processor.tokenizer, self.engine.stop_strings or ())
            self._submit(running, image, events)
            return False
        if event is not None:
            running.caption = Caption(error=str(event))
            return True
        running.caption = Caption(
            running.text.complete(),
            len(running.text.tokens),
            running.finish_reason,
            round(time.monotonic() - running.began, 3),
        )
        return True
