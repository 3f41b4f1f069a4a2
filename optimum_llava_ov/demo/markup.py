"""Convert texts to HTML for the page. The HTML never loads anything, whatever the text contains."""

from __future__ import annotations

from markdown_it import MarkdownIt


# Only these rules are enabled: no HTML, links or images. Other markup is shown as text.
_MARKDOWN = MarkdownIt("zero", {"breaks": True}).enable(
    ["backticks", "blockquote", "code", "emphasis", "escape", "fence", "heading", "hr", "list", "newline"]
)


def answer_to_html(text: str) -> str:
    """Convert an answer in Markdown: paragraphs, headings, lists, quotes, code and emphasis."""
    return f'<div class="prose">{_MARKDOWN.render(text)}</div>'
