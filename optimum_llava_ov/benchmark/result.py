"""Hold the results of a benchmark, and format them as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from optimum_llava_ov.kernels.extension import AVX2
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_rate, readable_size


@dataclass(frozen=True)
class Run:
    """Measure one answer to each prompt of a batch.

    Attributes:
        time_to_first_token (`float`): Seconds from the questions until every sequence has its first token.
        ms_per_token (`float`): Milliseconds after that until every sequence has one more token.
        tokens_per_second (`float`): Tokens of the whole batch per second, after the first.
    """

    time_to_first_token: float
    ms_per_token: float
    tokens_per_second: float

    @classmethod
    def from_arrivals(cls, arrivals: Sequence[Sequence[float]]) -> Run:
        """Compute a run from times.

        Args:
            arrivals: Seconds from the questions to each token, as one list for each sequence.
        """
        first = max(times[0] for times in arrivals)
        seconds = max(times[-1] for times in arrivals) - first
        tokens = sum(time > first for times in arrivals for time in times)
        return cls(first, 1000 * seconds * len(arrivals) / tokens, tokens / seconds)


@dataclass(frozen=True)
class Speed:
    """Summarize the runs with prompts of one length. The numbers are medians; see [`Run`]."""

    prompt_tokens: int
    time_to_first_token: float
    ms_per_token: float
    tokens_per_second: float
    runs: list[Run]

    @classmethod
    def of(cls, prompt_tokens: int, runs: list[Run]) -> Speed:
        return cls(
            prompt_tokens=prompt_tokens,
            time_to_first_token=median(run.time_to_first_token for run in runs),
            ms_per_token=median(run.ms_per_token for run in runs),
            tokens_per_second=median(run.tokens_per_second for run in runs),
            runs=runs,
        )


@dataclass(frozen=True)
class Benchmark:
    """Hold the results of a benchmark.

    Attributes:
        bundle, engine, device (`str`): The bundle, and how it was run.
        batch_size, new_tokens, rounds (`int`): Prompts at a time, tokens of each answer, answers for each length.
        load_seconds (`float`): Seconds to load the bundle. Its files are probably in the system's cache.
        first_time_to_first_token (`float`): Seconds to the first token of the first answer after loading. The prompt
            has the first length of `speeds`. It includes work that is done only once.
        speeds (`list[Speed]`): Results after warm-up for each length of the prompt.
        peak_rss (`int`): Maximum resident memory in bytes, mapped files included.
        peak_anonymous (`int` or `None`): Maximum memory in bytes without mapped files. `None` if the system does not
            tell.
        settings (`dict`): Settings of the device: precision, threads, and which kernel multiplies compressed weights,
            if the engine tells.
        cpu, versions (`dict`): The processor, and versions of the packages.
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
    """Return the results as text, with a table."""
    own = benchmark.peak_anonymous
    without_files = "" if own is None else f", {readable_size(own)} without mapped files"
    first = f"{benchmark.first_time_to_first_token:.2f} s"
    return "\n".join(
        [
            f"{benchmark.bundle} in {benchmark.engine} on {benchmark.device}: {_precision(benchmark.settings)}",
            _machine(benchmark),
            "",
            _table(benchmark),
            "",
            f"Loading took {benchmark.load_seconds:.2f} s. The first token after loading took {first} "
            f"(prompt of {benchmark.speeds[0].prompt_tokens} tokens).",
            f"Peak memory: {readable_size(benchmark.peak_rss)}{without_files}.",
        ]
    )


def _table(benchmark: Benchmark) -> str:
    batch = "" if benchmark.batch_size == 1 else f"{benchmark.batch_size} x "
    rows = [
        ("prompt", "first token", "per token", "tokens/s"),
        *(
            (
                f"{batch}{speed.prompt_tokens} tokens",
                f"{speed.time_to_first_token:.2f} s",
                f"{speed.ms_per_token:.1f} ms",
                readable_rate(speed.tokens_per_second),
            )
            for speed in benchmark.speeds
        ),
    ]
    return "\n".join(table_lines(rows, ">" * len(rows[0])))


def _precision(settings: dict[str, str | int | None]) -> str:
    cache, kernel = settings["kv_cache_precision"], settings["matmul_kernel"]
    return (
        f"computes in {settings['inference_precision'] or 'unknown precision'}"
        + (f", cache in {cache}" if cache else "")
        + (f", compressed weights with the {kernel} kernel" if kernel == AVX2 else "")
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
