"""Texts as HTML for the page. Nothing in it loads anything, whatever the text says."""

from __future__ import annotations

from markdown_it import MarkdownIt


# Names what is shown, not what is left out: no HTML, links or images. What is not in the list stays as it was typed.
_MARKDOWN = MarkdownIt("zero", {"breaks": True}).enable(
    ["backticks", "blockquote", "code", "emphasis", "escape", "fence", "heading", "hr", "list", "newline"]
)


def answer_to_html(text: str) -> str:
    """What a model says: paragraphs, headings, lists, quotes, code and emphasis of Markdown."""
    return f'<div class="prose">{_MARKDOWN.render(text)}</div>'
