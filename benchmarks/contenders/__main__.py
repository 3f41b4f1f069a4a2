"""Run one contender in one configuration, and print the measurements as JSON in the last line.

    cd benchmarks && python -m contenders JOB.json

`JOB.json` holds a [`Job`]. Every answer is about another image, so that prompt caches do not help. An error is a
result too: `error` has its message.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from contenders import MODULES, Answer, Contender, Job
from contenders.turns import turn


def random_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """Make an image of patches of colour that blend into each other."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def run(job: Job) -> dict:
    """Load the contender, and let it answer `1 + repeats` times."""
    with turn(job.turns, job.contender):
        module = importlib.import_module(f"contenders.{MODULES[job.contender]}")
        started = time.perf_counter()
        contender = module.load(job)
        result: dict = {"load_seconds": time.perf_counter() - started, "engine": type(contender).__name__}
        answers = [_answer(contender, job, 0)]
    for index in range(1, 1 + job.repeats):
        with turn(job.turns, job.contender):
            answers.append(_answer(contender, job, index))
    result["first"], *result["later"] = [dataclasses.asdict(answer) for answer in answers]
    with turn(job.turns, job.contender):
        result["stages"] = contender.stages(random_image(0, job.image_size)) if job.batch == 1 else {}
    return result


def _answer(contender: Contender, job: Job, index: int) -> Answer:
    images = [random_image(job.batch * index + number, job.image_size) for number in range(job.batch)]
    answer = contender.answer(job.prompt, images, job.new_tokens)
    lengths = [len(sequence) for sequence in answer.tokens]
    if set(lengths) != {job.new_tokens}:
        raise RuntimeError(f"The sequences have {lengths} tokens. Expected {job.new_tokens} each.")
    return answer


def main() -> None:
    """Run the command."""
    os.environ.setdefault("CI", "true")  # no telemetry, which forks
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = run(job)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {_last_lines(str(error))}"}
    result["uses_our_package"] = "optimum_llava_ov" in sys.modules
    print("\n" + json.dumps(result), flush=True)


def _last_lines(message: str) -> str:
    """Return the last two lines that are not empty. OpenVINO writes the place of an error first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-400:]


if __name__ == "__main__":
    main()
