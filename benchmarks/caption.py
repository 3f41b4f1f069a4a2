"""Measure captions of a data set against the ways to caption by hand.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/caption.py random-ov

In turns, images per second of: a loop of `generate` over single images, by this package's class and by GenAI's
`VLMPipeline`; GenAI's continuous batching driven by hand; `Captioner`. The loops caption fewer images, because their
speed does not depend on the number. Captions have `--new-tokens` tokens. `--rounds 0` leaves this out.

Then memory for a million rows of a simulated source, written to parts as the command does it. One of a hundred is an
image; the others are broken, because real ones would take days. Use a tiny model. `--rows 0` leaves this out.
Linux; needs the extra `data` and memory for four copies of the model.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openvino_genai
from batches import ByHand, line, median, new_image, parse, question_of
from measure import _kilobytes

from optimum_llava_ov import OVModelForLlava
from optimum_llava_ov.captions.captioner import Captioner, Question
from optimum_llava_ov.captions.items import Item
from optimum_llava_ov.captions.job import Job, run_job
from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.images import fit_to_model
from optimum_llava_ov.samples.files import question_inputs


def measure_speed(args: argparse.Namespace) -> None:
    question = question_of(args.bundle, args.prompt_tokens)
    model = OVModelForLlava.from_pretrained(args.bundle)
    lone = openvino_genai.VLMPipeline(args.bundle, "CPU")
    by_hand = ByHand(args.bundle, question, args.running)
    captioner = Captioner(str(args.bundle), question, args.new_tokens, running=args.running, ignore_eos=True)
    processor = by_hand.processor

    def seen(image):
        return fit_to_model(image, processor.image_processor)

    def generate(images):
        for image in images:
            inputs = question_inputs(processor, question, [image])
            model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens, eos_token_id=None)

    def genai(images):
        for image in images:
            tensor = image_tensor(seen(image), processor)
            lone.generate(question, images=[tensor], max_new_tokens=args.new_tokens, ignore_eos=True)

    def captions(images):
        questions = (Question(str(number), question, seen(image)) for number, image in enumerate(images))
        assert all(caption.tokens == args.new_tokens for _, caption in captioner.captions(questions))

    ways = {
        "generate": (generate, args.loop_images),
        "VLMPipeline": (genai, args.loop_images),
        "by hand": (lambda images: by_hand.run(images, args.new_tokens), args.images),
        "Captioner": (captions, args.images),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    numbers = itertools.count()
    for number in range(args.rounds + 1):
        for way, (run, size) in ways.items():
            images = [new_image(next(numbers)) for _ in range(size if number else 1)]
            began = time.perf_counter()
            run(images)
            speed = len(images) / (time.perf_counter() - began)
            print(f"round {number}: {way:12} {speed:.3f} images/s", flush=True)
            if number:  # the first round warms up
                speeds[way].append(speed)

    for way, target in (("generate", 1.9), ("VLMPipeline", 1.9), ("by hand", 1.0)):
        ratio = median([a / b for a, b in zip(speeds["Captioner"], speeds[way])])
        line(f"Captioner / {way}", ratio, f"at least {target}", ratio >= target)


@dataclass(frozen=True)
class Simulated(Source):
    """Rows that are made when they are needed."""

    rows: int = 0

    @property
    def is_on_hub(self) -> bool:
        return False

    def items(self) -> Iterator[Item]:
        buffer = io.BytesIO()
        new_image(0).save(buffer, format="PNG")
        image = buffer.getvalue()
        for number in range(self.rows):
            yield Item(f"{number:09}", b"not an image" if number % 100 else image)


def measure_memory(args: argparse.Namespace) -> None:
    captioner = Captioner(str(args.bundle), max_new_tokens=8, running=args.running, ignore_eos=True)
    samples: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Simulated("simulated", rows=args.rows), Path(folder) / "captions.jsonl", captioner, workers=0)
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(0.2):
                rows = job.rows_per_part * sum(1 for _ in job.output.glob("part-*"))
                samples.append((rows, _kilobytes("self", "status")["RssAnon"] / 1e6))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            print(run_job(job))
        finally:
            ended.set()
            sampler.join()
    captioner.close()
    tenths = [[size for rows, size in samples if rows * 10 // args.rows == tenth] for tenth in range(10)]
    for tenth, sizes in enumerate(tenths):
        print(f"  rows {tenth * args.rows // 10:9,} and after: {median(sizes):.0f} MB")
    growth = median(tenths[-1]) / median(tenths[0])
    line(f"memory of the last tenth of {args.rows:,} rows / of the first", growth, "at most 1.05", growth <= 1.05)


def main() -> None:
    args = parse(
        __doc__,
        ("--images", 32, "in each round of a way with a batch"),
        ("--loop-images", 8, "in each round of a loop"),
        ("--running", 16, "images in the batch"),
        ("--rows", 1_000_000, "of the simulated source"),
    )
    if args.rounds:
        measure_speed(args)
    if args.rows:
        measure_memory(args)


if __name__ == "__main__":
    main()
