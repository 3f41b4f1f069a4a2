"""Make pages of the site that are not files of docs/: the home page, the changelog, and the reference of the commands.

A hook of mkdocs: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from pathlib import Path


ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")
REPOSITORY = "/".join(filter(None, (os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY"))))
COLUMNS = "82"  # of the help of a command: what fits on a page without scrolling


def on_config(config):
    """Add pages that mkdocs.yml does not name to the guides, by their headings, so that no page is out of reach."""
    named = re.findall(r"[\w.-]+\.md", str(config["nav"]))
    guides = next(section["Guides"] for section in config["nav"] if "Guides" in section)
    for file in sorted((ROOT / "docs").glob("*.md")):
        if file.name not in named:
            heading = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            guides.append({heading[1] if heading else file.stem: file.name})
    return config


def on_files(files, config):
    """Add the pages. mkdocs calls this before it reads the pages."""
    from mkdocs.structure.files import File

    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "commands.md": commands(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Correct links to files that are not part of the site, and those of pages that were moved into it."""
    is_moved = page.file.src_uri in ("index.md", "changelog.md")
    folder = ROOT if is_moved else ROOT / "docs"

    def corrected(match: re.Match) -> str:
        image, text, target, anchor = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs") and path.suffix in (".md", ".png") and path.is_file():
            return f"{image}[{text}]({path.relative_to(ROOT / 'docs').as_posix()}{anchor or ''})"
        name = path.relative_to(ROOT).as_posix()
        if name == "README.md":
            return f"{image}[{text}](index.md{anchor or ''})"
        if name == "CHANGELOG.md":
            return f"{image}[{text}](changelog.md{anchor or ''})"
        if REPOSITORY:
            return f"[{text}]({REPOSITORY}/blob/main/{name})"
        # A text that is the name, or its end, needs no name after it
        is_name = name.endswith(text.strip("`"))
        return f"`{name}` in the repository" if is_name else f"{text} (`{name}` in the repository)"

    return LINK.sub(corrected, markdown)


def on_page_content(html, page, config, files):
    """Remove the brackets around names in docstrings, which mark a reference in the documentation of transformers."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)


def commands() -> str:
    """Return the help of all commands, from their parsers."""
    os.environ["COLUMNS"] = COLUMNS
    from optimum_llava_ov.cli.commands import LlavaOVCommand

    parser = ArgumentParser("optimum-cli")
    LlavaOVCommand(parser.add_subparsers())
    sections = [
        "# Commands",
        "The [first page](../README.md#export) has the options of `optimum-cli export openvino` that apply to LLaVA. "
        "All commands end [in the same way](errors.md#how-a-command-ends).",
    ]
    for info in LlavaOVCommand.SUBCOMMANDS:
        command = ArgumentParser(f"optimum-cli llava-ov {info.name}")
        info.subcommand_class.parse_args(command)
        shown = f"``` {{ .text .help }}\n{command.format_help().rstrip()}\n```"
        sections.append(f"## {info.name}\n\n{info.help}\n\n{shown}")
    return "\n\n".join(sections) + "\n"
