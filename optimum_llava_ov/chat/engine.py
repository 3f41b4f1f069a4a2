"""What runs a bundle: one protocol for chat sessions, benchmarks and servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.chat.streaming import Answer


class Conversation(Protocol):
    """Compute the answers of one conversation, and keep the cache of its earlier turns."""

    def answer(self, prompt: Prompt, answer: Answer, **options: Any) -> None:
        """Generate an answer to the prompt. The prompt is the whole conversation.

        Call `answer.token` for each token and `answer.emit` for its text, and stop when `answer.cancelled` is true.

        Args:
            options: Options of `generate`.
        """

    def reset(self) -> None:
        """Forget the conversation."""


class Engine(Protocol):
    """Run a loaded bundle.

    Attributes:
        name (`str`): "openvino" or "genai".
        folder (`Path`): Folder of the bundle.
        processor ([`LlavaProcessor`]): Processor of the bundle.
        config ([`LlavaConfig`]): Configuration of the bundle.
        stop_strings (`list[str]` or `None`): Texts that end an answer in a conversation, by the bundle's
            generation_config.json.
    """

    name: str
    folder: Path
    processor: Any
    config: Any
    stop_strings: list[str] | None

    def new_conversation(self) -> Conversation:
        """Begin a conversation. Conversations share the loaded model."""

    def generate(self, prompts: Sequence[Prompt], receive: Callable[[int, int], None], **options: Any) -> None:
        """Answer several prompts at once, without the caches of conversations.

        Args:
            receive: Called with the index of a prompt and the id of a new token of its answer, in the thread that
                called `generate`. An end-of-text token is part of its answer.
            options: Options of `generate`. Stop strings are not supported. With `eos_token_id=None`, each answer has
                exactly `max_new_tokens` tokens.
        """

    def get_property(self, name: str) -> str | int | None:
        """Return a property that the model was compiled with, such as `"INFERENCE_PRECISION_HINT"`.

        Return `None` if the device does not tell.
        """
