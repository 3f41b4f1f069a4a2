"""The conversation in a terminal, or for a script through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from optimum_llava_ov.chat.messages import pictures_of, text_of
from optimum_llava_ov.chat.pictures import fetch_picture, is_url
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.streaming import Answer
from optimum_llava_ov.images import open_image


HELP = """\
/image PATH or URL   give a picture with the next question
/undo                take back the last question and its answer
/retry               ask the last question again
/reset               begin anew
/save FILE           write the conversation as JSON; --load FILE goes on with it
/help                show this
/quit                leave; Ctrl-D does too
A line that ends with \\ goes on in the next one; a line of three quotes (\"\"\") begins and ends a text of several lines.
Ctrl-C stops an answer.
"""
QUOTES = '"""'


def load_picture(source: str) -> Image.Image:
    """A picture by path or URL.

    Raises:
        `ValueError`: it cannot be read.
    """
    return fetch_picture(source) if is_url(source) else open_image(Path(source).expanduser())


def answer_once(chat: ChatSession, text: str, pictures: list[Image.Image], output: TextIO, show_stats: bool) -> None:
    """For scripts: one question, and nothing but its answer on `output`."""
    _show(chat.send(text, pictures), output, show_stats)


class Terminal:
    """Reads questions and commands, and shows answers while they are made."""

    def __init__(
        self, chat: ChatSession, output: TextIO = sys.stdout, show_stats: bool = False, read: Callable = input
    ):
        self.chat = chat
        self.output = output
        self.show_stats = show_stats
        self.read = read
        self.pictures: list[Image.Image] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/undo": self.undo,
            "/retry": self.retry,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: self._say(HELP.rstrip()),
        }

    def run(self) -> None:
        """Until `/quit` or the end of the input."""
        self._say("Ask about a picture: /image PATH, then your question. /help shows all commands.")
        while (text := self._read()) is not None:
            word, _, argument = text.partition(" ")
            if word in ("/quit", "/exit"):
                break
            try:
                if word in self._commands:
                    self._commands[word](argument.strip())
                elif word.startswith("/") and word[1:].isalpha():
                    self._say(f"There is no command {word}. /help shows all of them.")
                elif text.strip():
                    self.ask(text)
            except (ValueError, OSError, RuntimeError) as error:
                self._say(f"{error}")
            except KeyboardInterrupt:  # just before the answer began, or just behind its end
                self.chat.cancel()
                self._say("")

    def ask(self, text: str) -> None:
        answer = self.chat.send(text, self.pictures)
        try:
            _show(answer, self.output, self.show_stats)
        finally:
            if answer.kept:  # else they come with the next question
                self.pictures = []

    def image(self, source: str) -> None:
        if not source:
            return self._say("Which one? /image PATH or /image URL")
        picture = load_picture(_unquoted(source))
        self.pictures.append(self.chat.see_image(picture))
        return self._say(f"A picture of {picture.width} x {picture.height} pixels comes with the next question.")

    def undo(self, _: str) -> None:
        question = self.chat.undo()
        if question is None:
            return self._say("There is nothing to take back.")
        self.pictures = pictures_of([question])
        note = " Its picture comes with the next question." if self.pictures else ""
        return self._say(f"Taken back: {text_of(question)}{note}")

    def retry(self, _: str) -> None:
        _show(self.chat.retry(), self.output, self.show_stats)

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.pictures = []
        self._say("A new conversation.")

    def save(self, file: str) -> None:
        if not file:
            return self._say("Where to? /save FILE")
        path = Path(_unquoted(file)).expanduser()
        self.chat.save(path)
        return self._say(f"Saved: {path}")

    def _read(self) -> str | None:
        """A question, of one line or several; `None` at the end. Ctrl-C drops what was typed."""
        while True:
            try:
                return self._lines(self.read("> "))
            except KeyboardInterrupt:
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
    with _interrupt(answer.cancel):
        for piece in answer:
            print(piece, end="", file=output, flush=True)
    print(_ending(answer), file=output, flush=True)
    if show_stats:
        print(f"[{answer.stats}]", file=sys.stderr, flush=True)


def _ending(answer: Answer) -> str:
    if not answer.cancelled:
        return ""
    return " [stopped]" if answer.kept else "[stopped before the first word; the conversation is as it was]"


@contextmanager
def _interrupt(action: Callable[[], Any]) -> Iterator[None]:
    """Let Ctrl-C do `action` instead of ending the program."""
    before = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unquoted(path: str) -> str:
    """Terminals put quotes around a file that is dropped on them."""
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


def run_chat(
    chat: ChatSession, images: list[str], show_stats: bool, commands: TextIO = sys.stdin, output: TextIO = sys.stdout
) -> None:
    """A conversation if somebody sits at a terminal; else what comes through the pipe is one question."""
    pictures = [chat.see_image(load_picture(source)) for source in images]
    if not commands.isatty():
        text = commands.read().strip()
        if not text:
            raise ValueError(
                'No question came through the pipe. Try: echo "What is in the picture?" | optimum-cli llava-ov chat ...'
            )
        answer_once(chat, text, pictures, output, show_stats)
        return
    _use_readline()
    terminal = Terminal(chat, output, show_stats)
    terminal.pictures = pictures
    terminal.run()


def _use_readline() -> None:
    """History and editing of lines, where Python has them."""
    with suppress(ImportError):  # Windows, whose console edits lines itself
        import readline  # noqa: F401
