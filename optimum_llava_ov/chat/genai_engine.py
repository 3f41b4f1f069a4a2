"""Answer with OpenVINO GenAI.

GenAI's `ChatHistory` keeps image features, and its paged attention keeps the caches of all sessions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import torch
from PIL import Image

from optimum_llava_ov.chat.images import digest
from optimum_llava_ov.chat.messages import Message, images_of, text_of
from optimum_llava_ov.chat.prompt import Prompt, common_prefix
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer


# Options of `generate` that have the same name and meaning in GenAI
OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "stop_strings",
)
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
TOP_K = 50  # default of transformers


class GenAIModel:
    """Load a bundle that all sessions share. It computes one answer at a time; other answers wait.

    It always uses paged attention with prefix caching. The state of GenAI's SDPA backend belongs to one conversation:
    a second conversation would get answers from the history of the first.
    """

    def __init__(self, bundle: Path, device: str = "CPU", ov_config: dict[str, str] | None = None):
        properties = {
            "ATTENTION_BACKEND": "PA",
            "scheduler_config": scheduler_config(prefix_caching=True),
            **(ov_config or {}),
        }
        self.pipeline = openvino_genai.VLMPipeline(bundle, device, **properties)
        self._turn = threading.Lock()

    @contextmanager
    def turn(self, answer: Answer) -> Iterator[bool]:
        """Wait for the pipeline. Yield `False` if the answer was cancelled while it waited."""
        acquired = False
        while not acquired and not answer.cancelled:
            acquired = self._turn.acquire(timeout=0.05)
        try:
            yield acquired
        finally:
            if acquired:
                self._turn.release()


class GenAIEngine:
    """Keep one session's history in GenAI.

    Before an answer, the history keeps the messages that it shares with the session, and gets the other messages
    again.
    """

    def __init__(self, model: GenAIModel, processor: Any):
        self.model = model
        self.processor = processor
        self.reset()

    def reset(self) -> None:
        self._history = openvino_genai.ChatHistory()
        self._keys: list[tuple] = []  # of the messages in the history

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, **options: Any) -> None:
        config = generation_config(self.model.pipeline.get_generation_config(), options)
        answer.stats.reused_tokens = None
        output = AnswerStreamer(self.processor.tokenizer, answer, streamer)
        output.put(prompt.input_ids)
        with self.model.turn(answer) as acquired:
            if acquired:
                try:
                    self._answer(prompt.messages, answer, config, output)
                except BaseException:
                    self.reset()
                    raise
        output.end()

    def _answer(self, messages: Sequence[Message], answer: Answer, config: Any, output: AnswerStreamer) -> None:
        keys = [_key(message) for message in messages]
        for _ in range(len(self._keys) - common_prefix(self._keys, keys[:-1])):
            self._history.pop()
            self._keys.pop()
        for message, key in zip(messages[len(self._keys) :], keys[len(self._keys) :]):
            self._history.append({"role": message["role"], "content": text_of(message)})
            self._keys.append(key)
            images = [image_tensor(image, self.processor) for image in images_of([message])]
            if message is messages[-1]:
                self._generate(images, config, _Tokens(answer, output))
            elif images:  # GenAI takes images only with a question that it answers
                self._generate(images, openvino_genai.GenerationConfig(max_new_tokens=1))
            if answer.cancelled:
                return

    def _generate(self, images: list[openvino.Tensor], config: Any, tokens: _Tokens | None = None) -> None:
        self.model.pipeline.generate(self._history, images=images, generation_config=config, streamer=tokens)
        if tokens is not None and tokens.error is not None:
            raise tokens.error


class _Tokens(openvino_genai.StreamerBase):
    """Pass tokens on to the answer, and tell GenAI when to stop."""

    def __init__(self, answer: Answer, output: AnswerStreamer):
        super().__init__()
        self.error: Exception | None = None
        self._answer = answer
        self._output = output

    def write(self, token: int | Sequence[int]) -> openvino_genai.StreamingStatus:
        try:
            for value in [token] if isinstance(token, int) else token:
                self._output.put(torch.tensor([value]))
        except Exception as error:  # raised by a streamer; it must not propagate through C++
            self.error = error
        stop = self.error is not None or self._answer.cancelled or self._answer.stopped
        return openvino_genai.StreamingStatus.STOP if stop else openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def scheduler_config(prefix_caching: bool) -> openvino_genai.SchedulerConfig:
    """Return the settings of paged attention. With prefix caching, it reuses the caches of earlier prompts."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = prefix_caching
    return scheduler


def image_tensor(image: Image.Image, processor: Any) -> openvino.Tensor:
    """Return an image `(1, height, width, 3)` uint8 of the size that the model takes.

    So GenAI neither resamples nor pads it; it does both differently from the processor.
    """
    inputs = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = inputs["pixel_values"].transpose(0, 2, 3, 1)
    return openvino.Tensor(np.ascontiguousarray(pixels.round().astype(np.uint8)))


def generation_config(config: Any, options: dict[str, Any]) -> Any:
    """Set options of `generate` in GenAI's configuration.

    Raises:
        `ValueError`: GenAI does not have the option, or does not accept its value.
    """
    options = {name: value for name, value in options.items() if value is not None or name == "eos_token_id"}
    for name in ("num_beams", "num_return_sequences"):  # 1; the session has checked it
        options.pop(name, None)
    if "eos_token_id" in options:
        ends = options.pop("eos_token_id")
        config.ignore_eos = ends is None
        config.stop_token_ids = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"The genai engine does not support {', '.join(unknown)}. It supports {', '.join(OPTIONS)}. "
            "The openvino engine supports all options of generate."
        )
    if options.get("do_sample"):
        options.setdefault("top_k", TOP_K)
        # Without a seed every answer is the same. This one follows torch.manual_seed.
        config.rng_seed = int(torch.randint(2**31, ()))
    else:
        options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
    if "stop_strings" in options:
        stop_strings = options["stop_strings"]
        options["stop_strings"] = {stop_strings} if isinstance(stop_strings, str) else set(stop_strings)
        config.include_stop_str_in_output = True  # the answer's own filter removes it
    _check_values(options)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def _check_values(options: dict[str, Any]) -> None:
    """Raise `ValueError` if GenAI does not accept the value of an option."""
    config = openvino_genai.GenerationConfig()
    for name, value in options.items():
        try:
            setattr(config, name, value)
        except TypeError as error:  # noqa: PERF203  a few options
            raise ValueError(
                f"{name} is {value!r}, which has a type that the genai engine does not accept."
            ) from error
    try:
        config.validate()
    except RuntimeError as error:
        reason = str(error).split(" failed at ")[0]
        raise ValueError(f"The genai engine does not take these options: {reason} failed. Found {options}.") from error


def _key(message: Message) -> tuple:
    """Return a key that two messages share if GenAI treats them alike. GenAI writes images before the text.

    Raises:
        `ValueError`: The message has no text.
    """
    if all(item["type"] != "text" for item in message["content"]):
        raise ValueError(
            "A message has images but no text. The genai engine needs a text. Add one, or use the openvino engine."
        )
    return message["role"], text_of(message), *map(digest, images_of([message]))
