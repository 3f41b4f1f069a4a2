"""Train a tiny LLaVA-MPT from scratch on coloured shapes, and write it in the format of the original LLaVA code.

    python examples/shapes/train.py --minutes 25

First, the vision tower learns to recognize the object in each of the nine cells of an image. Then it is frozen, as in
LLaVA's own training, and encodes a pool of images once. Projector and language model learn from new conversations
about these images in each step.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from pathlib import Path

import torch
from data import IGNORED, Conversations, Images, Pool
from files import load, save
from model import IMAGE_SIZE, PATCH_SIZE, VISION_CONFIG, build_model, forward
from optimizer import Optimizers
from tokenizer import build_tokenizer
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration
from optimum_llava_ov.samples.shapes import COLOURS, SHAPES


logger = logging.getLogger("train")


def train_tower(model: LlavaMptForConditionalGeneration, minutes: float, seed: int) -> None:
    """Train the tower to recognize the objects in the cells. The classifier is not kept."""
    tower = model.image_encoder.features
    classifier = nn.Linear(VISION_CONFIG["hidden_size"], len(SHAPES) + 1 + len(COLOURS) + 1)
    optimizers = Optimizers([*tower.named_parameters(), *classifier.named_parameters()], matrix_peak=0.02)
    side, start = IMAGE_SIZE // PATCH_SIZE, time.time()
    for step, (pixel_values, shapes, colours) in enumerate(Images(48, seed)):
        progress = (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        grid = tower(pixel_values).transpose(1, 2).unflatten(2, (side, side))
        logits = classifier(F.avg_pool2d(grid, side // 3).flatten(2).transpose(1, 2))
        shape_logits, colour_logits = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
        loss = F.cross_entropy(shape_logits.flatten(0, 1), shapes.flatten())
        loss = loss + F.cross_entropy(colour_logits.flatten(0, 1), colours.flatten())
        optimizers.step(loss, step, progress)
        if step % 50 == 0:
            right = (shape_logits.argmax(-1) == shapes) & (colour_logits.argmax(-1) == colours)
            objects = right[shapes > 0].float().mean()
            logger.info(
                "tower %4d  %4.1f min  loss %.4f  objects %.3f", step, progress * minutes, loss.item(), objects
            )


def train(
    model: LlavaMptForConditionalGeneration,
    tokenizer: Tokenizer,
    pool: Pool,
    minutes: float,
    batch_size: int,
    seed: int,
    start_lesson: float = 0.0,
    rate: float = 1.0,
) -> None:
    """Train projector and language model on the tokens of the assistant's turns.

    Args:
        start_lesson: 0 begins with single objects. 1 begins with all conversations, for a model that was trained
            before.
        rate: Factor of the learning rates.
    """
    named = [*model.language_model.named_parameters(), *model.image_encoder.projector.named_parameters()]
    optimizers = Optimizers(named, matrix_peak=0.02 * rate, peak=2e-3 * rate)
    # The model learns to read an image from single objects, within minutes. Then it learns to find the right object
    # among several, and then to compare images. If it begins with all conversations, it does not learn to read images.
    lessons = [
        (0.05, iter(Conversations(tokenizer, pool.simple(1), batch_size, seed, one_image=True, max_turns=4))),
        (0.12, iter(Conversations(tokenizer, pool.simple(2), batch_size, seed, one_image=True, max_turns=4))),
        (0.35, iter(Conversations(tokenizer, pool, batch_size, seed, one_image=True))),
        (1.00, iter(Conversations(tokenizer, pool, batch_size, seed))),
    ]
    start, average = time.time(), None
    for step in itertools.count():
        progress = (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        batch = next(next(lesson for until, lesson in lessons if max(progress, start_lesson) <= until))
        labels, words = batch.pop("labels")[:, 1:], batch.pop("words")
        logits = forward(model, **batch)
        # Align the features of a cell with its words, as LLaVA's first stage does. Then a word of the question attends
        # to the same word in the image, and the model soon learns to find the right cell.
        cells = model.image_encoder.projector(batch["features"]) @ model.language_model.lm_head.weight.T
        alignment = sum(
            F.cross_entropy(cells.flatten(0, 1), words[..., i].flatten(), ignore_index=IGNORED) for i in (0, 1)
        )
        logits = logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizers.step(loss + 0.3 * alignment, step, progress)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 0:
            right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
            logger.info(
                "step %5d  %4.1f min  loss %.4f  tokens %.4f  alignment %.3f",
                step,
                progress * minutes,
                average,
                right,
                alignment,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=25, help="minutes of training of the language model (default: %(default)s)"
    )
    parser.add_argument(
        "--tower-minutes",
        type=float,
        default=3,
        help="minutes of training of the tower before that (default: %(default)s)",
    )
    parser.add_argument("--num-pairs", type=int, default=8000, help="number of pairs of images (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=24, help="number of conversations in a batch (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed; choose another one to resume with other conversations"
    )
    parser.add_argument("--resume", action="store_true", help="continue to train the model in --output")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        help="where to write checkpoint/ and clip/ (default: here)",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(args.seed)
    if args.resume:
        model, tokenizer = load(args.output)
    else:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%d tokens, %.2f M parameters", tokenizer.get_vocab_size(), num_parameters / 1e6)
        train_tower(model, args.tower_minutes, args.seed)
    pool = Pool(model.image_encoder.features, args.num_pairs, args.seed)
    train(
        model,
        tokenizer,
        pool,
        args.minutes,
        args.batch_size,
        args.seed,
        start_lesson=float(args.resume),
        rate=args.rate,
    )
    save(model, tokenizer, args.output)
    logger.info("Wrote the model to %s", args.output)


if __name__ == "__main__":
    main()
