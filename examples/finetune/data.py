"""Draw a data set about rings, a shape that the shapes models have never seen, in the format of LLaVA's training data.

    python examples/finetune/data.py rings

`train.json` is a list of `{"id", "image", "conversations"}`. Half of it is about rings. The other half are questions
that the model could answer before, so that it does not forget. `held_out.jsonl` has lines of `{"image", "prompt",
"answer"}` about other images with rings, for `optimum-cli llava-ov eval`.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from optimum_llava_ov.samples.shapes import NUMBERS, Scene, conversation, render, wide_or_tall_scene


NEW_SHAPE = "ring"


def scene_with_rings(rng: random.Random) -> Scene:
    """Make a scene with at least one ring. Of its other objects, a third are rings, too."""
    scene = wide_or_tall_scene(rng)
    first = rng.randrange(len(scene.objects))
    objects = (
        replace(item, shape=NEW_SHAPE) if index == first or rng.random() < 0.33 else item
        for index, item in enumerate(scene.objects)
    )
    return replace(scene, objects=tuple(objects))


def draw(scene: Scene, oversampling: int = 3) -> Image.Image:
    """Draw a scene. A ring is a circle with a hole."""
    rings = [item for item in scene.objects if item.shape == NEW_SHAPE]
    others = tuple(replace(item, shape="circle") if item in rings else item for item in scene.objects)
    size = (scene.width * oversampling, scene.height * oversampling)
    canvas = render(replace(scene, objects=others), size, oversampling=1)
    side, pen = min(size), ImageDraw.Draw(canvas)
    for item in rings:
        x, y, radius = item.x * size[0], item.y * size[1], 0.5 * item.radius * side
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=scene.background)
    return canvas.reduce(oversampling)


def ask_about_rings(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Return a question and its only right answer, in the words of the model's other questions."""
    ring = rng.choice([item for item in scene.objects if item.shape == NEW_SHAPE])
    number = scene.count(NEW_SHAPE)
    items = sorted(scene.objects, key=lambda item: item.cell)
    description = ", ".join(f"{_a(item.colour)} {item.shape} {item.place}" for item in items)
    questions = [
        (f"What is {ring.place}?", f"{_a(ring.colour).capitalize()} ring is {ring.place}."),
        ("How many rings are there?", f"There are {NUMBERS[number]} rings." if number > 1 else "There is one ring."),
        ("What is in the picture?", f"{description[0].upper()}{description[1:]}."),
    ]
    if scene.count(colour=ring.colour) == 1:
        questions.append((f"What is the {ring.colour} shape?", f"The {ring.colour} shape is a ring."))
    if number == 1:
        questions.append(("What colour is the ring?", f"The ring is {ring.colour}."))
        questions.append(("Where is the ring?", f"The ring is {ring.place}."))
    return rng.choice(questions)


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def write(folder: Path, num_train: int, num_held_out: int) -> None:
    """Write images, `train.json` and `held_out.jsonl`. The same numbers always give the same files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for index in tqdm(range(num_train), desc="train.json"):
        name, rng = f"images/train-{index:05d}.png", random.Random(f"rings/train/{index}")
        if index % 2:
            turns = conversation(f"rings/replay/{index}", 4, True, wide_or_tall_scene)
            render(turns[0].scenes[0]).save(folder / name)
            pairs = [(turn.question, turn.answer) for turn in turns]
        else:
            scene = scene_with_rings(rng)
            draw(scene).save(folder / name)
            pairs = list(dict.fromkeys(ask_about_rings(rng, scene) for _ in range(4)))
        messages = []
        for number, (question, answer) in enumerate(pairs):
            messages.append({"from": "human", "value": question if number else f"<image>\n{question}"})
            messages.append({"from": "gpt", "value": answer})
        samples.append({"id": f"{index:05d}", "image": name, "conversations": messages})
    (folder / "train.json").write_text(json.dumps(samples, indent=1))

    with (folder / "held_out.jsonl").open("w") as file:
        for index in range(num_held_out):
            name, rng = f"images/held-out-{index:05d}.png", random.Random(f"rings/held-out/{index}")
            scene = scene_with_rings(rng)
            draw(scene).save(folder / name)
            question, answer = ask_about_rings(rng, scene)
            file.write(json.dumps({"image": name, "prompt": question, "answer": answer}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--num-train", type=int, default=2000, help="number of conversations (default: %(default)s)")
    parser.add_argument("--num-held-out", type=int, default=100, help="number of questions (default: %(default)s)")
    args = parser.parse_args()
    write(args.output, args.num_train, args.num_held_out)
    print(f"Wrote train.json and held_out.jsonl to {args.output}")


if __name__ == "__main__":
    main()
