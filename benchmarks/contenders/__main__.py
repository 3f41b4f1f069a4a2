"""Run one contender in one configuration, and print what was measured as the last line, in JSON.

    cd benchmarks && python -m contenders JOB.json

`JOB.json` holds a [`Job`]. Every answer is about another picture, so no cache of prompts helps anyone. An error is a result too:
`error` says what it was.
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


PICTURE_SIZE = (640, 480)


def picture(seed: int) -> Image.Image:
    """Patches of colour that run into each other."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(PICTURE_SIZE, Image.Resampling.BICUBIC)


def run(job: Job) -> dict:
    """Load, answer `1 + repeats` times."""
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
        result["stages"] = contender.stages(picture(0)) if job.batch == 1 else {}
    return result


def _answer(contender: Contender, job: Job, index: int) -> Answer:
    pictures = [picture(job.batch * index + row) for row in range(job.batch)]
    answer = contender.answer(job.prompt, pictures, job.new_tokens)
    if {len(row) for row in answer.tokens} != {job.new_tokens}:
        raise RuntimeError(f"Rows of {[len(row) for row in answer.tokens]} tokens, expected {job.new_tokens} each.")
    return answer


def main() -> None:
    """Command line."""
    os.environ.setdefault("CI", "true")  # no telemetry, which forks
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = run(job)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {_gist(str(error))}"}
    result["uses_our_package"] = "optimum_llava_ov" in sys.modules
    print("\n" + json.dumps(result), flush=True)


def _gist(message: str) -> str:
    """The last two lines that say something: OpenVINO puts where it happened first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-400:]


if __name__ == "__main__":
    main()
