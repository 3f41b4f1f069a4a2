"""Measure captions on a Ray cluster against captions without one.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/scale.py random-ov

In turns, images per second of: the job without Ray; with Ray and one model that has all processors; with one model on
one processor; with two models on one processor each. On one processor, all threads of a model are pinned to it.
`--only ray` or `--only models` measures one of the two ratios.

Loading is not counted: the time of a model begins when its first image joins the batch, and ends with its last part.
Ray runs only while it is measured. Linux; needs the extra `ray` and memory for two copies of the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import ray
from batches import line, median, new_image, parse, question_of

from optimum_llava_ov.captions.captioner import Captioner
from optimum_llava_ov.captions.job import Job, run_job
from optimum_llava_ov.captions.ray_job import run_ray_job
from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.system.machine import available_cores


ALONE, ALL, ONE, TWO = "no Ray", "Ray, 1 model", "Ray, 1 model on 1 core", "Ray, 2 models on 1 core each"
ACTOR = "CaptionParts"


class Watch(threading.Thread):
    """See which process works at which part, and pin the actors of Ray.

    Args:
        job: The job that runs.
        pin: Whether each actor gets a processor of its own.
    """

    def __init__(self, job: Job, pin: bool):
        super().__init__()
        self._job = job
        self._pin = pin
        self._ended = threading.Event()
        self._processes: dict[str, int] = {}  # by the name of the part
        self._begins: dict[str, float] = {}
        self._actors: list[psutil.Process] = []
        self.start()

    def run(self) -> None:
        for number in itertools.count():
            if self._ended.wait(0.2):
                return
            for file in self._job.output.glob("_part-*"):
                with suppress(FileNotFoundError):
                    row, end, _ = file.read_text().partition("\n")
                    if end and name_of(file) not in self._begins:
                        self._begins[name_of(file)] = time.time() - json.loads(row)["seconds"]
            if number % 10 == 0:  # seldom, because it takes a part of a processor
                self._find_actors()
            if not self._begins.keys() <= self._processes.keys():  # likewise
                self._look_at_files()

    def _find_actors(self) -> None:
        self._actors = [process for process in psutil.process_iter(["cmdline"]) if is_actor(process)]
        for core, actor in enumerate(sorted(self._actors, key=lambda actor: actor.pid)):
            if self._pin:
                pin(actor.pid, core)

    def _look_at_files(self) -> None:
        for process in [psutil.Process(), *self._actors]:
            with suppress(psutil.Error):
                for file in process.open_files():
                    if Path(file.path).parent == self._job.output:
                        self._processes[name_of(Path(file.path))] = process.pid

    def speed(self) -> float:
        """Return the images per second of all models."""
        self._ended.set()
        self.join()
        spans: dict[int, list[tuple[float, float]]] = {}
        for part in sorted(self._job.output.glob("part-*")):
            name = name_of(part)
            spans.setdefault(self._processes[name], []).append((self._begins[name], part.stat().st_mtime))
        speed = 0.0
        for times in spans.values():
            began = min(begin for begin, _ in times)
            ends = sorted(end - began for _, end in times)
            speed += self._job.rows_per_part * len(ends) / ends[-1]
            print("  parts of a model end after", *(f"{end:.1f}" for end in ends))
        return speed


def name_of(file: Path) -> str:
    return file.name.lstrip("_").partition(".")[0]


def is_actor(process: psutil.Process) -> bool:
    title = " ".join(process.info["cmdline"] or [])
    return title.startswith("ray::") and ACTOR in title


def pin(pid: int, core: int) -> None:
    """Pin all threads of a process to one of the processors of this process."""
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(int(thread.name), {cores[core % len(cores)]})  # actors of the last run may be ending


def measure(args: argparse.Namespace, way: str, models: int, cores: int, question: str) -> float:
    captioner = Captioner(
        str(args.bundle.absolute()), question, args.new_tokens, running=args.running, ignore_eos=True
    )
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(args.running * models * (1 + args.parts * cores)):
            new_image(number).save(images / f"{number:04}.png")
        job = Job(Source(str(images)), Path(folder) / "captions.jsonl", captioner, rows_per_part=args.running)
        watch = Watch(job, pin=way in (ONE, TWO))
        if way == ALONE:
            run_job(job)
            captioner.close()
        else:
            run_ray_job(job, "auto", models, cores)
            ray.shutdown()
        return watch.speed()


def main() -> None:
    args = parse(
        __doc__,
        ("--running", 16, "images in the batch, and in a part"),
        ("--parts", 2, "of each model for each of its cores, and one more"),
        only=("ray", "models"),
    )
    cores = available_cores()
    ways = {}
    if args.only != "models":
        ways |= {ALONE: (1, cores), ALL: (1, cores)}
    if args.only != "ray":
        ways |= {ONE: (1, 1), TWO: (2, 1)}
    question = question_of(args.bundle, args.prompt_tokens)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way, (models, cpus) in ways.items():
            speeds[way].append(measure(args, way, models, cpus, question))
            print(f"round {number}: {way:30} {speeds[way][-1]:.3f} images/s", flush=True)
    for more, less, target in ((ALL, ALONE, 0.95), (TWO, ONE, 1.8)):
        if more in ways:
            ratio = median([a / b for a, b in zip(speeds[more], speeds[less])])
            line(f"{more} / {less}", ratio, f"at least {target}", ratio >= target)


if __name__ == "__main__":
    main()
