"""Measure captions of a data set against the ways to caption by hand.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/caption.py random-ov

In turns, images per second of: a loop of `generate` over single images, by this package's class and by GenAI's
`VLMPipeline`; GenAI's continuous batching driven by hand; `Captioner`. Captions have `--new-tokens` tokens. Then
memory for a million rows of a simulated source, whose images are only named. Linux; needs the extra `data` and memory
for four copies of the model.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import openvino_genai
from batches import ByHand, line, median, new_image, question_of
from measure import _kilobytes

from optimum_llava_ov import OVModelForLlava
from optimum_llava_ov.captions.captioner import Captioner, Question
from optimum_llava_ov.captions.decoding import decode_ahead
from optimum_llava_ov.captions.items import Item
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.images import DEFAULT_LIMITS, fit_to_model
from optimum_llava_ov.samples.files import question_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=16, help="in each round")
    parser.add_argument("--running", type=int, default=16, help="images in the batch")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the simulated source")
    args = parser.parse_args()

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
        "generate": generate,
        "VLMPipeline": genai,
        "by hand": lambda images: by_hand.run(images, args.new_tokens),
        "Captioner": captions,
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    numbers = itertools.count()
    for number in range(args.rounds + 1):
        for way, run in ways.items():
            images = [new_image(next(numbers)) for _ in range(args.images if number else 1)]
            began = time.perf_counter()
            run(images)
            speed = len(images) / (time.perf_counter() - began)
            print(f"round {number}: {way:12} {speed:.3f} images/s", flush=True)
            if number:  # the first round warms up
                speeds[way].append(speed)

    for way, target in (("generate", 1.9), ("VLMPipeline", 1.9), ("by hand", 1.0)):
        ratio = median([a / b for a, b in zip(speeds["Captioner"], speeds[way])])
        line(f"Captioner / {way}", ratio, f"at least {target}", ratio >= target)

    # Reading is what is measured here. The images are broken, so that nothing is computed.
    broken = (Item(f"{number:09}", b"not an image") for number in range(args.rows))
    decoded = decode_ahead(broken, processor.image_processor, DEFAULT_LIMITS, 0, 2 * args.running)
    questions = (Question(item.key, question, image) for item, image in decoded)
    sizes = []
    for number, _ in enumerate(captioner.captions(questions)):
        if number % (args.rows // 10) == args.rows // 20:
            sizes.append(_kilobytes("self", "status")["RssAnon"] / 1e6)
            print(f"  row {number:9,}: {sizes[-1]:.0f} MB")
    growth = sizes[-1] / sizes[0]
    line(f"memory after {args.rows:,} rows / at their beginning", growth, "at most 1.05", growth <= 1.05)


if __name__ == "__main__":
    main()
