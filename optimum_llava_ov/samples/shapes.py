"""Draw images of coloured shapes and make conversations about them, to train the example model and measure quality.

All randomness comes from a seed. Held-out conversations have other seeds than the training data. Positions, sizes,
angles and tints are continuous, so no image occurs twice. Questions and answers say "picture", as the model was
trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from PIL import Image, ImageDraw

from optimum_llava_ov.samples.files import Sample


KINDS = ("colour", "shape", "position", "count", "description", "comparison", "follow-up")

SMALL_KINDS = ("colour", "shape", "count")  # of questions about small scenes

SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLOURS = {
    "red": (214, 40, 44),
    "orange": (250, 142, 24),
    "yellow": (247, 214, 40),
    "green": (46, 160, 67),
    "blue": (40, 96, 208),
    "purple": (134, 58, 178),
}
# Cells of a 3x3 grid, row by row
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
RADII = (0.29, 0.43)  # the smallest and the largest, as a fraction of a cell
NUMBERS = ("no", "one", "two", "three", "four")
ORDINALS = ("first", "second")
Target: TypeAlias = "tuple[str | None, str | None]"  # shape and colour


@dataclass(frozen=True)
class Object:
    """Describe one shape.

    Attributes:
        x, y: position of the middle, as fractions of the area that the cells fill.
        radius: as a fraction of the canvas's shorter side.
        angle: in degrees.
    """

    shape: str
    colour: str
    cell: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """Describe an image.

    Attributes:
        width, height: size of the canvas, in pixels.
        fills_canvas: whether the 3x3 cells fill the whole canvas. If not, they fill its central square.
    """

    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    width: int
    height: int
    fills_canvas: bool = False

    def count(self, shape: str | None = None, colour: str | None = None) -> int:
        return sum(shape in (None, item.shape) and colour in (None, item.colour) for item in self.objects)

    def find(self, shape: str) -> Object | None:
        """Return the object of this shape if there is exactly one, else `None`."""
        found = [item for item in self.objects if item.shape == shape]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Turn:
    """Hold a question, the images that are new with it, and the only right answer."""

    scenes: tuple[Scene, ...]
    question: str
    answer: str
    kind: str


def slack_of(radius: float) -> float:
    """Return how far from the middle of its cell an object may be. With 0.95, neighbours never touch."""
    return (1 / 6 - radius) * 0.95


def random_scene(rng: random.Random, like: Scene | None = None) -> Scene:
    """Make a scene of one to four objects.

    Args:
        rng: source of all randomness.
        like: a scene that the new one often shares a shape with, so that they can be compared.
    """
    cells = rng.sample(range(9), rng.randint(1, 4))
    kinds = [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in cells]
    if like is not None and rng.random() < 0.7:
        model = rng.choice(like.objects)
        kinds[0] = (model.shape, model.colour if rng.random() < 0.5 else kinds[0][1])

    objects = []
    for cell, (shape, colour) in zip(cells, kinds, strict=True):
        radius = rng.uniform(*RADII) / 3
        slack = slack_of(radius)
        x = (cell % 3 + 0.5) / 3 + rng.uniform(-slack, slack)
        y = (cell // 3 + 0.5) / 3 + rng.uniform(-slack, slack)
        red, green, blue = (min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLOURS[colour])
        objects.append(Object(shape, colour, cell, x, y, radius, rng.uniform(-20, 20), (red, green, blue)))

    side = rng.randint(128, 300)
    width, height = side, side
    if rng.random() < 0.2:
        longer = side + rng.randint(1, side // 3)
        width, height = (longer, side) if rng.random() < 0.5 else (side, longer)
    light = rng.randint(222, 248)
    red, green, blue = (min(255, light + rng.randint(-12, 10)) for _ in range(3))
    return Scene(tuple(objects), (red, green, blue), width, height)


def wide_or_tall_scene(rng: random.Random, like: Scene | None = None) -> Scene:
    """Make a scene that fills a canvas with an aspect ratio between 3:4 and 4:3, and never a square."""
    scene = random_scene(rng, like)
    side = min(scene.width, scene.height)
    longer = round(side * rng.uniform(1.15, 4 / 3))
    width, height = (longer, side) if rng.random() < 0.5 else (side, longer)
    return replace(scene, width=width, height=height, fills_canvas=True)


def small_scene(rng: random.Random, grid: tuple[int, int], tile: int) -> Scene:
    """Make a scene whose objects are as small as in one of many tiles: an object fills a ninth of a tile at most.

    Args:
        grid: columns and rows of tiles that the image fills.
        tile: height and width of a tile in pixels. The image is up to 2.5 times as large as its tiles.
    """
    columns, rows = grid
    places = [(column, row) for column in range(3 * columns) for row in range(3 * rows)]
    side = round(tile * rng.uniform(1, 2.5))
    objects = []
    for column, row in rng.sample(places, rng.randint(1, 4)):
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        radius = rng.uniform(*RADII) / 3  # of a tile
        slack = slack_of(radius)
        x = ((column + 0.5) / 3 + rng.uniform(-slack, slack)) / columns
        y = ((row + 0.5) / 3 + rng.uniform(-slack, slack)) / rows
        red, green, blue = (min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLOURS[colour])
        cell = row // rows * 3 + column // columns
        angle = rng.uniform(-20, 20)
        objects.append(Object(shape, colour, cell, x, y, radius / min(grid), angle, (red, green, blue)))
    light = rng.randint(222, 248)
    red, green, blue = (min(255, light + rng.randint(-12, 10)) for _ in range(3))
    return Scene(tuple(objects), (red, green, blue), side * columns, side * rows, fills_canvas=True)


def small_question(rng: random.Random, scene: Scene) -> tuple[str, str, str]:
    """Return the kind of a question about a small scene, the question, and its answer. Places are not asked for."""
    while True:
        kind = rng.choice(SMALL_KINDS)
        asked = Conversation(rng, lambda *_: scene).ask_first(kind)
        if asked is not None and (kind != "shape" or any(colour in asked[0] for colour in COLOURS)):
            return kind, *asked


def render(scene: Scene, size: tuple[int, int] | None = None, oversampling: int = 3) -> Image.Image:
    """Draw a scene.

    Args:
        size: width and height in pixels; by default, the scene's own.
        oversampling: factor by which the drawing is larger than the image that is averaged from it, for antialiasing.
    """
    width, height = size or (scene.width, scene.height)
    canvas = Image.new("RGB", (width * oversampling, height * oversampling), scene.background)
    draw = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    columns, rows = canvas.size if scene.fills_canvas else (side, side)
    left, top = (canvas.width - columns) / 2, (canvas.height - rows) / 2
    for item in scene.objects:
        x, y, radius = left + item.x * columns, top + item.y * rows, item.radius * side
        if item.shape == "circle":
            draw.ellipse((x - radius * 0.92, y - radius * 0.92, x + radius * 0.92, y + radius * 0.92), fill=item.rgb)
        else:
            draw.polygon(
                [(x + radius * u, y + radius * v) for u, v in _outline(item.shape, item.angle)], fill=item.rgb
            )
    return canvas.reduce(oversampling)


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Return the corners of a shape inside the unit circle."""
    corners: list[tuple[float, float]]
    if shape == "square":
        corners = [(1.0, 45 + 90 * i) for i in range(4)]
    elif shape == "triangle":
        corners = [(1.0, -90 + 120 * i) for i in range(3)]
    elif shape == "star":
        corners = [(1.0 if i % 2 == 0 else 0.42, -90 + 36 * i) for i in range(10)]
    else:
        arm, half = 0.95, 0.28
        tip, inner = math.hypot(arm, half), math.hypot(half, half)
        spread = math.degrees(math.atan2(half, arm))
        corners = []
        for i in range(4):
            corners += [(tip, 90 * i - spread), (tip, 90 * i + spread), (inner, 90 * i + 45)]
    points = []
    for distance, degrees in corners:
        radians = math.radians(degrees + angle)
        points.append((distance * math.cos(radians), distance * math.sin(radians)))
    return points


class Conversation:
    """Ask questions about one or two scenes, and remember what a follow-up question may refer to.

    Methods named `_ask_*` and `_follow_*` return a question and its answer, or `None` if every question would be
    ambiguous.
    """

    def __init__(self, rng: random.Random, new_scene: Callable[[random.Random, Scene | None], Scene] = random_scene):
        self.rng = rng
        self.new_scene = new_scene
        self.scenes: list[Scene] = []
        self.turns: list[Turn] = []
        # Attribute and scene of the last question; shape and colour it asked for; object that "it" means, and its
        # attributes that were not told yet
        self._last: tuple[str | None, Scene] | None = None
        self._target: Target = (None, None)
        self._it: Object | None = None
        self._untold: set[str] = set()

    def run(self, num_turns: int, one_picture: bool = False) -> list[Turn]:
        """Make a conversation about one image, about two images, or with a second image that comes later."""
        layout = "one" if one_picture else self.rng.choices(("one", "two", "later"), (45, 30, 25))[0]
        second_turn = (
            self.rng.randint(1, max(1, min(2, num_turns - 1))) if layout == "later" and num_turns > 1 else None
        )
        first = self.new_scene(self.rng, None)
        self.scenes = [first, self.new_scene(self.rng, first)] if layout == "two" else [first]
        new = tuple(self.scenes)
        for index in range(num_turns):
            if index == second_turn:
                second = self.new_scene(self.rng, first)
                self.scenes.append(second)
                new = (second,)
            self._add(new, is_second=index == second_turn)
            new = ()
        return self.turns

    def ask_first(self, kind: str) -> tuple[str, str] | None:
        """Return a first question of this kind and its answer, or `None` if it would be ambiguous."""
        self.scenes = [self.new_scene(self.rng, None)]
        return self._ask(kind, is_second=False)

    def _add(self, new: tuple[Scene, ...], is_second: bool) -> None:
        questions = {turn.question for turn in self.turns}
        while True:
            kind = self._choose_kind(bool(new), is_second)
            state = (self._last, self._target, self._it, self._untold)
            asked = self._ask(kind, is_second)
            # With a new image, the same words are another question.
            if asked is not None and (is_second or asked[0] not in questions):
                self.turns.append(Turn(new, *asked, kind))
                return
            self._last, self._target, self._it, self._untold = state

    def _choose_kind(self, has_new: bool, is_second: bool) -> str:
        if is_second:
            return self.rng.choice(("comparison", "follow-up"))
        weights = {**dict.fromkeys(("colour", "shape", "position", "count"), 10), "description": 6}
        if len(self.scenes) == 2:
            weights["comparison"] = 60 if has_new else 20
        if not has_new:
            weights["follow-up"] = 45
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def _ask(self, kind: str, is_second: bool) -> tuple[str, str] | None:
        if kind == "comparison":
            return self.rng.choice((self._ask_more, self._ask_which, self._ask_same))()
        if kind == "follow-up":
            if is_second:
                return self._follow_to_image()
            return self.rng.choice((self._follow_it, self._follow_it, self._follow_other))()
        index = self.rng.randrange(len(self.scenes))
        suffix = f" in the {ORDINALS[index]} picture" if len(self.scenes) == 2 else ""
        ask = {
            "colour": self._ask_colour,
            "shape": self._ask_shape,
            "position": self._ask_position,
            "count": self._ask_count,
            "description": self._ask_description,
        }
        return ask[kind](self.scenes[index], suffix)

    def _ask_colour(self, scene: Scene, suffix: str) -> tuple[str, str] | None:
        item = self.rng.choice(scene.objects)
        if scene.count(item.shape) != 1:
            return None
        self._remember("colour", scene, item, {"place"}, (item.shape, None))
        question = self.rng.choice((
            f"What colour is the {item.shape}{suffix}?",
            f"Which colour does the {item.shape}{suffix} have?",
            f"Tell me the colour of the {item.shape}{suffix}.",
        ))  # fmt: skip
        return question, _tell("colour", item)

    def _ask_shape(self, scene: Scene, suffix: str) -> tuple[str, str] | None:
        if self.rng.random() < 0.5:
            item = self.rng.choice(scene.objects)
            if scene.count(colour=item.colour) != 1:
                return None
            self._remember(None, scene, item, {"place"})
            question = self.rng.choice((
                f"What is the {item.colour} shape{suffix}?",
                f"Which shape is {item.colour}{suffix}?",
                f"What shape is the {item.colour} one{suffix}?",
            ))  # fmt: skip
            return question, f"The {item.colour} shape is {_a(item.shape)}."

        cell = self.rng.choice(scene.objects).cell if self.rng.random() < 0.8 else self.rng.randrange(9)
        question = self.rng.choice(("What is {}{}?", "Which shape is {}{}?", "What do you see {}{}?")).format(
            PLACES[cell], suffix
        )
        found = next((item for item in scene.objects if item.cell == cell), None)
        if found is None:
            self._forget()
            return question, f"Nothing is {PLACES[cell]}."
        self._remember(None, scene, found, set())
        return question, f"{_a(found.colour, found.shape).capitalize()} is {PLACES[cell]}."

    def _ask_position(self, scene: Scene, suffix: str) -> tuple[str, str] | None:
        item = self.rng.choice(scene.objects)
        names: list[tuple[str, set[str], Target]] = []
        if scene.count(item.shape) == 1:
            names.append((item.shape, {"colour"}, (item.shape, None)))
        if scene.count(colour=item.colour) == 1:
            names.append((f"{item.colour} shape", {"shape"}, (None, None)))
        if scene.count(item.shape, item.colour) == 1:
            names.append((f"{item.colour} {item.shape}", set(), (None, None)))
        if not names:
            return None
        name, untold, target = self.rng.choice(names)
        self._remember("place", scene, item, untold, target)
        question = self.rng.choice((
            f"Where is the {name}{suffix}?",
            f"Where can I see the {name}{suffix}?",
            f"In which place is the {name}{suffix}?",
        ))  # fmt: skip
        return question, f"The {name} is {item.place}."

    def _ask_count(self, scene: Scene, suffix: str) -> tuple[str, str]:
        target = self._countable(scene)
        self._remember("count", scene, None, set(), target)
        question = self.rng.choice(("How many {} are there{}?", "How many {} do you see{}?", "Count the {}{}."))
        return question.format(_plural(target), suffix), _tell_count(scene, target)

    def _ask_description(self, scene: Scene, suffix: str) -> tuple[str, str]:
        self._forget()
        ordinal = suffix.removeprefix(" in the ").removesuffix(" picture")
        image = f"the {ordinal} picture" if suffix else "the picture"
        question = self.rng.choice(("What is in {}?", "Describe {}.", "What do you see in {}?")).format(image)
        items = sorted(scene.objects, key=lambda item: item.cell)
        answer = ", ".join(f"{_a(item.colour, item.shape)} {item.place}" for item in items)
        return question, f"{answer[0].upper()}{answer[1:]}."

    def _ask_more(self) -> tuple[str, str]:
        self._forget()
        first, second = (scene.count() for scene in self.scenes)
        question = self.rng.choice((
            "Which picture has more shapes?",
            "Which picture shows more shapes?",
            "Does the first or the second picture have more shapes?",
        ))  # fmt: skip
        if first == second:
            return question, "Both pictures have the same number of shapes."
        return question, f"The {ORDINALS[second > first]} picture has more shapes."

    def _ask_which(self) -> tuple[str, str]:
        self._forget()
        # Objects of the first scene, of the second, or of neither, so that every answer is frequent
        scene = self.rng.choice(self.scenes)
        shape, colour = self._countable(scene)
        if shape is None and colour is None:
            shape = self.rng.choice(scene.objects).shape
        name = _a(shape) if shape else _a(colour or "", "shape")
        question = self.rng.choice(
            ("Which picture has {}?", "Which picture shows {}?", "In which picture is there {}?")
        ).format(name)
        first, second = (scene.count(shape, colour) > 0 for scene in self.scenes)
        if first and second:
            return question, f"Both pictures have {name}."
        if not first and not second:
            return question, f"Neither picture has {name}."
        return question, f"The {ORDINALS[second]} picture has {name}."

    def _ask_same(self) -> tuple[str, str] | None:
        shape = self.rng.choice(self.scenes[0].objects).shape
        first, second = (scene.find(shape) for scene in self.scenes)
        if first is None or second is None:
            return None
        self._forget()
        question = self.rng.choice((
            f"Is the {shape} the same colour in both pictures?",
            f"Does the {shape} have the same colour in both pictures?",
        ))  # fmt: skip
        if first.colour == second.colour:
            return question, f"Yes, both are {first.colour}."
        return question, f"No, it is {first.colour} in the first and {second.colour} in the second picture."

    def _follow_it(self) -> tuple[str, str] | None:
        if self._it is None or self._last is None or not self._untold:
            return None
        item, attribute = self._it, self.rng.choice(sorted(self._untold))
        self._untold = self._untold - {attribute}
        # A question such as "And the square?" now asks for this attribute
        self._last, self._target = (attribute, self._last[1]), (item.shape, None)
        if attribute == "place":
            return self.rng.choice(
                ("Where is it?", "And where is it?", "In which place is it?")
            ), f"It is {item.place}."
        if attribute == "colour":
            return self.rng.choice(("What colour is it?", "Which colour does it have?")), f"It is {item.colour}."
        self._last = (None, self._last[1])
        return self.rng.choice(("What shape is it?", "Which shape does it have?")), f"It is {_a(item.shape)}."

    def _follow_other(self) -> tuple[str, str] | None:
        if self._last is None:
            return None
        attribute, scene = self._last
        if attribute is None:
            return None
        if attribute == "count":
            target = self._countable(scene)
            if target == self._target or target == (None, None):
                return None
            self._target = target
            return self.rng.choice(("And {}?", "What about {}?")).format(_plural(target)), _tell_count(scene, target)
        item = self.rng.choice(scene.objects)
        if scene.count(item.shape) != 1 or item is self._it:
            return None
        self._remember(attribute, scene, item, {"place", "colour"} - {attribute}, (item.shape, None))
        question = self.rng.choice(("And the {}?", "What about the {}?")).format(item.shape)
        return question, _tell(attribute, item)

    def _follow_to_image(self) -> tuple[str, str] | None:
        """Ask the last question again, about the newest image."""
        if self._last is None:
            return None
        attribute, scene = self._last[0], self.scenes[-1]
        if attribute is None:
            return None
        question = self.rng.choice(("And in this picture?", "What about this picture?", "And here?"))
        if attribute == "count":
            self._last = (attribute, scene)
            return question, _tell_count(scene, self._target)
        shape = self._target[0]
        item = scene.find(shape) if shape else None
        if item is None:
            return None
        self._remember(attribute, scene, item, {"place", "colour"} - {attribute}, self._target)
        return question, _tell(attribute, item)

    def _countable(self, scene: Scene) -> Target:
        """Choose what to count: all objects, a shape, or a colour. In most cases, the scene has such objects."""
        item = self.rng.choice(scene.objects)
        is_there = self.rng.random() < 0.7
        choice = self.rng.random()
        if choice < 0.25:
            return None, None
        if choice < 0.65:
            return (item.shape if is_there else self.rng.choice(SHAPES)), None
        return None, (item.colour if is_there else self.rng.choice(list(COLOURS)))

    def _remember(
        self,
        attribute: str | None,
        scene: Scene,
        item: Object | None,
        untold: set[str],
        target: Target = (None, None),
    ) -> None:
        self._last, self._it, self._untold, self._target = (attribute, scene), item, untold, target

    def _forget(self) -> None:
        self._last, self._it, self._untold, self._target = None, None, set(), (None, None)


def _a(*words: str) -> str:
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _plural(target: Target) -> str:
    shape, colour = target
    return PLURALS[shape] if shape else (f"{colour} shapes" if colour else "shapes")


def _tell(attribute: str, item: Object) -> str:
    return f"The {item.shape} is {item.colour if attribute == 'colour' else item.place}."


def _tell_count(scene: Scene, target: Target) -> str:
    shape, colour = target
    number = scene.count(shape, colour)
    if number == 1:
        return f"There is one {shape or (f'{colour} shape' if colour else 'shape')}."
    return f"There are {NUMBERS[number]} {_plural(target)}."


def conversation(
    name: str,
    max_turns: int = 5,
    one_picture: bool = False,
    new_scene: Callable[[random.Random, Scene | None], Scene] = random_scene,
) -> list[Turn]:
    """Make the conversation of this name. The same name always gives the same conversation."""
    rng = random.Random(name)
    return Conversation(rng, new_scene).run(rng.randint(1, max_turns), one_picture)


def held_out(
    num: int, seed: int = 0, new_scene: Callable[[random.Random, Scene | None], Scene] = random_scene
) -> Iterator[list[dict[str, Any]]]:
    """Make conversations for evaluation. Neither they nor their images are in the training data.

    Args:
        new_scene: makes the images' scenes; [`wide_or_tall_scene`] makes only images that are not square.

    Yields:
        Turns with `images` (those that are new in the turn), `question`, `answer` and `kind`.
    """
    for index in range(num):
        yield [
            {
                "images": [render(scene) for scene in turn.scenes],
                "question": turn.question,
                "answer": turn.answer,
                "kind": turn.kind,
            }
            for turn in conversation(f"held-out/{seed}/{index}", new_scene=new_scene)
        ]


def built_in_samples(num: int) -> list[Sample]:
    """Return the first questions of held-out conversations, with exact answers. No download is needed."""
    first_turns = (turns[0] for turns in held_out(num))
    return [Sample(turn["question"], tuple(turn["images"]), turn["answer"]) for turn in first_turns]
