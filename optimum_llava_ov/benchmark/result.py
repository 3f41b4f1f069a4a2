"""What a benchmark has found: as data, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Run:
    """One answer to each of the prompts.

    Attributes:
        time_to_first_token (`float`): seconds from the questions to the moment when every row had its first token.
        tokens_per_second (`float`): after that, of all rows together.
        ms_per_token (`float`): for each row to go on by one token.
    """

    time_to_first_token: float
    ms_per_token: float
    tokens_per_second: float

    @classmethod
    def from_arrivals(cls, arrivals: Sequence[Sequence[float]]) -> Run:
        """
        Args:
            arrivals: seconds from the questions to each token, a list for each row.
        """
        first = max(row[0] for row in arrivals)
        seconds = max(row[-1] for row in arrivals) - first
        tokens = sum(moment > first for row in arrivals for moment in row)
        return cls(first, 1000 * seconds * len(arrivals) / tokens, tokens / seconds)


@dataclass(frozen=True)
class Speed:
    """The runs with prompts of one length; the numbers are medians of theirs. See [`Run`] for what they mean."""

    prompt_tokens: int
    time_to_first_token: float
    ms_per_token: float
    tokens_per_second: float
    runs: list[Run]

    @classmethod
    def of(cls, prompt_tokens: int, runs: list[Run]) -> Speed:
        names = ("time_to_first_token", "ms_per_token", "tokens_per_second")
        return cls(prompt_tokens, *(median(getattr(run, name) for run in runs) for name in names), runs)


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        bundle, engine, device (`str`): what was measured, and what it ran on.
        batch_size, new_tokens, rounds (`int`): prompts at a time, tokens of each answer, answers for each length.
        load_seconds (`float`): to load the bundle, its files probably in the system's cache.
        first_time_to_first_token (`float`):
            seconds, of the first answer after loading, to a prompt of the first length of `speeds`. It pays for what is done once.
        speeds (`list[Speed]`): warm, for each length of the prompt.
        peak_rss (`int`): bytes of resident memory at most, mapped files included.
        peak_anonymous (`int` or `None`): bytes that the process needed for itself at most; `None` where the system does not tell.
        settings (`dict`): what the device chose or was told: precision, threads.
        cpu, versions (`dict`): the machine, and the packages.
    """

    bundle: str
    engine: str
    device: str
    batch_size: int
    new_tokens: int
    rounds: int
    load_seconds: float
    first_time_to_first_token: float
    speeds: list[Speed]
    peak_rss: int
    peak_anonymous: int | None
    settings: dict[str, str | int | None]
    cpu: dict[str, Any]
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(benchmark: Benchmark) -> str:
    """For people: the table, and what belongs to it."""
    own = (
        ""
        if benchmark.peak_anonymous is None
        else f", {_gigabytes(benchmark.peak_anonymous)} of it without mapped files"
    )
    first = f"{benchmark.first_time_to_first_token:.2f} s"
    return "\n".join(
        [
            f"{benchmark.bundle} in {benchmark.engine} on {benchmark.device}: {_precision(benchmark.settings)}",
            _machine(benchmark),
            "",
            _table(benchmark),
            "",
            f"Loading takes {benchmark.load_seconds:.2f} s, and the first answer after it begins after {first} "
            f"({benchmark.speeds[0].prompt_tokens} tokens).",
            f"Memory at most: {_gigabytes(benchmark.peak_rss)}{own}.",
        ]
    )


def _table(benchmark: Benchmark) -> str:
    rows = [("prompt", "first token", "then, per token", "tokens/s")]
    for speed in benchmark.speeds:
        rows.append(
            (
                f"{speed.prompt_tokens} tokens"
                if benchmark.batch_size == 1
                else f"{benchmark.batch_size} x {speed.prompt_tokens} tokens",
                f"{speed.time_to_first_token:.2f} s",
                f"{speed.ms_per_token:.1f} ms",
                f"{speed.tokens_per_second:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows)


def _precision(settings: dict[str, str | int | None]) -> str:
    cache = settings["kv_cache_precision"]
    return f"computes in {settings['inference_precision'] or 'unknown precision'}" + (
        f", cache in {cache}" if cache else ""
    )


def _machine(benchmark: Benchmark) -> str:
    cpu, threads = benchmark.cpu, benchmark.settings["threads"]
    cores = f"{cpu['cores']} cores" if threads is None else f"{threads} threads on {cpu['cores']} cores"
    packages = (
        "openvino",
        *(("openvino-genai",) if benchmark.engine == "genai" else ("optimum-intel", "transformers", "torch")),
    )
    versions = ", ".join(f"{name} {benchmark.versions[name]}" for name in packages)
    return f"{cpu['name']} ({', '.join(cpu['features'])}), {cores}; {versions}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
