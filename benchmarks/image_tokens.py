"""Measure what fewer tokens for an image cost: exact answers of a shapes model, by number of tokens and method.

    python benchmarks/image_tokens.py [--family llama|mpt] [--num 100] [--merge 9 8 7 6 5 4 3] [--pool 4 1]

Each setting is the torch model with that reduction in its image encoder, asked in the same held-out conversations. The
images of these models have 9 patches. The result is printed as a table, by kind of question.

    python benchmarks/image_tokens.py --bundles BUNDLE FEWER_TOKENS [--repeats 5]

asks bundles about new images, in turns, and prints the times to the first token and their ratio to the first bundle:

    python benchmarks/random_checkpoint.py random --family llama --size 7b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 all-ov
    optimum-cli export openvino --model random/checkpoint --weight-format int4 --image-tokens 144 fewer-ov
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from contenders.__main__ import random_image
from engines import SQUARE
from machine import machine
from transformers import AutoProcessor


SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

from evaluate import TorchChat, evaluate  # noqa: E402
from families import FAMILIES  # noqa: E402

from optimum_llava_ov import OVModelForLlava  # noqa: E402
from optimum_llava_ov.checkpoint.image_tokens import METHODS  # noqa: E402
from optimum_llava_ov.samples.shapes import KINDS, held_out  # noqa: E402


def print_times(bundles: list[Path], repeats: int) -> None:
    """Print medians of the time to the first token, images and text included."""
    models = {
        bundle: (OVModelForLlava.from_pretrained(bundle), AutoProcessor.from_pretrained(bundle)) for bundle in bundles
    }
    times: dict[Path, list[float]] = {bundle: [] for bundle in bundles}
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture, and which colours has it?"}]
    for number in range(repeats + 1):
        image = random_image(number, SQUARE)
        for bundle, (model, processor) in models.items():
            started = time.perf_counter()
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            times[bundle].append(time.perf_counter() - started)
            tokens = inputs["input_ids"].shape[1]
            print(f"{bundle}: {tokens} tokens, first token {times[bundle][-1]:.3f} s", flush=True)
    medians = {bundle: statistics.median(of_bundle[1:]) for bundle, of_bundle in times.items()}
    for bundle, median in medians.items():
        print(f"{bundle}: median {median:.3f} s, ratio {median / medians[bundles[0]]:.3f}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--num", type=int, default=100, help="number of conversations")
    for method, default in zip(METHODS, ([9, 8, 7, 6, 5, 4, 3], [4, 1])):
        parser.add_argument(f"--{method}", nargs="*", type=int, default=default, help="numbers of tokens")
    parser.add_argument("--bundles", nargs="+", type=Path, help="measure the time to the first token instead")
    parser.add_argument("--repeats", type=int, default=5, help="number of images after the first")
    arguments = parser.parse_args()

    if arguments.bundles:
        print(machine())
        print_times(arguments.bundles, arguments.repeats)
        return
    family = FAMILIES[arguments.family]
    print(f"| method | tokens | {' | '.join(KINDS)} | **all** |\n|{' --- |' * (len(KINDS) + 3)}", flush=True)
    for method in METHODS:
        for count in getattr(arguments, method):
            chat = TorchChat(SHAPES / family.checkpoint, image_tokens=count, image_token_method=method)
            conversations = held_out(arguments.num, 0, family.held_out_scene)
            asked, right, _ = evaluate(chat, conversations, arguments.num)
            cells = [f"{right[kind] / max(1, asked[kind]):.1%}" for kind in KINDS]
            cells.append(f"{right.total() / asked.total():.1%} of {asked.total()}")
            print(f"| {method} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
