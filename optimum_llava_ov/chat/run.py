"""Choose how to chat: in a terminal with colours, in plain text, or with one question and one answer."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO

from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.terminal import Terminal, answer_once, load_image
from optimum_llava_ov.system.terminal import is_plain


def run_chat(
    chat: ChatSession,
    images: list[str],
    show_stats: bool,
    commands: TextIO = sys.stdin,
    output: TextIO = sys.stdout,
    question: str | None = None,
    banner: dict[str, str] | None = None,
    plain: bool = False,
) -> None:
    """Chat if the input is a terminal. Otherwise answer the question that comes through the pipe.

    Args:
        images: Paths or URLs of images for the first question.
        question: The only question. The input is then not read.
        banner: What is shown first, as names and values.
        plain: Show plain text, as for a screen reader, even if the terminal can do more.
    """
    opened = [chat.see_image(load_image(source)) for source in images]
    if question is not None or not commands.isatty():
        text = (commands.read() if question is None else question).strip()
        if not text:
            raise ValueError(
                'There is no question. Try: optimum-cli llava-ov chat ... -p "What is in the image?", or write the '
                "question to a pipe."
            )
        answer_once(chat, text, opened, output, show_stats)
        return
    if plain or is_plain(output):
        _use_readline()
        terminal = Terminal(chat, output, show_stats, banner=banner)
    else:
        from optimum_llava_ov.chat.console import Console

        terminal = Console(chat, output, show_stats, banner=banner)
    terminal.images = opened
    terminal.run()


def _use_readline() -> None:
    """Enable history and editing of lines where Python supports them."""
    with suppress(ImportError):  # on Windows, the console edits lines itself
        import readline  # noqa: F401
