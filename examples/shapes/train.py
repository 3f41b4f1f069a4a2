"""Train a tiny LLaVA from scratch on coloured shapes, and write its weights in the format of the original LLaVA code.

    python examples/shapes/train.py --family mpt --minutes 25

First, the vision tower learns to recognize the object that each patch of an image sees. Then it is frozen, as in
LLaVA's own training, and encodes a pool of images once. Projector and language model learn from new conversations
about these images in each step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import time
from pathlib import Path

import torch
from data import IGNORED, Codes, Contents, Conversations, Images, Pool, code
from families import FAMILIES, HERE
from files import copy_settings, load, save
from model import begin_with_words, build_model, forward, project_words, read_codes
from optimizer import Optimizers
from torch import nn
from torch.nn import functional as F

from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.samples.shapes import COLOURS, PLACES, SHAPES


logger = logging.getLogger("train")


class Clock:
    """Count minutes of work since it was made. What other programs take from the processor does not count."""

    def __init__(self):
        self.start = time.process_time()

    def minutes(self) -> float:
        return (time.process_time() - self.start) / torch.get_num_threads() / 60


def train_tower(model: OriginalLlavaForConditionalGeneration, images: Images, minutes: float, rate: float) -> None:
    """Train the tower to recognize the object that each patch sees, and its place. The classifier is not kept.

    Args:
        rate: Factor of the learning rates.
    """
    tower = model.image_encoder.features.train().requires_grad_(True)
    sizes = [len(SHAPES) + 1, len(COLOURS) + 1, len(PLACES)]
    classifier = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))
    named = [*tower.named_parameters(), *classifier.named_parameters()]
    optimizers = Optimizers(named, matrix_peak=0.02 * rate, peak=1e-3 * rate)
    clock = Clock()
    for step, (pixel_values, contents) in enumerate(images):
        progress = clock.minutes() / minutes
        if progress >= 1:
            break
        logits, targets = classifier(tower(pixel_values)).flatten(0, 1).split(sizes, dim=-1), contents.flatten(0, 1)
        loss = sum(F.cross_entropy(logits[i], targets[:, i], ignore_index=IGNORED) for i in range(3))
        optimizers.step(loss, step, progress)
        if step % 50 == 0:
            right = torch.stack([logits[i].argmax(-1) == targets[:, i] for i in range(3)]).all(0)
            objects = right[targets[:, 0] > 0].float().mean()
            logger.info(
                "tower %4d  %4.1f min  loss %.4f  objects %.3f", step, progress * minutes, loss.item(), objects
            )


def train(
    model: OriginalLlavaForConditionalGeneration,
    checkpoint: OriginalCheckpoint,
    contents: Contents,
    pool: Pool | Codes,
    minutes: float,
    batch_size: int,
    seed: int,
    num_words: int,
    start_lesson: float = 0.0,
    rate: float = 1.0,
    fewest_patches: int | None = None,
) -> None:
    """Train projector and language model on the tokens of the assistant's turns.

    Args:
        contents: Returns what each patch of a scene's image sees.
        num_words: How many of the words of `data.Words` the features of a patch are aligned with.
        start_lesson: 0 begins with single objects. 1 begins with all conversations, for a model that was trained
            before.
        rate: Factor of the learning rates.
        fewest_patches: See `Conversations`.
    """
    model.train().requires_grad_(True)
    for frozen in (model.image_encoder.features, model.language_model.lm_head.bias, model.image_encoder.borders):
        if frozen is not None:
            frozen.requires_grad_(False)
    optimizers = Optimizers(list(model.named_parameters()), matrix_peak=0.02 * rate, peak=2e-3 * rate)
    vision = checkpoint.config.vision_config
    image_length = (vision.image_size // vision.patch_size) ** 2 + checkpoint.config.num_border_tokens
    make = functools.partial(
        Conversations,
        checkpoint.tokenizer,
        checkpoint.choice.conversation,
        image_length,
        contents,
        fewest_patches=fewest_patches,
    )
    # The model learns to read an image from single objects, within minutes. Then it learns to find the right object
    # among several, and then to compare images. If it begins with all conversations, it does not learn to read images.
    lessons = [
        (0.05, iter(make(pool.simple(1), batch_size, seed, one_image=True, max_turns=4))),
        (0.12, iter(make(pool.simple(2), batch_size, seed, one_image=True, max_turns=4))),
        (0.35, iter(make(pool, batch_size, seed, one_image=True))),
        (1.00, iter(make(pool, batch_size, seed))),
    ]
    num_shared = make(pool, batch_size, seed).num_shared
    clock, average = Clock(), None
    for step in itertools.count():
        progress = clock.minutes() / minutes
        if progress >= 1:
            break
        batch = next(next(lesson for until, lesson in lessons if max(progress, start_lesson) <= until))
        labels, words = batch.pop("labels")[:, num_shared + 1 :], batch.pop("words")
        logits, patches = forward(model, **batch, num_shared=num_shared)
        # Align the features of a patch with its words, as LLaVA's first stage does. Then a word of the question
        # attends to the same word in the image, and the model soon learns to find the right patch.
        alignment = sum(
            F.cross_entropy(patches.flatten(0, 1), words[..., i].flatten(), ignore_index=IGNORED)
            for i in range(num_words)
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
    parser.add_argument("--family", choices=FAMILIES, default="mpt", help="language model (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=25, help="minutes of training of the language model (default: %(default)s)"
    )
    parser.add_argument(
        "--tower-minutes",
        type=float,
        help="minutes of training of the tower before that (default: 3, or none with --resume)",
    )
    parser.add_argument(
        "--fewest-patches",
        type=int,
        metavar="N",
        help="leave out random patches in two of three batches, down to N (default: keep all)",
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
        "--output", type=Path, default=HERE, help="where to write checkpoint and vision tower (default: here)"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(args.seed)
    family = FAMILIES[args.family]
    checkpoint = copy_settings(family, args.output)
    processor = build_processor(checkpoint).image_processor
    if args.resume:
        model = load(checkpoint)
    else:
        model = build_model(checkpoint, family.first_clip)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%d tokens, %.2f M parameters", checkpoint.config.vocab_size, num_parameters / 1e6)
    tower_minutes = (0 if args.resume else 3) if args.tower_minutes is None else args.tower_minutes
    if tower_minutes:
        images = Images(processor, family.new_scene, family.contents, 48, args.seed)
        train_tower(model, images, tower_minutes, rate=0.5 if family.first_clip or args.resume else 1.0)
    features = model.image_encoder.features.requires_grad_(False)
    pool = Pool(features, processor, family.new_scene, args.num_pairs, args.seed)
    run = functools.partial(
        train,
        model,
        checkpoint,
        family.contents,
        minutes=args.minutes,
        batch_size=args.batch_size,
        seed=args.seed,
        num_words=family.num_words,
        rate=args.rate,
        fewest_patches=args.fewest_patches,
    )

    def read_as_codes() -> None:
        codes = code(torch.stack([family.contents(scene) for scene in pool.scenes()]))
        error = read_codes(model, pool.features, codes)
        logger.info("The features are read as codes with an error of %.3f", error)

    if family.begins_with_codes and not args.resume:
        codes = Codes(pool.features.shape[-1])
        begin_with_words(model, checkpoint.tokenizer)
        run(codes)
        read_as_codes()
    else:
        if family.first_checkpoint is not None and not args.resume:
            first = load(OriginalCheckpoint.open(family.first_checkpoint))
            model.language_model, model.embed_tokens = first.language_model, first.embed_tokens
            project_words(model, checkpoint.tokenizer)
            read_as_codes()
        run(pool, start_lesson=float(args.resume))
    save(model, family, args.output)
    logger.info("Wrote the model to %s", args.output)


if __name__ == "__main__":
    main()
