"""Chat in a terminal, or answer one question from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from optimum_llava_ov.chat.images import fetch_image, is_url
from optimum_llava_ov.chat.messages import images_of, text_of
from optimum_llava_ov.chat.sampling import read_setting, sampling_options
from optimum_llava_ov.chat.session import MAX_NEW_TOKENS, ChatSession
from optimum_llava_ov.chat.streaming import Answer
from optimum_llava_ov.images import open_image


HELP = """\
/image PATH or URL   add an image to the next question
/undo                remove the last question and its answer
/retry               ask the last question again
/clear, /reset       begin a new conversation
/save FILE           write the conversation as JSON
/load FILE           continue a conversation that /save wrote
/set                 show the settings
/set NAME VALUE      change temperature, top_p or max_new_tokens
/help                show this help
/quit                leave; Ctrl-D does too

For example:
  /image photo.jpg
  What is unusual about this image?
  /set temperature 0.7
  /retry

To write several lines, end a line with \\, or begin and end the text with a line of three quotes (\"\"\").
Ctrl-C stops an answer.
"""
QUOTES = '"""'
LEAVE = ("/quit", "/exit")


def load_image(source: str) -> Image.Image:
    """Open an image by path or URL.

    Raises:
        `ValueError`: The image cannot be read.
    """
    return fetch_image(source) if is_url(source) else open_image(Path(source).expanduser())


def answer_once(chat: ChatSession, text: str, images: list[Image.Image], output: TextIO, show_stats: bool) -> None:
    """Answer one question, for scripts. Write only the answer to `output`."""
    _show(chat.send(text, images), output, show_stats)


class Terminal:
    """Read questions and commands, and show answers while they are computed. Plain text, one line after the other.

    Args:
        read: Asks for a line of text, with a prompt.
        banner: What is shown first, as names and values: the model, its precision and others.
    """

    def __init__(
        self,
        chat: ChatSession,
        output: TextIO = sys.stdout,
        show_stats: bool = False,
        read: Callable[[str], str] = input,
        banner: dict[str, str] | None = None,
    ):
        self.chat = chat
        self.output = output
        self.show_stats = show_stats
        self.read = read
        self.banner = banner or {}
        self.images: list[Image.Image] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/undo": self.undo,
            "/retry": self.retry,
            "/clear": self.reset,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
            "/set": self.set,
            "/help": lambda _: self.help(),
        }

    def run(self) -> None:
        """Run until `/quit` or the end of the input."""
        self.greet()
        for image in self.images:  # of the command line
            self.preview(image)
        while (text := self._read()) is not None:
            word, _, argument = text.partition(" ")
            if word in LEAVE:
                break
            self._execute(text, word, argument.strip())

    def _execute(self, text: str, word: str, argument: str) -> None:
        try:
            if word in self._commands:
                self._commands[word](argument)
            elif word.startswith("/") and word[1:].isalpha():
                nearest = get_close_matches(word, [*self._commands, *LEAVE], n=1)
                meant = f" Do you mean {nearest[0]}?" if nearest else ""
                self._say(f"The command {word} does not exist.{meant} /help shows all commands.")
            elif text.strip():
                self.ask(text)
        except (ValueError, OSError, RuntimeError) as error:
            self._say(f"{error}")
        except KeyboardInterrupt:  # just before the answer began, or just after it ended
            self.chat.cancel()
            self._say("")

    def ask(self, text: str) -> None:
        answer = self.chat.send(text, self.images)
        try:
            self.show(answer)
        finally:
            if answer.kept:  # otherwise the images stay for the next question
                self.images = []

    def image(self, source: str) -> None:
        if not source:
            return self._say("A path or URL is missing. Type: /image PATH, or /image URL")
        image = load_image(_unquoted(source))
        self.images.append(self.chat.see_image(image))
        self.preview(image)
        return self._say(f"Added an image of {image.width} x {image.height} pixels to the next question.")

    def undo(self, _: str) -> None:
        question = self.chat.undo()
        if question is None:
            return self._say("There is no question to undo.")
        self.images = images_of([question])
        note = " Its image is kept for the next question." if self.images else ""
        return self._say(f"Removed: {text_of(question)}{note}")

    def retry(self, _: str) -> None:
        self.show(self.chat.retry())

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.images = []
        self._say("Started a new conversation.")

    def save(self, file: str) -> None:
        if not file:
            return self._say("A file is missing. Type: /save FILE")
        path = Path(_unquoted(file)).expanduser()
        self.chat.save(path)
        return self._say(f"Saved: {path}")

    def load(self, file: str) -> None:
        if not file:
            return self._say("A file is missing. Type: /load FILE")
        path = Path(_unquoted(file)).expanduser()
        self.chat.load(path)
        self.images = []
        questions = [message for message in self.chat.messages if message["role"] == "user"]
        count = "1 question" if len(questions) == 1 else f"{len(questions)} questions"
        return self._say(f"Loaded: {path} ({count})")

    def set(self, argument: str) -> None:
        """Show the settings, or change one. It holds for all later answers."""
        name, _, text = argument.partition(" ")
        if name:
            self.settings[name] = read_setting(name, text.strip())
            self.chat.options = {
                **{key: value for key, value in self.chat.options.items() if key not in ("temperature", "top_p")},
                **sampling_options(**self.settings),  # type: ignore[arg-type]  # max_new_tokens is read as an int
            }
        self._say(", ".join(f"{key} {value:g}" for key, value in self.settings.items()))

    @cached_property
    def settings(self) -> dict[str, float]:
        """Return temperature, top-p and the maximum length of an answer, as `/set` shows them."""
        return {
            name: self.chat.options.get(name, default)
            for name, default in (("temperature", 0.0), ("top_p", 0.9), ("max_new_tokens", MAX_NEW_TOKENS))
        }

    def greet(self) -> None:
        if self.banner:
            self._say(", ".join(f"{name} {value}" if name else value for name, value in self.banner.items()))
        self._say("Ask about an image: /image PATH, then your question. /help shows all commands.")

    def help(self) -> None:
        self._say(HELP.rstrip())

    def preview(self, image: Image.Image) -> None:
        """Show an image, where the terminal can. Plain text cannot."""

    def show(self, answer: Answer) -> None:
        """Show an answer while it is computed."""
        _show(answer, self.output, self.show_stats)

    def _read(self) -> str | None:
        """Read a question of one line or several. Return `None` at the end. Ctrl-C discards the typed text."""
        while True:
            try:
                return self._lines(self.read("> "))
            except KeyboardInterrupt:  # noqa: PERF203  read again
                self._say("\n(/quit or Ctrl-D to leave)")
            except EOFError:
                self._say("")
                return None

    def _lines(self, line: str) -> str:
        if line.strip() == QUOTES:
            lines = []
            while (line := self.read(". ")).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read(". "))
        return "\n".join(lines)

    def _say(self, text: str) -> None:
        print(text, file=self.output, flush=True)


def _show(answer: Answer, output: TextIO, show_stats: bool) -> None:
    with interrupt(answer.cancel):
        for piece in answer:
            print(piece, end="", file=output, flush=True)
    print(ending(answer), file=output, flush=True)
    if show_stats:
        print(f"[{answer.stats}]", file=sys.stderr, flush=True)  # noqa: T201


def ending(answer: Answer) -> str:
    """Return what is said after an answer that was stopped; empty after others."""
    if not answer.cancelled:
        return ""
    return " [stopped]" if answer.kept else "[stopped before the first word; the conversation is unchanged]"


@contextmanager
def interrupt(action: Callable[[], Any]) -> Iterator[None]:
    """Run `action` on Ctrl-C, instead of ending the program."""
    previous = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _unquoted(path: str) -> str:
    """Remove the quotes that a terminal adds to a file dropped on it."""
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path
