"""Measure captions on a Ray cluster against captions without one.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/scale.py random-ov

In turns, images per second of: the job without Ray; with Ray and one model that has all processors; with one model on
one processor; with two models on one processor each. Loading is not counted: the time begins when each model has
completed a part. Linux; needs the extra `ray` and memory for two copies of the model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ray
from batches import line, median, new_image, question_of

from optimum_llava_ov.captions.captioner import Captioner
from optimum_llava_ov.captions.job import Job, run_job
from optimum_llava_ov.captions.ray_job import run_ray_job
from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.system.machine import available_cores


ALONE, ALL, ONE, TWO = "no Ray", "Ray, 1 model", "Ray, 1 model on 1 core", "Ray, 2 models on 1 core each"


def speed(job: Job, models: int) -> float:
    """Return the images per second after each model has completed a part."""
    ended = sorted(part.stat().st_mtime for part in job.output.glob("part-*.jsonl"))
    return (len(ended) - models) * job.rows_per_part / (ended[-1] - ended[models - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=64, help="in each run")
    parser.add_argument("--running", type=int, default=16, help="images in the batch")
    parser.add_argument("--rows-per-part", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    cores = available_cores()
    ways = {ALONE: (1, cores), ALL: (1, cores), ONE: (1, 1), TWO: (2, 1)}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    question = question_of(args.bundle, args.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(args.images):
            new_image(number).save(images / f"{number:04}.png")
        ray.init(num_cpus=cores, log_to_driver=False)
        for number in range(args.rounds):
            for way, (models, cpus) in ways.items():
                captioner = Captioner(
                    str(args.bundle.absolute()), question, args.new_tokens, running=args.running, ignore_eos=True
                )
                output = Path(folder) / f"{number}-{models}-{cpus}-{way == ALONE}.jsonl"
                job = Job(Source(str(images)), output, captioner, rows_per_part=args.rows_per_part)
                if way == ALONE:
                    run_job(job)
                    captioner.close()
                else:
                    run_ray_job(job, "auto", models, cpus)
                speeds[way].append(speed(job, models))
                print(f"round {number}: {way:30} {speeds[way][-1]:.3f} images/s", flush=True)
    ray.shutdown()

    ratio = median([a / b for a, b in zip(speeds[ALL], speeds[ALONE])])
    line(f"{ALL} / {ALONE}", ratio, "at least 0.95", ratio >= 0.95)
    ratio = median([a / b for a, b in zip(speeds[TWO], speeds[ONE])])
    line(f"{TWO} / {ONE}", ratio, "at least 1.8", ratio >= 1.8)


if __name__ == "__main__":
    main()
