"""Fill in the pages that are made from the package: the commands, from their parsers, and the changelog."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"^<!-- command: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_) -> str:
    """Replace `<!-- command: chat -->` with the help of that command, and the changelog's page with CHANGELOG.md."""
    if page.file.src_uri == "changelog.md":
        return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return COMMAND.sub(lambda match: f"```text\n{help_of(match[1])}\n```", markdown)


def help_of(name: str) -> str:
    """Return the help of a command of `optimum-cli llava-ov`."""
    from optimum_llava_ov.cli.commands import LlavaOVCommand

    command = next(each for each in LlavaOVCommand.SUBCOMMANDS if each.name == name)
    parser = ArgumentParser(prog=f"optimum-cli llava-ov {name}", description=command.help)
    command.subcommand_class.parse_args(parser)
    return parser.format_help().strip()
