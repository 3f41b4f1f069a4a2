"""Caption a source on a Ray cluster. Ray Data gives parts to actors, each with a model of its own."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import replace
from typing import Any

import ray.data
from tqdm import tqdm

from optimum_llava_ov.captions.job import Job, Summary, caption_parts, new_decoder
from optimum_llava_ov.captions.output import open_output
from optimum_llava_ov.system.cluster import connect, limit_threads


PARTS = 2  # that an actor captions at the same time: the next one begins while the last images of one are completed


class CaptionParts:
    """Caption the parts that this actor is given.

    The actor may end at any time. Ray gives its part to another one, which continues what was written.

    Args:
        job: The job. Its output is a folder that all actors reach.
    """

    def __init__(self, job: Job):
        self.job = job
        self._decoder = new_decoder(job)  # loads the model

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        counts: dict[str, list[float]] = {"images": [], "errors": [], "tokens": []}
        for number, items in zip(batch["number"], batch["items"]):
            parts = iter([(int(number), pickle.loads(items))])
            rows = list(caption_parts(self.job, parts, self._decoder))
            counts["images"].append(len(rows))
            counts["errors"].append(sum(row.error is not None for row in rows))
            counts["tokens"].append(sum(row.tokens for row in rows))
        return counts


def run_ray_job(job: Job, address: str, models: int, cpus: float) -> Summary:
    """Caption the images that have no caption yet.

    Args:
        address: Address of the cluster; "auto" for the one of this machine, which is started if there is none.
        models: Maximum number of models, each in an actor.
        cpus: Number of processors of each model.

    Raises:
        `ValueError`: The source or the output does not fit the job.
    """
    open_output(job.output, job.description())
    connect(address, dashboard=False)
    parts = [{"number": number, "items": pickle.dumps(items)} for number, items in job.parts()]
    summary, began = Summary(), time.monotonic()
    if not parts:
        return summary
    # An actor that has all its parts is busy. Ray's own value asks for more of them, to add an actor
    ray.data.DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    data = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        CaptionParts,
        fn_constructor_args=(_in_actor(job, cpus),),
        batch_size=1,
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=min(models, len(parts)),
            initial_size=min(models, len(parts)),
            # More of them would wait for this actor at the end of the job, while others have nothing to do
            max_tasks_in_flight_per_actor=PARTS,
            max_concurrent_calls_per_actor=PARTS,
            enable_true_multi_threading=True,
        ),
    )
    with tqdm(total=len(parts), unit="part", desc="caption", dynamic_ncols=True) as bar:
        for counts in data.iter_rows():
            summary.images += int(counts["images"])
            summary.errors += int(counts["errors"])
            summary.tokens += int(counts["tokens"])
            summary.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix_str(f"{summary.images} images, {summary.errors} errors", refresh=False)
    return summary


def _in_actor(job: Job, cpus: float) -> Job:
    captioner = copy.copy(job.captioner)
    captioner.ov_config = limit_threads(captioner.device, captioner.ov_config, cpus)
    return replace(job, captioner=captioner)
