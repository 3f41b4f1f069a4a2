"""Chat in a terminal that has colours and moves its cursor: Markdown, history, completion and images.

This needs more libraries than plain text, so `terminal.py` imports it only when it is used.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console as RichConsole
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from optimum_llava_ov.chat.sampling import SETTINGS
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.streaming import Answer
from optimum_llava_ov.chat.terminal import HELP, LEAVE, Terminal, ending, interrupt


COMMANDS = {
    "/image": "add an image to the next question",
    "/undo": "remove the last question and its answer",
    "/retry": "ask the last question again",
    "/clear": "begin a new conversation",
    "/reset": "begin a new conversation",
    "/save": "write the conversation as JSON",
    "/load": "continue a saved conversation",
    "/set": "show or change settings",
    "/help": "show all commands",
    **dict.fromkeys(LEAVE, "leave"),
}
WITH_PATH = ("/image", "/save", "/load")
HISTORY = "OPTIMUM_LLAVA_OV_HISTORY"  # file of the history; empty for none
PREVIEW_COLUMNS, PREVIEW_ROWS = 40, 16
# A model can write any character. Those that control a terminal are not shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)


class CommandCompleter(Completer):
    """Complete commands at the beginning of a line, paths and settings after the commands that take them."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        word, space, argument = text.partition(" ")
        if not space:
            if text.startswith("/"):
                for name in filter(lambda name: name.startswith(text), COMMANDS):
                    more = " " if name in (*WITH_PATH, "/set") else ""
                    yield Completion(name + more, -len(text), display_meta=COMMANDS[name])
        elif word in WITH_PATH:
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif word == "/set" and " " not in argument:
            matching = (name for name in SETTINGS if name.startswith(argument))
            yield from (Completion(name, -len(argument), display_meta=SETTINGS[name].expected) for name in matching)


def open_history() -> History:
    """Open the file of the questions of earlier chats, which only its owner can read. If there is none, use memory.

    The environment variable OPTIMUM_LLAVA_OV_HISTORY names another file, or none if it is empty.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "optimum-llava-ov"
    name = os.environ.get(HISTORY, str(folder / "history"))
    if not name:
        return InMemoryHistory()
    file = Path(name).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.open("a").close()
    except OSError:  # such as a home that cannot be written
        return InMemoryHistory()
    return FileHistory(str(file))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")  # Alt-Enter
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class Console(Terminal):
    """Show answers as Markdown while they are computed, and read lines with history and completion.

    With the environment variable `NO_COLOR`, nothing has a colour, and images are not shown.
    """

    def __init__(
        self,
        chat: ChatSession,
        output: TextIO = sys.stdout,
        show_stats: bool = False,
        banner: dict[str, str] | None = None,
        history: History | None = None,
    ):
        self.screen = RichConsole(file=output, highlight=False)
        self._session: PromptSession[str] = PromptSession(
            history=history or open_history(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            key_bindings=_bindings(),
            multiline=False,
        )
        super().__init__(chat, output, show_stats, read=self._prompt, banner=banner)

    def _prompt(self, text: str) -> str:
        return self._session.prompt(text)

    def greet(self) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in self.banner.items():
            table.add_row(f"[bold]{name}[/bold]", escape(value))
        if self.banner:
            self.screen.print(Panel(table, title="llava-ov chat", expand=False, border_style="blue"))
        self.screen.print(
            "Ask about an image: [bold]/image PATH[/bold], then your question. /help shows all commands."
        )

    def help(self) -> None:
        self.screen.print(HELP.rstrip(), markup=False)
        self.screen.print("Alt-Enter begins a new line. Tab completes commands and paths.")

    def preview(self, image: Image.Image) -> None:
        """Show an image with the best way that the terminal has: Kitty's or Sixel graphics, else half blocks."""
        if self.screen.no_color:
            return
        try:
            from textual_image.renderable import Image as Preview
        except ImportError:  # the extra "terminal"
            return
        columns = min(PREVIEW_COLUMNS, 2 * PREVIEW_ROWS * image.width // image.height, self.screen.width)
        with suppress(OSError):  # the terminal does not tell the size of its characters
            self.screen.print(Preview(image, width=max(columns, 1)))

    def show(self, answer: Answer) -> None:
        """Print complete paragraphs, and write the last one again whenever it grows."""
        written = ""
        with (
            interrupt(answer.cancel),
            Live(console=self.screen, refresh_per_second=12, transient=True, vertical_overflow="visible") as live,
        ):
            live.update("[dim]…[/dim]")
            for piece in answer:
                written += _CONTROL.sub("", piece)
                complete, written = split_paragraphs(written)
                if complete:
                    live.console.print(_markdown(complete))
                live.update(_markdown(written))
        if written:
            self.screen.print(_markdown(written))
        if note := ending(answer).strip():
            self.screen.print(note, style="yellow", markup=False)
        if self.show_stats:
            self.screen.print(str(answer.stats), style="dim", markup=False)

    def _say(self, text: str) -> None:
        self.screen.print(_CONTROL.sub("", text), markup=False)


def split_paragraphs(text: str) -> tuple[str, str]:
    """Split a text after its last complete paragraph. A block of code is complete when it is closed."""
    for match in reversed(list(re.finditer(r"\n[ \t]*\n", text))):
        before = text[: match.end()]
        if len(_FENCE.findall(before)) % 2 == 0:
            return before, text[match.end() :]
    return "", text


def _markdown(text: str) -> Any:
    return Markdown(text, hyperlinks=False)
