"""Measure time, memory and disk of a command. Linux only; uses the standard library only.

    measurement = run_measured(["optimum-cli", "export", ...], watch="folder")

Memory is read from `/proc` while the command runs. The anonymous part (`RssAnon`) is the memory that a process
allocates. The rest of its resident memory is mostly mapped files: the kernel keeps as much of them as fits, and drops
them when it needs the memory. So RSS says little about a program that maps its weights.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path


INTERVAL = 0.05  # seconds between two samples of memory
DISK_INTERVAL = 0.5  # seconds between two samples of disk, and between two entries of `Measurement.timeline`


@dataclass
class Measurement:
    """Hold the measurements of a command.

    Attributes:
        exit_code (`int`): Exit code of the command; negative if a signal ended it.
        seconds (`float`): Time from start to exit.
        cpu_seconds (`float`): User and system time of the command and its descendants. Other load changes it less.
        peak_anonymous (`int`): Maximum anonymous memory of all processes of the command together, in bytes.
        peak_rss (`int`): Maximum resident memory in bytes, mapped files included.
        peak_disk (`int`): Maximum size on disk of the watched folder in bytes; 0 without one.
        timeline (`list[tuple[float, int, int, int]]`): Seconds, and the maximum of anonymous memory, file-backed
            memory and disk in each half second.
    """

    exit_code: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_anonymous: int = 0
    peak_rss: int = 0
    peak_disk: int = 0
    timeline: list[tuple[float, int, int, int]] = field(default_factory=list)


def run_measured(
    command: Sequence[str | os.PathLike],
    env: Mapping[str, str] | None = None,
    watch: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
) -> Measurement:
    """Run a command to its end and measure it. A failure does not raise an error: see `exit_code`.

    Args:
        command: Program and arguments.
        env: Variables to set in addition to those of this process.
        watch: Folder whose size is sampled. It need not exist yet.
        log: File for the output of the command. Default: the output of this process.
    """
    with Path(log).open("wb") if log else nullcontext() as output:
        cpu_before = _children_cpu_seconds()
        started = time.monotonic()
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        try:
            measurement = _sample_until_exit(process, started, watch)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    measurement.cpu_seconds = _children_cpu_seconds() - cpu_before
    return measurement


def disk_usage(folder: str | os.PathLike) -> int:
    """Return the bytes that the files in a folder take on disk. A file with several names counts once."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                status = Path(parent, name).lstat()
                sizes[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(sizes.values())


def _sample_until_exit(process: subprocess.Popen, started: float, watch: str | os.PathLike | None) -> Measurement:
    measurement = Measurement()
    anonymous = files = 0
    next_disk = started
    while True:
        memory = _memory(list(_process_tree(process.pid)))
        anonymous, files = max(anonymous, memory.anonymous), max(files, memory.files)
        measurement.peak_anonymous = max(measurement.peak_anonymous, anonymous)
        measurement.peak_rss = max(measurement.peak_rss, memory.rss)

        if (now := time.monotonic()) >= next_disk:
            disk = disk_usage(watch) if watch else 0
            measurement.peak_disk = max(measurement.peak_disk, disk)
            measurement.timeline.append((round(now - started, 2), anonymous, files, disk))
            anonymous = files = 0
            next_disk = now + DISK_INTERVAL
        with suppress(subprocess.TimeoutExpired):
            measurement.exit_code = process.wait(timeout=INTERVAL)
            measurement.seconds = time.monotonic() - started
            measurement.peak_disk = max(measurement.peak_disk, disk_usage(watch) if watch else 0)
            return measurement


@dataclass
class _Memory:
    anonymous: int = 0
    files: int = 0
    rss: int = 0


def _process_tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        # A process or thread may end at any moment.
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text().split():
                yield from _process_tree(int(child))


def _memory(pids: list[int]) -> _Memory:
    """Return the memory of several processes together. The ancestor must be the first, or it could be counted twice.

    A fork shares its memory with its parent until one of them writes, so the resident memory of several processes does
    not add up (for example, OpenVINO's telemetry forks for every message). Their shares (`Pss`) add up, but are slow
    to read.
    """
    statuses = [_kilobytes(pid, "status") for pid in pids]
    alive = {pid: status for pid, status in zip(pids, statuses, strict=True) if status.get("VmRSS")}
    # VmHWM is the kernel's own maximum, without gaps between samples, but of each process alone.
    largest = (max((status[name] for status in alive.values()), default=0) for name in ("RssAnon", "RssFile", "VmHWM"))
    memory = _Memory(*largest)
    if len(alive) > 1:
        # The share of a process that ends meanwhile is missing, so the sum may be less than the largest process.
        shares = [_kilobytes(pid, "smaps_rollup") for pid in alive]
        memory.anonymous = max(memory.anonymous, sum(share.get("Pss_Anon", 0) for share in shares))
        memory.files = max(memory.files, sum(share.get("Pss_File", 0) for share in shares))
        memory.rss = max(memory.rss, sum(share.get("Pss", 0) for share in shares))
    return memory


def _kilobytes(pid: int, file: str) -> dict[str, int]:
    """Read lines like `RssAnon:   1024 kB` of a file in `/proc/<pid>`, in bytes. Empty if the process has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
