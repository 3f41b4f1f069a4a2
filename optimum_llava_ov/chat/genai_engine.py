"""Answers by OpenVINO GenAI: its `ChatHistory` holds the pictures' features, its paged attention the caches of all sessions."""

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

from optimum_llava_ov.chat.messages import Message, pictures_of, text_of
from optimum_llava_ov.chat.pictures import digest
from optimum_llava_ov.chat.prompt import Prompt, common_prefix
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer


# Options of `generate` that mean the same in both, by the same name.
OPTIONS = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "stop_strings")
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
TOP_K = 50  # what transformers samples from unless told otherwise


class GenAIModel:
    """A loaded bundle that all sessions share. It makes one answer at a time; the others wait.

    Paged attention with prefix caching, and no other: the state of GenAI's SDPA backend belongs to one conversation, and answers
    for a second one from the memory of the first.
    """

    def __init__(self, bundle: Path, device: str = "CPU", ov_config: dict[str, str] | None = None):
        properties = {"ATTENTION_BACKEND": "PA", "scheduler_config": scheduler_config(prefix_caching=True), **(ov_config or {})}
        self.pipeline = openvino_genai.VLMPipeline(bundle, device, **properties)
        self._turn = threading.Lock()

    @contextmanager
    def turn(self, answer: Answer) -> Iterator[bool]:
        """Wait for the pipeline. False if the answer was cancelled first."""
        mine = False
        while not mine and not answer.cancelled:
            mine = self._turn.acquire(timeout=0.05)
        try:
            yield mine
        finally:
            if mine:
                self._turn.release()


class GenAIEngine:
    """One session's history in GenAI. Follows the session's messages: what it shares with them stays, the rest is said anew."""

    def __init__(self, model: GenAIModel, processor: Any):
        self.model = model
        self.processor = processor
        self.reset()

    def reset(self) -> None:
        self._history = openvino_genai.ChatHistory()
        self._said: list[tuple] = []

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, **options: Any) -> None:
        config = generation_config(self.model.pipeline.get_generation_config(), options)
        answer.stats.reused_tokens = None
        output = AnswerStreamer(self.processor.tokenizer, answer, streamer)
        output.put(prompt.input_ids)
        with self.model.turn(answer) as mine:
            if mine:
                try:
                    self._say(prompt.messages, answer, config, output)
                except BaseException:
                    self.reset()
                    raise
        output.end()

    def _say(self, messages: Sequence[Message], answer: Answer, config: Any, output: AnswerStreamer) -> None:
        wanted = [_key(message) for message in messages]
        for _ in range(len(self._said) - common_prefix(self._said, wanted[:-1])):
            self._history.pop()
            self._said.pop()
        for message, key in zip(messages[len(self._said) :], wanted[len(self._said) :]):
            self._history.append({"role": message["role"], "content": text_of(message)})
            self._said.append(key)
            images = [picture_tensor(picture, self.processor) for picture in pictures_of([message])]
            if message is messages[-1]:
                self._generate(images, config, _Tokens(answer, output))
            elif images:  # GenAI takes pictures only with a question that it answers
                self._generate(images, openvino_genai.GenerationConfig(max_new_tokens=1))
            if answer.cancelled:
                return

    def _generate(self, images: list[openvino.Tensor], config: Any, tokens: _Tokens | None = None) -> None:
        self.model.pipeline.generate(self._history, images=images, generation_config=config, streamer=tokens)
        if tokens is not None and tokens.error is not None:
            raise tokens.error


class _Tokens(openvino_genai.StreamerBase):
    """Hands tokens on as they come, and tells GenAI when to stop."""

    def __init__(self, answer: Answer, output: AnswerStreamer):
        super().__init__()
        self.error: Exception | None = None
        self._answer = answer
        self._output = output

    def write(self, token: int | Sequence[int]) -> openvino_genai.StreamingStatus:
        try:
            for value in [token] if isinstance(token, int) else token:
                self._output.put(torch.tensor([value]))
        except Exception as error:  # a streamer's, which must not travel through C++
            self.error = error
        stop = self.error is not None or self._answer.cancelled or self._answer.stopped
        return openvino_genai.StreamingStatus.STOP if stop else openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def scheduler_config(prefix_caching: bool) -> openvino_genai.SchedulerConfig:
    """How paged attention is run, with or without remembering prompts that begin alike."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = prefix_caching
    return scheduler


def picture_tensor(picture: Image.Image, processor: Any) -> openvino.Tensor:
    """`(1, height, width, 3)`, of the size that the model sees: so GenAI neither resamples nor pads, both of which it does in
    another way than the processor.
    """
    values = processor.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return openvino.Tensor(np.ascontiguousarray(values.transpose(0, 2, 3, 1).round().astype(np.uint8)))


def generation_config(config: Any, options: dict[str, Any]) -> Any:
    """Options of `generate`, put into GenAI's own.

    Raises:
        `ValueError`: GenAI has no such option, or does not take its value.
    """
    options = {name: value for name, value in options.items() if value is not None or name == "eos_token_id"}
    for name in ("num_beams", "num_return_sequences"):  # 1, as the session has seen to
        options.pop(name, None)
    if "eos_token_id" in options:
        ends = options.pop("eos_token_id")
        config.ignore_eos = ends is None
        config.stop_token_ids = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"The genai engine has no {', '.join(unknown)}, only {', '.join(OPTIONS)}. The openvino engine has them all."
        )
    if options.get("do_sample"):
        options.setdefault("top_k", TOP_K)
        config.rng_seed = int(torch.randint(2**31, ()))  # else every answer is the same; follows torch.manual_seed
    else:
        options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
    if "stop_strings" in options:
        stop_strings = options["stop_strings"]
        options["stop_strings"] = {stop_strings} if isinstance(stop_strings, str) else set(stop_strings)
        config.include_stop_str_in_output = True  # the answer's own filter leaves it out
    _check_values(options)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def _check_values(options: dict[str, Any]) -> None:
    config = openvino_genai.GenerationConfig()
    for name, value in options.items():
        try:
            setattr(config, name, value)
        except TypeError as error:
            raise ValueError(f"{name} is {value!r}, which is not of the type that the genai engine takes.") from error
    try:
        config.validate()
    except RuntimeError as error:
        reason = str(error).split(" failed at ")[0]
        raise ValueError(f"The genai engine does not take these options: {reason} failed. Found {options}.") from error


def _key(message: Message) -> tuple:
    """What makes two messages the same to GenAI, which writes pictures before the text.

    Raises:
        `ValueError`: it has no text.
    """
    if all(item["type"] != "text" for item in message["content"]):
        raise ValueError("A message has images, but no text, which the genai engine needs. Use the openvino engine.")
    return message["role"], text_of(message), *map(digest, pictures_of([message]))
