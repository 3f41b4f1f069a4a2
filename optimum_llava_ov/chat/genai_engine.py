"""Answer with OpenVINO GenAI.

GenAI's `ChatHistory` keeps image features, and its paged attention keeps the caches of all conversations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import torch
from PIL import Image
from transformers import AutoConfig, GenerationConfig, LlavaNextProcessor

from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.bundle.layout import PARTS
from optimum_llava_ov.chat.engine import Conversation
from optimum_llava_ov.chat.genai_images import fit_to_genai
from optimum_llava_ov.chat.images import digest
from optimum_llava_ov.chat.messages import PLACEHOLDER, Message, images_of, text_of
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer
from optimum_llava_ov.errors import ImageError
from optimum_llava_ov.models.image_layout import tiling_of
from optimum_llava_ov.runtime.prefix import common_prefix


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
NO_TEXT = "A message has images but no text. The genai engine needs a text. Add one, or use the openvino engine."


class GenAIEngine:
    """Run a bundle with GenAI's paged attention. See [`Engine`].

    It computes one call at a time; other calls wait. GenAI's SDPA backend is never used: its state belongs to one
    conversation, and a second conversation would get answers from the history of the first.

    Args:
        bundle: Folder of a bundle.
        prefix_caching: Whether a prompt reuses the caches of earlier prompts that begin alike. Without it, a repeated
            prompt takes as long as the first time, so that it can be measured.
        scheduling: Other values of GenAI's `SchedulerConfig`, such as `max_num_seqs`.
    """

    def __init__(
        self,
        bundle: Path,
        device: str = "CPU",
        ov_config: dict[str, str] | None = None,
        prefix_caching: bool = True,
        **scheduling: int,
    ):
        self.name, self.folder = "genai", bundle
        self.processor = load_processor(bundle)
        self.config = AutoConfig.from_pretrained(bundle)
        self.stop_strings = GenerationConfig.from_pretrained(bundle).stop_strings
        self._scheduler = openvino_genai.SchedulerConfig()
        self._scheduler.enable_prefix_caching = prefix_caching
        for name, value in scheduling.items():
            setattr(self._scheduler, name, value)
        self._device, self._ov_config = device, ov_config or {}
        self._pipeline = self.new_pipeline()
        self._turn = threading.Lock()

    def new_pipeline(self) -> openvino_genai.ContinuousBatchingPipeline:
        """Load the bundle into a pipeline of GenAI."""
        return openvino_genai.ContinuousBatchingPipeline(self.folder, self._scheduler, self._device, self._ov_config)

    def new_conversation(self) -> Conversation:
        return GenAIConversation(self)

    def generate(self, prompts: Sequence[Prompt], receive: Callable[[int, int], None], **options: Any) -> None:
        config = self.generation_config(options)
        config.stop_strings = set()
        config.apply_chat_template = False  # the prompt's text has it
        with self._turn:
            handles = [
                self._pipeline.add_request(
                    index, text_for_genai(prompt.text), self.image_tensors(prompt.messages), config
                )
                for index, prompt in enumerate(prompts)
            ]
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                for index, handle in enumerate(handles):
                    outputs = handle.read().values() if handle.can_read() else ()
                    for token in (token for output in outputs for token in output.generated_ids):
                        receive(index, token)

    def generate_turn(
        self, history: openvino_genai.ChatHistory, images: list[openvino.Tensor], config: Any, streamer: Any
    ) -> None:
        """Answer the last message of a history, which has these images. The caller has the [`turn`]."""
        self._pipeline.generate([history], images=[images], generation_config=[config], streamer=streamer)

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

    def generation_config(self, options: dict[str, Any]) -> Any:
        """Return the bundle's generation configuration with options of `generate`.

        Raises:
            `ValueError`: GenAI does not have the option, or does not accept its value.
        """
        return with_options(self._pipeline.get_config(), options)

    def image_tensors(self, messages: Sequence[Message]) -> list[openvino.Tensor]:
        """Return the images of messages as GenAI takes them."""
        return [image_tensor(image, self.processor) for image in images_of(messages)]

    def get_property(self, name: str) -> str | int | None:
        """Return an option of the user or of the bundle, or else the device's default.

        GenAI does not tell which properties it uses in the end.
        """
        if name in self._options:
            return self._options[name]
        try:
            value = openvino.Core().get_property(self._device, name)
        except RuntimeError:
            return None
        return value.to_string() if hasattr(value, "to_string") else value

    @cached_property
    def _options(self) -> dict[str, str]:
        """Return the properties that the language model's file requests of every engine, and those of the user."""
        model, path = openvino.Core().read_model(self.folder / PARTS["language_model"]), ["runtime_options"]
        return {**(dict(model.get_rt_info(path).value) if model.has_rt_info(path) else {}), **self._ov_config}


class GenAIConversation:
    """Keep the history of one conversation in GenAI. See [`Conversation`].

    Before an answer, the history keeps the messages that it shares with the session, and gets the other messages
    again.
    """

    def __init__(self, engine: GenAIEngine):
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        self._history = openvino_genai.ChatHistory()
        self._keys: list[tuple] = []  # of the messages in the history

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, **options: Any) -> None:
        config = self._engine.generation_config(options)
        answer.stats.reused_tokens = None
        output = AnswerStreamer(self._engine.processor.tokenizer, answer, streamer)
        output.put(prompt.input_ids)
        with self._engine.turn(answer) as acquired:
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
            images = self._engine.image_tensors([message])
            if message is messages[-1]:
                self._generate(images, config, _Tokens(answer, output))
            elif images:  # GenAI takes images only with a question that it answers
                self._generate(images, openvino_genai.GenerationConfig(max_new_tokens=1))
            if answer.cancelled:
                return

    def _generate(self, images: list[openvino.Tensor], config: Any, tokens: _Tokens | None = None) -> None:
        self._engine.generate_turn(self._history, images, config, tokens)
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


def image_tensor(image: Image.Image, processor: Any) -> openvino.Tensor:
    """Return an image `(1, height, width, 3)` uint8 of the size that the model takes.

    So GenAI neither resamples nor pads it; it does both differently from the processor. An image that is cut into
    tiles has its own size; see [`fit_to_genai`].

    Raises:
        [`ImageError`]: The tiles have no patch of the image, which GenAI does not accept.
    """
    if isinstance(processor, LlavaNextProcessor):
        tiling = tiling_of(processor)
        if 0 in tiling.patches(image.size):
            raise ImageError(
                f"The image has {image.width} x {image.height} pixels. It is so long and narrow that its "
                "tiles would show nothing of it. The genai engine does not accept this. Crop it, or use the openvino "
                "engine."
            )
        image = fit_to_genai(image, tiling)
        return openvino.Tensor(np.array(image.convert("RGB"))[None])
    inputs = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = inputs["pixel_values"].transpose(0, 2, 3, 1)
    return openvino.Tensor(np.ascontiguousarray(pixels.round().astype(np.uint8)))


def text_for_genai(text: str) -> str:
    """Return a prompt for which GenAI computes `text`. It writes a newline after each `<image>`.

    Raises:
        `ValueError`: An `<image>` has no newline after it, because its message has no text.
    """
    if text.count(PLACEHOLDER) != text.count(f"{PLACEHOLDER}\n"):
        raise ValueError(NO_TEXT)
    return text.replace(f"{PLACEHOLDER}\n", PLACEHOLDER)


def with_options(config: Any, options: dict[str, Any]) -> Any:
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
        raise ValueError(NO_TEXT)
    return message["role"], text_of(message), *map(digest, images_of([message]))
