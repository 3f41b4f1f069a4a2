"""Say what the families of the example model have of their own. Sizes and options are in their JSON files."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from data import Contents, NewScene, cells, patches

from optimum_llava_ov.samples.shapes import Scene, random_scene, wide_or_tall_scene


HERE = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        checkpoint, clip: names of the folders of the checkpoint and of its vision tower.
        first_clip: folder of the tower that training begins with; a random tower if `None`.
        num_words: how many of the words for what is in a cell the features are aligned with (`data.Words`).
        begins_with_codes: whether the language model learns from `data.Codes` before it learns from images.
        new_scene: makes a scene of the training data. Its second argument is a scene to have something in common with.
        held_out_scene: makes a scene of the evaluation.
        contents: returns what each patch of a scene's image sees.
        first_checkpoint: folder of the language model that training begins with; a random one if `None`.
    """

    checkpoint: str
    clip: str
    first_clip: Path | None
    num_words: int
    begins_with_codes: bool
    new_scene: NewScene
    held_out_scene: NewScene
    contents: Contents = cells
    first_checkpoint: Path | None = None


def _square_or_not(rng: random.Random, like: Scene | None = None) -> Scene:
    return (random_scene if rng.random() < 0.33 else wide_or_tall_scene)(rng, like)


FAMILIES = {
    "mpt": Family("checkpoint", "clip", None, 2, False, random_scene, random_scene),
    "llama": Family("checkpoint-llama", "clip-llama", HERE / "clip", 4, True, _square_or_not, wide_or_tall_scene),
    "patches": Family(
        "checkpoint-patches",
        "clip-patches",
        None,
        4,
        False,
        _square_or_not,
        wide_or_tall_scene,
        patches,
        HERE / "checkpoint-llama",
    ),
}
