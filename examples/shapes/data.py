"""Generate the training data of the example models: images, and conversations about them."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.conversation import Conversation
from optimum_llava_ov.samples.shapes import (
    COLOURS,
    PLACES,
    SHAPES,
    Object,
    Scene,
    Turn,
    conversation,
    random_scene,
    render,
)


IGNORED = -100
NewScene = Callable[[random.Random, Scene | None], Scene]
# Returns `(patches, 3)`: what each patch of an image sees, as `cells` and `patches` do
Contents = Callable[[Scene], torch.Tensor]


def cells(scene: Scene) -> torch.Tensor:
    """Return `(9, 3)` indices of shape, colour and place in each cell. Shape and colour are 0 if it is empty."""
    indices = torch.zeros(9, 3, dtype=torch.long)
    indices[:, 2] = torch.arange(9)
    for item in scene.objects:
        indices[item.cell] = _indices(item)
    return indices


def patches(scene: Scene, side: int = 8, pixels: int = 12) -> torch.Tensor:
    """Return `(side * side, 3)` indices of shape, colour and place of the object that each patch sees.

    Shape and colour are 0 and the place is `IGNORED` where there is only background. An object is seen in the patches
    of which it covers a tenth, and in the one of which it covers most. The image is padded to a square.

    Args:
        pixels: height and width of a patch in the drawing that is measured.
    """
    longer = max(scene.width, scene.height)
    width, height = (round(size * side * pixels / longer) for size in (scene.width, scene.height))
    # Each object has its number as colour
    numbered = tuple(replace(item, rgb=(i, i, i)) for i, item in enumerate(scene.objects, 1))
    drawing = render(replace(scene, objects=numbered, background=(0, 0, 0)), (width, height), oversampling=1)
    square = np.zeros((side * pixels, side * pixels), np.uint8)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = np.asarray(drawing)[..., 0]
    parts = square.reshape(side, pixels, side, pixels).swapaxes(1, 2).reshape(side * side, -1)
    shares = np.stack([(parts == i).mean(1) for i in range(1, len(numbered) + 1)], axis=1)
    shares[shares.argmax(0), np.arange(len(numbered))] += 1
    seen = torch.from_numpy(np.where(shares.max(1) >= 0.1, shares.argmax(1), len(numbered)))
    return torch.stack([*(_indices(item) for item in scene.objects), torch.tensor([0, 0, IGNORED])])[seen]


def _indices(item: Object) -> torch.Tensor:
    return torch.tensor([SHAPES.index(item.shape) + 1, list(COLOURS).index(item.colour) + 1, item.cell])


class Images:
    """Yield endless batches of images, and what their patches see, `(batch, patches, 3)`."""

    def __init__(
        self, processor: BaseImageProcessor, new_scene: NewScene, contents: Contents, batch_size: int, seed: int
    ):
        self.processor, self.new_scene, self.contents = processor, new_scene, contents
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = random.Random(f"pictures/{self.seed}")
        while True:
            scenes = [self.new_scene(rng, None) for _ in range(self.batch_size)]
            yield preprocess(self.processor, scenes), torch.stack([self.contents(scene) for scene in scenes])


class Pool:
    """Keep pairs of encoded images. The second image of a pair has something in common with the first.

    Args:
        tower: Maps `(images, 3, height, width)` to `(images, patches, vision_size)`.
        num_pairs: Number of pairs.
    """

    def __init__(
        self, tower: nn.Module, processor: BaseImageProcessor, new_scene: NewScene, num_pairs: int, seed: int
    ):
        rng = random.Random(f"pool/{seed}")
        self.pairs, features = [], []
        for _ in tqdm(range(0, num_pairs, 32), desc="Encoding images"):
            firsts = [new_scene(rng, None) for _ in range(32)]
            pairs = [(first, new_scene(rng, first)) for first in firsts]
            self.pairs += pairs
            with torch.no_grad():
                features.append(tower(preprocess(processor, [scene for pair in pairs for scene in pair])))
        self.features = torch.cat(features)
        self._all_pairs = self.pairs
        self._index = {id(scene): index for index, scene in enumerate(self.scenes())}

    def scenes(self) -> list[Scene]:
        """Return the scenes in the order of `features`."""
        return [scene for pair in self._all_pairs for scene in pair]

    def simple(self, max_objects: int) -> Pool:
        """Return the same pool without images that have more objects."""
        pool = copy.copy(self)
        pool.pairs = [pair for pair in self.pairs if pair[0].count() <= max_objects]
        return pool

    def new_scene(self, rng: random.Random, like: Scene | None) -> Scene:
        return rng.choice(self.pairs)[0] if like is None else self._all_pairs[self._index[id(like)] // 2][1]

    def features_of(self, scenes: list[Scene]) -> torch.Tensor:
        return self.features[[self._index[id(scene)] for scene in scenes]]


class Codes:
    """Stand in for a pool before there is a tower: what is in a cell, as 22 numbers, in place of its patch's features.

    No image is drawn and encoded, so that every scene is new and costs nothing.
    """

    def __init__(self, vision_size: int, max_objects: int = 9):
        self.vision_size, self.max_objects = vision_size, max_objects

    def simple(self, max_objects: int) -> Codes:
        """Return codes of scenes that have no more objects."""
        return Codes(self.vision_size, max_objects)

    def new_scene(self, rng: random.Random, like: Scene | None) -> Scene:
        while (scene := random_scene(rng, like)).count() > self.max_objects:
            pass
        return scene

    def features_of(self, scenes: list[Scene]) -> torch.Tensor:
        """Return `(scenes, 9, vision_size)` with noise, so that the model can bear that of a tower."""
        codes = code(torch.stack([cells(scene) for scene in scenes]))
        codes = codes + 0.15 * torch.randn_like(codes)
        return nn.functional.pad(codes, (0, self.vision_size - codes.shape[-1]))


def code(contents: torch.Tensor) -> torch.Tensor:
    """Return `(..., patches, 22)`: shape, colour and place that each patch sees, each as one-hot numbers."""
    shapes, colours, places = contents.unbind(-1)
    one_hot = nn.functional.one_hot
    # Numbers of places begin after that of none
    places = one_hot((places + 1).clamp(0), len(PLACES) + 1)[..., 1:]
    return torch.cat([one_hot(shapes, len(SHAPES) + 1), one_hot(colours, len(COLOURS) + 1), places], -1).float()


class Conversations:
    """Yield endless batches of new conversations: `input_ids`, `attention_mask`, `labels`, and image `features`.

    Prompts are those of the chat template. In one of ten turns with an image, the image comes after the question.

    Args:
        fewest_patches: Two of three batches have images of which patches are left out at random, down to this number
            (PatchDropout, https://arxiv.org/abs/2208.07220). `None` keeps all.

    Attributes:
        num_shared: number of tokens that all sequences begin with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        style: Conversation,
        image_length: int,
        contents: Contents,
        pool: Pool | Codes,
        batch_size: int,
        seed: int,
        one_image: bool = False,
        max_turns: int = 6,
        fewest_patches: int | None = None,
    ):
        self.tokenizer, self.style, self.image_length = tokenizer, style, image_length
        self.fewest_patches = image_length if fewest_patches is None else fewest_patches
        self.pool, self.batch_size, self.seed = pool, batch_size, seed
        self.one_image, self.max_turns, self.words, self.contents = one_image, max_turns, Words(tokenizer), contents
        self.num_shared = len(tokenizer(style.system.join(style.around_system).rstrip())["input_ids"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in itertools.count():
            rng = random.Random(index)
            length = rng.choice((self.image_length, *[rng.randint(self.fewest_patches, self.image_length)] * 2))
            # Sort a larger set, so that the sequences of a batch have about the same length
            samples = [
                self._sample(f"train/{self.seed}/{self.one_image}/{index}/{number}", "<image>" * length)
                for number in range(self.batch_size * 8)
            ]
            samples.sort(key=lambda sample: len(sample[0]))
            batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
            rng.shuffle(batches)
            yield from (self._collate(batch, length) for batch in batches)

    def _sample(self, name: str, image_text: str) -> tuple[list[int], list[int], list[Scene]]:
        rng = random.Random(f"{name}/layout")
        turns = conversation(name, self.max_turns, self.one_image, self.pool.new_scene)
        text, answers = self.style.system.join(self.style.around_system), []
        for turn in turns:
            text += self._question(turn, image_text, images_last=rng.random() < 0.1)
            answer = turn.answer.join(self.style.around_assistant)
            # The tokens that the model writes after the generation prompt
            answers.append((len(text) + len(self.style.generation_prompt), len(text) + len(answer)))
            text += answer
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        labels = [
            token if any(start <= first and last <= end for start, end in answers) else IGNORED
            for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return encoded["input_ids"], labels, [scene for turn in turns for scene in turn.scenes]

    def _question(self, turn: Turn, image_text: str, images_last: bool) -> str:
        images = [image_text] * len(turn.scenes)
        parts = [turn.question, *images] if images_last else [*images, turn.question]
        return "\n".join(parts).join(self.style.around_user)

    def _collate(
        self, samples: list[tuple[list[int], list[int], list[Scene]]], image_length: int
    ) -> dict[str, torch.Tensor]:
        length = max(len(sample[0]) for sample in samples)
        input_ids = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORED)
        attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
        for index, (ids, targets, _) in enumerate(samples):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(targets)
            attention_mask[index, : len(ids)] = 1
        scenes = [scene for sample in samples for scene in sample[2]]
        contents = torch.stack([self.contents(scene) for scene in scenes])
        features, words = self.pool.features_of(scenes), torch.stack([self.words.of(image) for image in contents])
        if image_length < self.image_length:
            kept = some_patches(contents, image_length).unsqueeze(-1)
            features, words = (torch.take_along_dim(values, kept, dim=1) for values in (features, words))
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "features": features,
            "words": words,
        }


def some_patches(contents: torch.Tensor, number: int) -> torch.Tensor:
    """Return sorted indices `(images, number)` of random patches, with one of each object at least.

    In each image, patches of objects are more, or less, likely than background.

    Args:
        contents: `(images, patches, 3)`, what each patch sees.
    """
    order = torch.rand(contents.shape[:2]) + 1
    places = contents[..., 2].masked_fill(contents[..., 0] == 0, IGNORED)
    order += (places != IGNORED) * (2 * torch.rand(len(contents), 1) - 1)
    for place in range(len(PLACES)):
        sees = places == place
        order += 2 * (sees & (order == order.masked_fill(~sees, -1).amax(1, keepdim=True)))
    return order.topk(number, dim=1).indices.sort(dim=1).values


class Words:
    """Find the tokens of the words that tell what a patch sees: its shape and colour, and up to two for its place.

    They are tokens of words after a space, as in a sentence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.shapes, self.colours = (
            [IGNORED] + [self._id(tokenizer, name) for name in names] for names in (SHAPES, COLOURS)
        )
        named = [[word for word in place.split() if word not in ("at", "on", "in", "the")] for place in PLACES]
        self.places = [[self._id(tokenizer, word) for word in words] for words in named]

    def _id(self, tokenizer: PreTrainedTokenizerFast, word: str) -> int:
        return tokenizer(f"a {word}")["input_ids"][-1]

    def of(self, contents: torch.Tensor) -> torch.Tensor:
        """Return `(patches, 4)` tokens, `IGNORED` where there is no word."""
        places = {IGNORED: [IGNORED, IGNORED], **dict(enumerate(self.places))}
        rows = [
            [self.shapes[shape], self.colours[colour], *places[place], IGNORED][:4]
            for shape, colour, place in contents.tolist()
        ]
        return torch.tensor(rows)


def preprocess(processor: BaseImageProcessor, scenes: list[Scene]) -> torch.Tensor:
    # One by one, because images have different sizes. Oversampling of 2 instead of 3 is faster, and as good at this
    # size.
    images = [processor(render(scene, oversampling=2), return_tensors="pt")["pixel_values"] for scene in scenes]
    return torch.cat(images).float()
