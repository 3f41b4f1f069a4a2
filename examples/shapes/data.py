"""Generate the training data of the example model: images, and conversations about them."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from model import IMAGE_SIZE, PATCH_SIZE, PREPROCESSOR
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov.samples.shapes import (
    COLOURS,
    SHAPES,
    SYSTEM_TURN,
    Scene,
    assistant_turn,
    conversation,
    random_scene,
    render,
    user_turn,
)


IGNORED = -100


class Images:
    """Yield endless batches of images, and the shapes and colours in their cells: `(batch, 9)` indices, 0 for none."""

    def __init__(self, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.processor = CLIPImageProcessorPil(**PREPROCESSOR)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        rng = random.Random(f"pictures/{self.seed}")
        while True:
            scenes = [random_scene(rng) for _ in range(self.batch_size)]
            shapes, colours = torch.zeros(2, self.batch_size, 9, dtype=torch.long)
            for index, scene in enumerate(scenes):
                for item in scene.objects:
                    shapes[index, item.cell] = SHAPES.index(item.shape) + 1
                    colours[index, item.cell] = list(COLOURS).index(item.colour) + 1
            yield preprocess(self.processor, scenes), shapes, colours


class Pool:
    """Keep pairs of encoded images. The second image of a pair has something in common with the first.

    Args:
        tower: Maps `(images, 3, height, width)` to `(images, patches, vision_size)`.
        num_pairs: Number of pairs.
    """

    def __init__(self, tower: nn.Module, num_pairs: int, seed: int):
        rng, processor = random.Random(f"pool/{seed}"), CLIPImageProcessorPil(**PREPROCESSOR)
        self.pairs, features = [], []
        for _ in tqdm(range(0, num_pairs, 32), desc="Encoding images"):
            firsts = [random_scene(rng) for _ in range(32)]
            pairs = [(first, random_scene(rng, first)) for first in firsts]
            self.pairs += pairs
            with torch.no_grad():
                features.append(tower(preprocess(processor, [scene for pair in pairs for scene in pair])))
        self.features = torch.cat(features)
        self._all_pairs = self.pairs
        self._index = {id(scene): index for index, scene in enumerate(scene for pair in self.pairs for scene in pair)}

    def simple(self, max_objects: int) -> Pool:
        """Return the same pool without images that have more objects."""
        pool = copy.copy(self)
        pool.pairs = [pair for pair in self.pairs if pair[0].count() <= max_objects]
        return pool

    def new_scene(self, rng: random.Random, like: Scene | None) -> Scene:
        return rng.choice(self.pairs)[0] if like is None else self._all_pairs[self._index[id(like)] // 2][1]

    def features_of(self, scenes: list[Scene]) -> torch.Tensor:
        return self.features[[self._index[id(scene)] for scene in scenes]]


class Conversations:
    """Yield endless batches of new conversations: `input_ids`, `attention_mask`, `labels`, and image `features`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pool: Pool,
        batch_size: int,
        seed: int,
        one_image: bool = False,
        max_turns: int = 6,
    ):
        self.tokenizer, self.pool, self.batch_size, self.seed = tokenizer, pool, batch_size, seed
        self.one_image, self.max_turns = one_image, max_turns
        self.image_token_id = tokenizer.get_vocab_size()
        self.image_length = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 2
        self._encode = functools.cache(self._encode_text)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in itertools.count():
            # Sort a larger set, so that the sequences of a batch have about the same length
            samples = [
                self._sample(f"train/{self.seed}/{self.one_image}/{index}/{number}")
                for number in range(self.batch_size * 8)
            ]
            samples.sort(key=lambda sample: len(sample[0]))
            batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
            random.Random(index).shuffle(batches)
            yield from map(self._collate, batches)

    def _sample(self, name: str) -> tuple[list[int], list[int], list[Scene]]:
        rng = random.Random(f"{name}/layout")
        input_ids = list(self._encode(SYSTEM_TURN))
        labels = [IGNORED] * len(input_ids)
        scenes: list[Scene] = []
        for turn in conversation(name, self.max_turns, self.one_image, self.pool.new_scene):
            user = self._encode(user_turn(turn.question, len(turn.scenes), images_last=rng.random() < 0.1))
            answer = self._encode(assistant_turn(turn.answer))
            input_ids += user + answer
            labels += [IGNORED] * len(user) + answer
            scenes += turn.scenes
        return input_ids, labels, scenes

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split("<image>")):
            ids += [self.image_token_id] * self.image_length if index else []
            ids += self.tokenizer.encode(part).ids
        return ids

    def _collate(self, samples: list[tuple[list[int], list[int], list[Scene]]]) -> dict[str, torch.Tensor]:
        length = max(len(sample[0]) for sample in samples)
        input_ids = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORED)
        attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
        for index, (ids, targets, _) in enumerate(samples):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(targets)
            attention_mask[index, : len(ids)] = 1
        scenes = [scene for sample in samples for scene in sample[2]]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "features": self.pool.features_of(scenes),
            "words": torch.stack([self._words(scene) for scene in scenes]),
        }

    def _words(self, scene: Scene) -> torch.Tensor:
        """Return `(9, 2)` tokens: the words for colour and shape of the object in each cell."""
        words = torch.full((9, 2), IGNORED)
        for item in scene.objects:
            words[item.cell] = torch.tensor([self._encode(f" {name}")[-1] for name in (item.colour, item.shape)])
        return words


def preprocess(processor: CLIPImageProcessorPil, scenes: list[Scene]) -> torch.Tensor:
    # One by one, because images have different sizes. Oversampling of 2 instead of 3 is faster, and as good at this
    # size.
    images = [processor(render(scene, oversampling=2), return_tensors="np")["pixel_values"][0] for scene in scenes]
    return torch.from_numpy(np.stack(images)).float()
