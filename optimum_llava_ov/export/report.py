"""Summarize an export: precision and size of each part, and how to run the bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

import openvino

from optimum_llava_ov.bundle.layout import PARTS, part_sizes
from optimum_llava_ov.bundle.precision import weight_bytes
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_size


def summarize(bundle: Path) -> str:
    """Return the table of [`report`], and how to run the bundle in a terminal and in Python."""
    return (
        f"{report(bundle)}\n\nTo run it:\n    optimum-cli llava-ov chat {shlex.quote(str(bundle))}\n"
        f"In Python:\n    from optimum_llava_ov import OVModelForLlava\n"
        f'    model = OVModelForLlava.from_pretrained("{bundle}")'
    )


def report(bundle: Path) -> str:
    """Return a table of the parts, their precisions (by share of the weights' bytes) and their sizes on disk."""
    rows = [("part", "weights, by bytes", "size")]
    core, on_disk = openvino.Core(), part_sizes(bundle)
    for name, file in PARTS.items():
        sizes = weight_bytes(core.read_model(bundle / file))
        total = sum(sizes.values()) or 1
        mix = ", ".join(
            f"{100 * size / total:.0f} % {precision}"
            for precision, size in sorted(sizes.items(), key=lambda item: -item[1])
        )
        rows.append((name, mix, readable_size(on_disk[name])))
    rule = tuple("-" * max(map(len, column)) for column in zip(*rows))
    return "\n".join(table_lines([rows[0], rule, *rows[1:]], "<<>"))
