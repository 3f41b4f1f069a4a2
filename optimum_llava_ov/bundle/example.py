"""Write the image that the snippets of a card ask about, so that they run as they are."""

from __future__ import annotations

from pathlib import Path

from optimum_llava_ov.bundle.layout import EXAMPLE
from optimum_llava_ov.samples.shapes import COLOURS, Object, Scene, render


QUESTION = "What colour is the circle?"
_OBJECTS = (("circle", "red", 0, 0.175, 0.175), ("star", "yellow", 2, 0.83, 0.18), ("triangle", "green", 7, 0.5, 0.82))
_SCENE = Scene(
    tuple(Object(shape, colour, cell, x, y, 0.13, 8, COLOURS[colour]) for shape, colour, cell, x, y in _OBJECTS),
    background=(236, 238, 245),
    width=224,
    height=224,
)


def save_example(folder: Path) -> None:
    """Draw a red circle, a yellow star and a green triangle: a PNG of about 3 kB."""
    render(_SCENE).save(folder / EXAMPLE, optimize=True)
