"""Convert texts to HTML for the page. The HTML never loads anything, whatever the text contains."""

from __future__ import annotations

import re
from html import escape

from markdown_it import MarkdownIt


# Only these rules are enabled: no HTML, links or images. Other markup is shown as text.
_MARKDOWN = MarkdownIt("zero", {"breaks": True}).enable(
    ["backticks", "blockquote", "code", "emphasis", "escape", "fence", "heading", "hr", "list", "newline"]
)


def answer_to_html(text: str, stats: str = "") -> str:
    """Convert an answer in Markdown: paragraphs, headings, lists, quotes, code and emphasis.

    Args:
        stats: Shown under the answer, but not copied with it.
    """
    line = f'<div class="stats">{escape(stats)}</div>' if stats else ""
    return f'<div class="prose">{_MARKDOWN.render(text)}</div>{line}'


def image_to_html(data: str, description: str) -> str:
    """Return an image that is part of the page.

    Args:
        data: base64 of a PNG file. Anything else is removed from it.
    """
    data = re.sub(r"[^A-Za-z0-9+/=]", "", data)
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
