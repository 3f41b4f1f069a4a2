"""Measure a bundle. `optimum-cli llava-ov bench` calls this."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from optimum_llava_ov.benchmark.prompt import PromptMaker
from optimum_llava_ov.benchmark.result import Benchmark, Run, Speed
from optimum_llava_ov.chat.engine import Engine
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.kernels.extension import MATMUL_KERNEL
from optimum_llava_ov.loading import AUTO, bundle_folder, load_engine, resolve_engine
from optimum_llava_ov.system.machine import describe_cpu, versions
from optimum_llava_ov.system.peak_memory import AnonymousPeak, peak_rss


WARM_UP_TOKENS = 8  # of the answers that warm up
# Settings of an engine, and the names of OpenVINO's properties
SETTINGS = {
    "inference_precision": "INFERENCE_PRECISION_HINT",
    "kv_cache_precision": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "matmul_kernel": MATMUL_KERNEL,
    "threads": "INFERENCE_NUM_THREADS",
}


def benchmark(
    bundle: str | Path,
    prompt_tokens: Sequence[int] | None = None,
    new_tokens: int = 64,
    rounds: int = 3,
    batch_size: int = 1,
    images: Sequence[Image.Image] = (),
    device: str = "CPU",
    engine: str = AUTO,
    ov_config: dict[str, str] | None = None,
) -> Benchmark:
    """Load a bundle and measure it.

    Lengths alternate, so that other load on the machine affects all of them. Memory is the peak of this process since
    it began, so measure in a separate process.

    Args:
        bundle: Folder or model id.
        prompt_tokens: Lengths of the prompts in tokens, image included. Default: 300 and 1000, or more if an image
            needs more.
        new_tokens: Tokens of each answer. It does not end at the end-of-text token.
        rounds: Number of measured answers for each length, after one answer that warms up.
        batch_size: Number of prompts at a time, each with an image.
        images: Images that the prompts use in turn. Default: a new random image for each prompt.
        engine: "openvino" (this package's own model), "genai" (OpenVINO GenAI) or "auto" (as in a chat).

    Raises:
        `ValueError`: It is not a bundle, the device or the engine does not exist, or a prompt is too short for an
            image.
        `ImportError`: The engine is not installed.
    """
    _check_numbers(new_tokens=(new_tokens, 2), rounds=(rounds, 1), batch_size=(batch_size, 1))
    repository, engine = resolve_engine(bundle, device, engine)
    folder = bundle_folder(repository, "The time of a conversion is not measured.")
    gc.collect()
    with AnonymousPeak() as anonymous:
        started = time.perf_counter()
        model = load_engine(str(folder), device, ov_config, engine, prefix_caching=False)
        load_seconds = time.perf_counter() - started
        prompts = PromptMaker(model.processor, model.config, images)
        lengths = prompts.lengths(prompt_tokens)
        warm_up, *measured = _measure(model, prompts, lengths, new_tokens, rounds, batch_size)
    return Benchmark(
        bundle=folder.resolve().name if Path(bundle).is_dir() else str(bundle),
        engine=engine,
        device=device,
        batch_size=batch_size,
        new_tokens=new_tokens,
        rounds=rounds,
        load_seconds=load_seconds,
        first_time_to_first_token=warm_up[0].time_to_first_token,
        speeds=[Speed.of(length, list(runs)) for length, runs in zip(lengths, zip(*measured))],
        peak_rss=peak_rss(),
        peak_anonymous=anonymous.bytes,
        settings=settings_of(model),
        cpu=describe_cpu(),
        versions=versions(),
    )


def settings_of(engine: Engine) -> dict[str, str | int | None]:
    """Return the values of [`SETTINGS`]; `None` for those that the engine does not tell."""
    settings = {name: engine.get_property(key) for name, key in SETTINGS.items()}
    return {**settings, "threads": settings["threads"] or None}  # 0 if the device chooses


def arrivals(engine: Engine, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
    """Answer prompts, and measure when each token arrives.

    Preprocessing of images and texts is included. Answers do not end at the end-of-text token.

    Returns:
        Seconds from the questions to each of `new_tokens` tokens, as one list for each prompt.
    """
    times: list[list[float]] = [[] for _ in prompts]
    started = time.perf_counter()

    def receive(index: int, _token: int) -> None:
        times[index].append(time.perf_counter() - started)

    engine.generate(prompts, receive, do_sample=False, eos_token_id=None, max_new_tokens=new_tokens)
    return times


def _measure(
    engine: Engine, prompts: PromptMaker, lengths: Sequence[int], new_tokens: int, rounds: int, batch_size: int
) -> list[list[Run]]:
    """Return a run for each length in each round. The first round warms up."""
    results: list[list[Run]] = []
    with tqdm(total=(1 + rounds) * len(lengths), unit="answer", desc="Loaded; warming up") as progress:
        for number in range(1 + rounds):
            results.append([])
            for length in lengths:
                count = new_tokens if number else min(new_tokens, WARM_UP_TOKENS)
                batch = [prompts.make(length) for _ in range(batch_size)]
                results[-1].append(Run.from_arrivals(arrivals(engine, batch, count)))
                progress.update()
            progress.set_description("Measuring")
    return results


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, minimum) in numbers.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}. Expected {minimum} or more.")
