"""Measure what fewer tokens for an image cost: exact answers of a shapes model, by number of tokens and method.

    python benchmarks/image_tokens.py [--num 100] [--merge 64 48 32 24 20 16 12 9] [--pool 36 16 9]
    python benchmarks/image_tokens.py --images small [--merge 64 16] [--pool 16]
    python benchmarks/image_tokens.py --family llama --merge 9 8 6 5 4 --pool 4

Each setting is the torch model with that reduction in its image encoder, asked in the same held-out conversations.
Images of the family `patches` have 64 patches, those of the others 9. They are wide or tall (3:4 to 4:3), but square
for `mpt` or with `--images square`. With `--images small` or `large`, all objects have the smallest or the largest
radius that there is. The result is printed as a table, by kind of question.

    python benchmarks/image_tokens.py --bundles BUNDLE FEWER_TOKENS [--repeats 5]

asks bundles about new images, in turns, and prints the times to the first token and their ratio to the first bundle:

    python benchmarks/random_checkpoint.py random --family llama --size 7b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 all-ov
    optimum-cli export openvino --model random/checkpoint --weight-format int4 --image-tokens 144 fewer-ov
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import replace
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
from optimum_llava_ov.samples.shapes import (  # noqa: E402
    KINDS,
    RADII,
    Scene,
    held_out,
    random_scene,
    slack_of,
    wide_or_tall_scene,
)


def small_objects(rng: random.Random, like: Scene | None) -> Scene:
    """Make a scene whose objects have the smallest radius."""
    return _with_radius(wide_or_tall_scene(rng, like), RADII[0] / 3)


def large_objects(rng: random.Random, like: Scene | None) -> Scene:
    """Make a scene whose objects have the largest radius."""
    return _with_radius(wide_or_tall_scene(rng, like), RADII[1] / 3)


def square_image(rng: random.Random, like: Scene | None) -> Scene:
    """Make a scene with a square canvas."""
    scene = random_scene(rng, like)
    return replace(scene, width=scene.height, height=scene.height)


def _with_radius(scene: Scene, radius: float) -> Scene:
    """Change the radius of all objects. An object moves if it would not be inside its cell."""
    slack = slack_of(radius)
    objects = []
    for item in scene.objects:
        column, row = (item.cell % 3 + 0.5) / 3, (item.cell // 3 + 0.5) / 3
        x = min(column + slack, max(column - slack, item.x))
        y = min(row + slack, max(row - slack, item.y))
        objects.append(replace(item, x=x, y=y, radius=radius))
    return replace(scene, objects=tuple(objects))


IMAGES = {"square": square_image, "small": small_objects, "large": large_objects}


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
    parser.add_argument("--family", choices=FAMILIES, default="patches")
    parser.add_argument("--folder", type=Path, default=SHAPES, help="where train.py wrote the model (default: there)")
    parser.add_argument("--images", choices=IMAGES, help="which images (default: as held out for the family)")
    parser.add_argument("--num", type=int, default=100, help="number of conversations")
    for method, default in zip(METHODS, ([64, 48, 32, 24, 20, 16, 12, 9], [36, 16, 9])):
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
            chat = TorchChat(arguments.folder / family.checkpoint, image_tokens=count, image_token_method=method)
            conversations = held_out(arguments.num, 0, IMAGES.get(arguments.images, family.held_out_scene))
            asked, right, _ = evaluate(chat, conversations, arguments.num)
            cells = [f"{right[kind] / max(1, asked[kind]):.1%}" for kind in KINDS]
            cells.append(f"{right.total() / asked.total():.1%} of {asked.total()}")
            print(f"| {method} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
