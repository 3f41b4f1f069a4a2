"""Caption a source of images into parts, and continue where an earlier run has stopped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from optimum_llava_ov.captions.captioner import Captioner, Question
from optimum_llava_ov.captions.decoding import Decoder
from optimum_llava_ov.captions.items import Item
from optimum_llava_ov.captions.output import FORMATS, Part, Row, open_output
from optimum_llava_ov.captions.sources import Source


AHEAD = 2  # images that are decoded ahead, for each one in the batch


@dataclass(frozen=True)
class Job:
    """Describe what to caption, and where to.

    Attributes:
        source (`Source`): Where the images are.
        output (`Path`): Folder of the output. Its name ends with `.parquet` or `.jsonl`, the format of its parts.
        captioner (`Captioner`): What to ask of each image.
        rows_per_part (`int`): Number of images of a part.
        num_shards (`int`), shard (`int`): Caption only every `num_shards`-th part, beginning with `shard`.
        workers (`int`): Number of processes that decode images.
    """

    source: Source
    output: Path
    captioner: Captioner
    rows_per_part: int = 1000
    num_shards: int = 1
    shard: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.output.suffix not in FORMATS:
            raise ValueError(f"--output is {self.output}. Expected a name that ends with {' or '.join(FORMATS)}.")
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(
                f"--shard is {self.shard} and --num-shards is {self.num_shards}. Expected a shard from 0 to "
                f"{self.num_shards - 1}."
            )
        if self.rows_per_part < 1:
            raise ValueError(f"--rows-per-part is {self.rows_per_part}. Expected a number above 0.")

    def description(self) -> dict[str, Any]:
        """Return what must be the same when the job is continued."""
        captioner = self.captioner
        return {
            "source": self.source.name,
            "split": self.source.split,
            "image_column": self.source.image_column,
            "prompt_column": self.source.prompt_column,
            "key_column": self.source.key_column,
            "bundle": captioner.bundle,
            "prompt": captioner.prompt,
            "max_new_tokens": captioner.max_new_tokens,
            "temperature": captioner.temperature,
            "top_p": captioner.top_p,
            "schema": captioner.schema,
            "rows_per_part": self.rows_per_part,
        }

    def part(self, number: int) -> Part:
        return Part(self.output, f"part-{number:06}", self.output.suffix)

    def parts(self) -> Iterator[tuple[int, list[Item]]]:
        """List the parts that are not complete, with their images. One part is in memory at a time."""
        items = self.source.items()
        for number in itertools.count():
            images = list(itertools.islice(items, self.rows_per_part))
            if not images:
                return
            if number % self.num_shards == self.shard and not self.part(number).is_complete:
                yield number, images


@dataclass
class Summary:
    """Count what a run has done.

    Attributes:
        images (`int`): Number of images, errors included.
        errors (`int`): Number of images without a caption.
        tokens (`int`): Number of tokens of all captions.
        seconds (`float`): Time of the run.
    """

    images: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.images} images, {self.errors} errors, {self.tokens} tokens, {self.seconds:.1f} s, "
            f"{self.images / seconds:.2f} images/s, {self.tokens / seconds:.1f} tokens/s"
        )


def run_job(job: Job) -> Summary:
    """Caption the images that have no caption yet.

    Raises:
        `ValueError`: The source or the output does not fit the job, or another process works on the same shard.
    """
    job.captioner.engine  # noqa: B018  errors of the bundle and of the schema come before work
    open_output(job.output, job.description())
    lock = FileLock(job.output / f".shard-{job.shard}-of-{job.num_shards}.lock")
    try:
        with lock.acquire(timeout=0):
            return _run(job)
    except Timeout:
        raise ValueError(
            f"Another process captions shard {job.shard} into {job.output}. Wait until it ends, or choose another "
            "shard."
        ) from None


def new_decoder(job: Job) -> Decoder:
    """Begin the processes that decode the images of a job. Close it."""
    captioner = job.captioner
    return Decoder(captioner.engine.processor.image_processor, captioner.image_limits, job.workers)


def _run(job: Job) -> Summary:
    summary, began = Summary(), time.monotonic()
    # A data set on the Hub would be downloaded to count it
    total = None if job.source.is_on_hub else sum(len(items) for _, items in job.parts())
    with (
        closing(new_decoder(job)) as decoder,
        tqdm(total=total, unit="image", desc="caption", dynamic_ncols=True) as bar,
    ):
        for row in caption_parts(job, job.parts(), decoder):
            summary.images += 1
            summary.errors += row.error is not None
            summary.tokens += row.tokens
            summary.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix_str(
                f"{summary.tokens / max(summary.seconds, 1e-9):.1f} tokens/s, {summary.errors} errors", refresh=False
            )
    return summary


def caption_parts(job: Job, parts: Iterator[tuple[int, list[Item]]], decoder: Decoder) -> Iterator[Row]:
    """Caption parts one after the other, without a gap between them. A part is in its place after its last row."""
    begun: dict[int, tuple[Part, int]] = {}  # with their numbers of images

    def missing() -> Iterator[Item]:
        for number, items in parts:
            part = job.part(number)
            part.begin()
            begun[number] = part, len(items)
            left = [replace(item, place=(number, index)) for index, item in enumerate(items) if index not in part.rows]
            _complete(begun, number)
            yield from left

    captioner = job.captioner
    seen = decoder.ahead(missing(), AHEAD * captioner.running)
    questions = (Question(_text(item.key), item.prompt or captioner.prompt, image, item.place) for item, image in seen)
    try:
        for question, caption in captioner.captions(questions):
            number, index = question.place
            row = Row(
                index,
                question.key,
                question.prompt,
                caption.text,
                caption.tokens,
                caption.finish_reason,
                caption.seconds,
                caption.error,
            )
            begun[number][0].add(row)
            yield row
            _complete(begun, number)
    finally:
        for part, _ in begun.values():
            part.close()


def _complete(begun: dict[int, tuple[Part, int]], number: int) -> None:
    part, size = begun[number]
    if len(part.rows) == size:
        part.complete()
        del begun[number]


def _text(name: str) -> str:
    """Return a name that can be written. The name of a file may have bytes that are no text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
