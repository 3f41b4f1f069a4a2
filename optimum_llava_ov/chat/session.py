"""Hold a conversation with a model: keep its history, and stream its answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from optimum_llava_ov.bundle.check import naming_failure
from optimum_llava_ov.bundle.settings import context_length
from optimum_llava_ov.chat.engine import Engine
from optimum_llava_ov.chat.errors import ContextWindowError
from optimum_llava_ov.chat.messages import (
    Message,
    assistant_message,
    read_messages,
    system_message,
    user_message,
    without_oldest_turns,
    write_messages,
)
from optimum_llava_ov.chat.prompt import Prompt, build_prompt
from optimum_llava_ov.chat.streaming import Answer
from optimum_llava_ov.images import DEFAULT_LIMITS, ImageLimits, check_number_of_images, see_image


ERROR, DROP_OLDEST = "error", "drop_oldest"
MAX_NEW_TOKENS = 512  # default for an answer


class ChatSession:
    """Keep a conversation and the cache of its earlier turns. Made by [`OVModelForLlava.chat`].

    Sessions of one model share its weights and run in parallel. Each has its own cache. A session answers one question
    at a time.

    ```python
    chat = model.chat(processor)
    for piece in chat.send("What is in this image?", images=[image]):
        print(piece, end="")
    print(chat.send("And what should I be careful about?").result())
    ```

    Args:
        engine: Runs the model.
        system: System prompt. Default: that of the model.
        messages: An earlier conversation, as a list or a file that [`save`] wrote.
        context_window: Maximum number of tokens of a prompt and its answer together. Default: the length that the
            model was trained with. The model itself has no limit, but longer conversations get worse answers.
        when_full: "error", or "drop_oldest" to remove the oldest turns. Their images are kept.
        image_limits: Limits for the size of an image and for the number of images in a question.
        options: Options of `generate` for all turns: `temperature`, `top_p`, `max_new_tokens`, ...
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        messages: str | Path | Sequence[Message] = (),
        context_window: int | None = None,
        when_full: str = ERROR,
        image_limits: ImageLimits = DEFAULT_LIMITS,
        **options: Any,
    ):
        if when_full not in (ERROR, DROP_OLDEST):
            raise ValueError(f"when_full is {when_full!r}. Expected {ERROR!r} or {DROP_OLDEST!r}.")
        self.processor = engine.processor
        self.config = engine.config
        self.context_window = context_window or context_length(engine.config.text_config)
        self.when_full = when_full
        self.image_limits = image_limits
        self.options = {"max_new_tokens": MAX_NEW_TOKENS, "stop_strings": engine.stop_strings, **options}
        self._conversation = engine.new_conversation()
        self._messages = read_messages(messages, self.see_image)
        if system is not None:
            kept = [message for message in self._messages if message["role"] != "system"]
            self._messages = [system_message(system), *kept]
        self._dropped = 0
        self._answer: Answer | None = None
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[Message]:
        """Return a copy of the conversation in the form of transformers, dropped turns included."""
        return [{**message, "content": [dict(item) for item in message["content"]]} for message in self._messages]

    @property
    def last_answer(self) -> Answer | None:
        """Return the answer that [`send`] or [`retry`] returned last; `None` before the first question."""
        return self._answer

    @property
    def dropped_turns(self) -> int:
        """Return the number of oldest turns that are no longer in the prompt."""
        return self._dropped

    def send(self, text: str, images: Any = None, **options: Any) -> Answer:
        """Ask a question. The answer begins at once, in another thread.

        Args:
            text: The question.
            images: Images of the question: a `PIL.Image`, a path, the bytes of a file, or a list of these. The session
                keeps them in the size that the model takes.
            options: Options of `generate` for this turn: `max_new_tokens`, `do_sample`, `temperature`, `top_p`,
                `stop_strings`, `streamer`, `stopping_criteria`, ... A stop string is not part of the answer.

        Returns:
            The answer. Iterate over it for pieces of text, or wait for its `result()`.

        Raises:
            [`ContextWindowError`]: The conversation does not fit, and `when_full` is "error".
            [`~optimum_llava_ov.errors.ImageError`]: An image cannot be read, or `image_limits` do not allow it.
            `ValueError`: The text contains `<image>`.
            `RuntimeError`: The last answer is not complete.
        """
        with self._lock:
            self._check_idle()
            images = _listed(images)
            check_number_of_images(len(images), self.image_limits)
            question = user_message(text, [self.see_image(image) for image in images])
            return self._ask(self._messages, question, options)

    def see_image(self, image: Any) -> Image.Image:
        """Reduce an image to the size that the model takes. The result serves as well as the image in [`send`].

        Raises:
            [`~optimum_llava_ov.errors.ImageError`]: The image cannot be read, or `image_limits` do not allow it.
        """
        return see_image(image, self.processor.image_processor, self.image_limits)

    def cancel(self) -> None:
        """Stop the answer after the current token, and wait until it has stopped.

        The text so far stays in the conversation. If there is none yet, the question is removed from the conversation.
        """
        answer = self._answer
        if answer is not None:
            answer.cancel()
            answer.wait()

    def undo(self) -> Message | None:
        """Remove the last question and its answer. Return the question, or `None` if there is none."""
        with self._lock:
            self._check_idle()
            question = self._last_question()
            if question is None:
                return None
            del self._messages[-2:]
            self._dropped = min(self._dropped, len(self._messages) // 2)
            return question

    def retry(self, **options: Any) -> Answer:
        """Ask the last question again.

        The new answer replaces the old one when it ends. If it fails, or is cancelled before its first word, the old
        answer stays.

        Raises:
            `ValueError`: There is no question yet.
            [`ContextWindowError`], `RuntimeError`: See [`send`].
        """
        with self._lock:
            self._check_idle()
            question = self._last_question()
            if question is None:
                raise ValueError("There is no question yet. Ask one first.")
            return self._ask(self._messages[:-2], question, options)

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation, with the same system prompt or another one."""
        with self._lock:
            self._check_idle()
            kept = [message for message in self._messages if message["role"] == "system"]
            self._messages = kept if system is None else [system_message(system)]
            self._dropped = 0
            self._conversation.reset()

    def load(self, messages: str | Path | Sequence[Message]) -> None:
        """Continue another conversation, as a list or a file that [`save`] wrote. Its system prompt counts.

        Raises:
            `ValueError`: It is not a conversation. The session is unchanged.
            `OSError`: The file cannot be read. The session is unchanged.
        """
        with self._lock:
            self._check_idle()
            self._messages = read_messages(messages, self.see_image)
            self._dropped = 0
            self._conversation.reset()

    def save(self, file: str | Path) -> None:
        """Write the conversation and its images as JSON messages. `model.chat(processor, messages=file)` continues it.

        Raises:
            `OSError`: The file cannot be written. Its earlier content is unchanged.
        """
        with self._lock:
            self._check_idle()
            write_messages(self._messages, file)

    def _ask(self, history: list[Message], question: Message, options: dict[str, Any]) -> Answer:
        """Begin the answer to a question that follows `history`. The conversation changes when the answer ends."""
        options = {**self.options, **options}
        _check_options(options)
        prompt, dropped = self._fit([*history, question], options["max_new_tokens"])
        stop_strings = options.get("stop_strings") or []
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings

        def work(answer: Answer) -> str:
            answer.stats.prompt_tokens = len(prompt)
            with naming_failure():
                self._conversation.answer(prompt, answer, **options)
            if answer.stats.new_tokens or not answer.cancelled:
                self._messages = [*history, question, assistant_message(answer.text)]
                self._dropped = dropped
                answer.kept = True
            return answer.text

        self._answer = Answer(work, stop_strings)
        return self._answer

    def _last_question(self) -> Message | None:
        has_question = len(self._messages) >= 2 and self._messages[-2]["role"] == "user"
        return self._messages[-2] if has_question else None

    def _fit(self, messages: list[Message], max_new_tokens: int) -> tuple[Prompt, int]:
        """Build the prompt without as many of the oldest turns as necessary. Also return their number."""
        dropped, turns = self._dropped, len(messages) // 2
        while True:
            prompt = build_prompt(without_oldest_turns(messages, dropped), self.processor, self.config)
            if len(prompt) + max_new_tokens <= self.context_window:
                return prompt, dropped
            if self.when_full == ERROR or dropped >= turns - (messages[0]["role"] == "system"):
                raise ContextWindowError(
                    f"The conversation has {len(prompt)} tokens. With {max_new_tokens} tokens for the answer "
                    f"(max_new_tokens) it exceeds the context window of {self.context_window} tokens. Ask for a "
                    "shorter answer, begin a new conversation with reset(), or make the session with a larger "
                    "context_window" + _or_drop(self.when_full)
                )
            dropped += 1

    def _check_idle(self) -> None:
        if self._answer is not None and self._answer.cancelled:
            self._answer.wait()
        if self._answer is not None and not self._answer.done():
            raise RuntimeError("The last answer is not complete. Read it to its end, or cancel() it.")


def _or_drop(when_full: str) -> str:
    return f' or when_full="{DROP_OLDEST}".' if when_full == ERROR else "."


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _check_options(options: dict[str, Any]) -> None:
    tokens = options["max_new_tokens"]
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(
            f"max_new_tokens is {tokens!r}, expected an integer above 0: how many tokens an answer may have."
        )
    for name in ("num_beams", "num_return_sequences"):
        if (options.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {options[name]}, but a chat answer is one sequence. Use model.generate() for more."
            )
