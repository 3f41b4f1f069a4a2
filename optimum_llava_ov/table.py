"""Format tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return one line for each row, with columns as wide as their longest cell.

    Args:
        rows: cells of each row.
        align: `<` (left) or `>` (right) for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip() for row in rows
    ]
