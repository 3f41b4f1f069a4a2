"""A conversation with a model: history, and answers that stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from optimum_llava_ov.bundle.check import naming_failure
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
MAX_NEW_TOKENS = 512  # of an answer, unless the user or the model's generation_config.json says so


class Engine(Protocol):
    """What makes answers; one for each session."""

    def answer(self, prompt: Prompt, answer: Answer, **options: Any) -> None:
        """Generate after the prompt: `answer.emit` text, note each `answer.token`, and look at `answer.cancelled`."""

    def reset(self) -> None:
        """Forget the conversation."""


class ChatSession:
    """A conversation that keeps the cache of its earlier turns. Made by [`OVModelForLlavaMPT.chat`].

    Sessions of one model share its weights and run in parallel; what is one session's own is its cache. A session answers one
    question at a time.

    Example:
        chat = model.chat(processor)
        for piece in chat.send("What is in this picture?", images=[image]):
            print(piece, end="")
        print(chat.send("And what should I be careful about?").result())

    Args:
        system: replaces the model's usual system prompt.
        messages: an earlier conversation, as a list or a file that [`save`] wrote.
        context_window: tokens that a prompt and its answer may have together. Default: those the model was trained with. The
            model has no limit of its own; its answers get worse with the distance from what it was trained with.
        when_full: "error", or "drop_oldest" to leave out the oldest turns, while their pictures stay.
        image_limits: what an image may be, and how many of them a question may come with.
        options: of `generate`, for all turns: `temperature`, `top_p`, `max_new_tokens`, ...
    """

    def __init__(
        self,
        engine: Engine,
        processor: Any,
        config: Any,
        *,
        system: str | None = None,
        messages: str | Path | Sequence[Message] = (),
        context_window: int | None = None,
        when_full: str = ERROR,
        image_limits: ImageLimits = DEFAULT_LIMITS,
        **options: Any,
    ):
        if when_full not in (ERROR, DROP_OLDEST):
            raise ValueError(f"when_full is {when_full!r}; expected {ERROR!r} or {DROP_OLDEST!r}.")
        self.processor = processor
        self.config = config
        self.context_window = context_window or config.text_config.max_seq_len
        self.when_full = when_full
        self.image_limits = image_limits
        self.options = {"max_new_tokens": MAX_NEW_TOKENS, **options}
        self._engine = engine
        self._messages = read_messages(messages, self.see_image)
        if system is not None:
            kept = [message for message in self._messages if message["role"] != "system"]
            self._messages = [system_message(system), *kept]
        self._dropped = 0
        self._answer: Answer | None = None
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[Message]:
        """The conversation as transformers writes it, dropped turns included. A copy."""
        return [{**message, "content": [dict(item) for item in message["content"]]} for message in self._messages]

    @property
    def dropped_turns(self) -> int:
        """How many of the oldest turns the model no longer sees."""
        return self._dropped

    def send(self, text: str, images: Any = None, **options: Any) -> Answer:
        """Ask a question. The answer begins at once, in another thread.

        Args:
            text: the question.
            images: images that come with it: a `PIL.Image`, a path, the bytes of a file, or a list of these. The session keeps what
                the model sees of them.
            options: those of `generate`, for this turn: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `stop_strings`,
                `streamer`, `stopping_criteria`, ... A stop string is not part of the answer.

        Returns:
            The answer: iterate over it for pieces of text, or wait for its `result()`.

        Raises:
            [`ContextWindowError`]: the conversation does not fit, and `when_full` is "error".
            [`~optimum_llava_ov.errors.ImageError`]: an image cannot be read, or more came than `image_limits` allow.
            `ValueError`: the text spells `<image>`.
            `RuntimeError`: the last answer is not complete.
        """
        with self._lock:
            self._check_idle()
            images = _listed(images)
            check_number_of_images(len(images), self.image_limits)
            question = user_message(text, [self.see_image(image) for image in images])
            return self._ask(self._messages, question, options)

    def see_image(self, image: Any) -> Image.Image:
        """What the model sees of an image: as small as that, and as good as the image in [`send`].

        Raises:
            [`~optimum_llava_ov.errors.ImageError`]: it cannot be read, or is more than `image_limits` allow.
        """
        return see_image(image, self.processor.image_processor, self.image_limits)

    def cancel(self) -> None:
        """Stop the answer after the token that is being computed, and wait for that. What was said stays in the conversation.

        A question that is cancelled before the first word of its answer is as if it had not been asked.
        """
        answer = self._answer
        if answer is not None:
            answer.cancel()
            answer.wait()

    def undo(self) -> Message | None:
        """Take back the last question and its answer. Returns the question, `None` if there is none."""
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

        The new answer replaces the old one when it ends. If it fails, or is cancelled before its first word, the old one stays.

        Raises:
            `ValueError`: nothing was asked yet.
            [`ContextWindowError`], `RuntimeError`: as in [`send`].
        """
        with self._lock:
            self._check_idle()
            question = self._last_question()
            if question is None:
                raise ValueError("There is no question yet that could be asked again.")
            return self._ask(self._messages[:-2], question, options)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with the same system prompt or another."""
        with self._lock:
            self._check_idle()
            kept = [message for message in self._messages if message["role"] == "system"]
            self._messages = kept if system is None else [system_message(system)]
            self._dropped = 0
            self._engine.reset()

    def save(self, file: str | Path) -> None:
        """Write the conversation as JSON messages, pictures included. `model.chat(processor, messages=file)` goes on with it.

        Raises:
            `OSError`: it cannot be written. What was in the file before is still there.
        """
        with self._lock:
            self._check_idle()
            write_messages(self._messages, file)

    def _ask(self, history: list[Message], question: Message, options: dict[str, Any]) -> Answer:
        """Begin the answer to a question that follows `history`. The conversation changes when the answer ends, if it is kept."""
        options = {**self.options, **options}
        _check_options(options)
        prompt, dropped = self._fit([*history, question], options["max_new_tokens"])
        stop_strings = options.get("stop_strings") or []
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings

        def work(answer: Answer) -> str:
            answer.stats.prompt_tokens = len(prompt)
            with naming_failure():
                self._engine.answer(prompt, answer, **options)
            if answer.stats.new_tokens or not answer.cancelled:
                self._messages = [*history, question, assistant_message(answer.text)]
                self._dropped = dropped
                answer.kept = True
            return answer.text

        self._answer = Answer(work, stop_strings)
        return self._answer

    def _last_question(self) -> Message | None:
        asked = len(self._messages) >= 2 and self._messages[-2]["role"] == "user"
        return self._messages[-2] if asked else None

    def _fit(self, messages: list[Message], max_new_tokens: int) -> tuple[Prompt, int]:
        """The prompt, with as many of the oldest turns left out as must be, and how many these are."""
        dropped, turns = self._dropped, len(messages) // 2
        while True:
            prompt = build_prompt(without_oldest_turns(messages, dropped), self.processor, self.config)
            if len(prompt) + max_new_tokens <= self.context_window:
                return prompt, dropped
            if self.when_full == ERROR or dropped >= turns - (messages[0]["role"] == "system"):
                raise ContextWindowError(
                    f"The conversation has {len(prompt)} tokens, and with {max_new_tokens} for the answer (max_new_tokens) that is "
                    f"more than the context window of {self.context_window}. Ask for a shorter answer, begin anew with reset(), "
                    f"or make the session with a larger context_window" + _or_drop(self.when_full)
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
        raise ValueError(f"max_new_tokens is {tokens!r}, expected an integer above 0: how many tokens an answer may have.")
    for name in ("num_beams", "num_return_sequences"):
        if (options.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {options[name]}, but an answer that streams is one sequence. Use model.generate() for it."
            )
