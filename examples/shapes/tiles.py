"""Make a LLaVA-1.6 of the LLaMA: it sees an image squashed and in tiles. Measure what the tiles are good for.

    python examples/shapes/tiles.py train --minutes 3
    python examples/shapes/tiles.py train --minutes 3 --resume --seed 1 --rate 0.3
    python examples/shapes/tiles.py evaluate

The vision tower is the LLaMA's, unchanged. Projector, language model and the row after each row of patches
(`image_newline`) are trained further, on images of three tiles in a row or a column, or of two by two, with shapes
that are as large in a tile as those of the LLaMA in an image. Three of ten prompts have the squashed image alone, so
that the model can also do without tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from data import IGNORED
from families import HERE
from files import write_shards
from optimizer import Optimizers
from torch.nn import functional as F
from train import Clock

from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.image_layout import ImageLayout
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.models.merge import merge_image_features
from optimum_llava_ov.samples.shapes import SMALL_KINDS, Scene, render, small_question, small_scene


logger = logging.getLogger("tiles")
NAME, LLAMA = "checkpoint-tiles", "checkpoint-llama"
TILE = 120  # pixels, as the tower's images
OPTIONS = {
    "_name_or_path": "llava-v1.6-shapes",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [
        [TILE, 2 * TILE],
        [2 * TILE, TILE],
        [2 * TILE, 2 * TILE],
        [3 * TILE, TILE],
        [TILE, 3 * TILE],
    ],
    "mm_patch_merge_type": "spatial_unpad",
}
GRIDS = ((2, 2), (3, 1), (1, 3))  # columns and rows of tiles


@dataclass(frozen=True)
class Image:
    """Hold a scene, the size of its image in pixels, and the tower's features `(tiles, patches, vision_size)`."""

    scene: Scene
    size: tuple[int, int]
    features: torch.Tensor


@dataclass(frozen=True)
class Sample:
    input_ids: list[int]
    labels: list[int]
    kind: str
    image: Image
    has_tiles: bool


class Tiles:
    """Train and evaluate a checkpoint in the format of LLaVA-1.6.

    Args:
        folder: Folder of the checkpoint.
    """

    def __init__(self, folder: Path):
        self.checkpoint = OriginalCheckpoint.open(folder)
        self.model = OriginalLlavaForConditionalGeneration.from_checkpoint(self.checkpoint, torch.float32)
        self.image_processor = build_processor(self.checkpoint).image_processor
        tiling = ImageLayout.of_original(self.checkpoint.config).tiling
        assert tiling is not None
        self.tiling = tiling

    def images(self, number: int, name: str) -> list[Image]:
        """Draw and encode images. The same name always gives the same images."""
        rng = random.Random(name)
        scenes = [small_scene(rng, GRIDS[index % len(GRIDS)], TILE) for index in range(number)]
        return [self._encode(scene) for scene in scenes]

    def _encode(self, scene: Scene) -> Image:
        image = render(scene, oversampling=2)
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        with torch.no_grad():
            return Image(scene, image.size, self.model.image_encoder.features(pixel_values))

    def sample(self, rng: random.Random, image: Image, has_tiles: bool) -> Sample:
        """Ask a question about an image, with its tiles or with the squashed image alone."""
        style, tokenizer = self.checkpoint.choice.conversation, self.checkpoint.tokenizer
        kind, question, answer = small_question(rng, image.scene)
        rows = self.tiling.num_image_tokens(image.size) if has_tiles else self.tiling.tokens_per_tile
        text = style.system.join(style.around_system) + f"{'<image>' * rows}\n{question}".join(style.around_user)
        start = len(text) + len(style.generation_prompt)
        encoded = tokenizer(text + answer.join(style.around_assistant), return_offsets_mapping=True)
        labels = [
            token if start <= first else IGNORED
            for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return Sample(encoded["input_ids"], labels, kind, image, has_tiles)

    def logits(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and labels of the next tokens: `(batch, tokens, vocab_size)` and `(batch, tokens)`."""
        length = max(len(sample.input_ids) for sample in samples)
        ids, mask = torch.zeros(2, len(samples), length, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORED)
        for index, sample in enumerate(samples):
            stop = len(sample.input_ids)
            ids[index, :stop], mask[index, :stop] = torch.tensor(sample.input_ids), 1
            labels[index, :stop] = torch.tensor(sample.labels)
        features = [sample.image.features if sample.has_tiles else sample.image.features[:1] for sample in samples]
        projected = self.model.image_encoder.projector(torch.cat(features)).split([len(tiles) for tiles in features])
        rows = [
            self.tiling.pack(tiles, sample.image.size, self.model.image_newline) if sample.has_tiles else tiles[0]
            for tiles, sample in zip(projected, samples, strict=True)
        ]
        embeds = F.embedding(ids, self.model.embed_tokens.weight)
        embeds = merge_image_features(ids, embeds, rows, self.checkpoint.config.image_token_id)
        return self.model.language_model(embeds, mask).logits[:, :-1], labels[:, 1:]

    def train(self, images: Sequence[Image], minutes: float, rate: float, seed: int, batch_size: int) -> None:
        self.model.train().requires_grad_(True)
        for frozen in (*self.model.image_encoder.features.parameters(), self.model.language_model.lm_head.bias):
            frozen.requires_grad_(False)
        parameters = list(self.model.named_parameters())
        optimizers = Optimizers(parameters, matrix_peak=0.02 * rate, peak=2e-3 * rate, warmup=20)
        rng, clock, average = random.Random(seed), Clock(), None
        for step in itertools.count():
            progress = clock.minutes() / minutes
            if progress >= 1:
                break
            batch = [self.sample(rng, rng.choice(images), rng.random() >= 0.3) for _ in range(batch_size)]
            logits, labels = self.logits(batch)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizers.step(loss, step, progress)
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            if step % 25 == 0:
                logger.info("step %4d  %4.1f min  loss %.4f", step, progress * minutes, average)

    def evaluate(self, number: int, has_tiles: bool) -> dict[str, tuple[int, int]]:
        """Ask a number of questions about held-out images. Return the exact answers and the questions of each kind.

        An answer is exact if each of its tokens is the most likely one after the right tokens before it. These are the
        answers that greedy generation gives.
        """
        self.model.eval()
        images, rng = self.images((number + 1) // 2, "held-out"), random.Random("questions")
        samples = [self.sample(rng, images[index % len(images)], has_tiles) for index in range(number)]
        asked, right = Counter(), Counter()
        for start in range(0, len(samples), 30):
            batch = samples[start : start + 30]
            with torch.no_grad():
                logits, labels = self.logits(batch)
            exact = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1).tolist()
            for sample, is_exact in zip(batch, exact, strict=True):
                asked[sample.kind] += 1
                right[sample.kind] += is_exact
        return {kind: (right[kind], asked[kind]) for kind in SMALL_KINDS}

    def save(self, folder: Path) -> None:
        """Write the checkpoint, with the names and files of the original."""
        config = self.model.config
        tensors = {
            f"model.mm_projector.{name}": p for name, p in self.model.image_encoder.projector.named_parameters()
        }
        tensors |= {name: p for name, p in self.model.language_model.named_parameters() if "lm_head" not in name}
        tables = {
            "model.embed_tokens.weight": self.model.embed_tokens,
            "lm_head.weight": self.model.language_model.lm_head,
        }
        tensors |= {name: module.weight[: config.num_known_tokens] for name, module in tables.items()}
        tensors["model.image_newline"] = self.model.image_newline
        write_shards(folder, {name: tensor.detach().half().clone() for name, tensor in tensors.items()})


def begin(folder: Path) -> None:
    """Write the LLaMA as a checkpoint in the format of LLaVA-1.6, with `image_newline` of zeros."""
    source = HERE / LLAMA
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if "model-" not in file.name and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | OPTIONS
    tensors = OriginalCheckpoint.open(source).tensors()
    tensors["model.image_newline"] = torch.zeros(config["hidden_size"], dtype=torch.float16)
    write_shards(folder, {name: tensor.clone() for name, tensor in tensors.items()})
    if folder.parent.resolve() != HERE:
        config["mm_vision_tower"] = str(HERE / "clip-llama")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def table(tiles: Tiles, number: int) -> str:
    """Measure with and without tiles, and return a table in Markdown."""
    results = [tiles.evaluate(number, has_tiles) for has_tiles in (False, True)]
    lines = ["| kind | questions | squashed image alone | with tiles |", "|---|---|---|---|"]
    for kind in SMALL_KINDS:
        shares = (f"{right / max(1, asked):.1%}" for right, asked in (result[kind] for result in results))
        lines.append(f"| {kind} | {results[0][kind][1]} | {' | '.join(shares)} |")
    totals = (f"{sum(right for right, _ in result.values()) / number:.1%}" for result in results)
    return "\n".join([*lines, f"| **all** | {number} | {' | '.join(totals)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "evaluate"))
    parser.add_argument("--minutes", type=float, default=3, help="minutes of training (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=1200, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=24, help="number of questions in a batch (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.5, help="factor of the learning rates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed; choose another one to resume with other images")
    parser.add_argument("--resume", action="store_true", help="continue to train the model in --output")
    parser.add_argument(
        "--num-questions", type=int, default=300, help="number of questions of the evaluation (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where the checkpoint's folder is (default: here)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(args.seed)
    folder = args.output / NAME
    if args.action == "train":
        if not args.resume:
            begin(folder)
        tiles = Tiles(folder)
        tiles.train(
            tiles.images(args.num_images, f"train/{args.seed}"), args.minutes, args.rate, args.seed, args.batch_size
        )
        tiles.save(folder)
    print(table(Tiles(folder), args.num_questions))


if __name__ == "__main__":
    main()
