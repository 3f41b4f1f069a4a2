"""Compare the ways to run a LLaVA-MPT: our class, stock optimum-intel, GenAI, torch, and the OpenVINO notebook's pipeline.

    python benchmarks/engines.py WORKDIR --size 1.3b [--rounds 3] [--contenders ours genai-sdpa ...] [--prompts 300 2000]

On a random checkpoint of full size (`random_checkpoint.py`; made if WORKDIR has none):

1. `optimum-cli export openvino --weight-format int4` to WORKDIR/bundle, and the notebook's conversion to WORKDIR/notebook, each
   measured: time, memory, disk. What is there is not made again; delete the folder for that. `--bundle` takes another bundle.
2. Contenders, each in a process of its own for each length of the prompt and each number of rows, and taking turns: all of
   them, then all of them with the next length, and so on, for several rounds. Files are read before each process, so all start
   from a warm file cache. Every answer is greedy, about a picture of its own, and exactly as long as everybody else's. With
   `--together` they take turns answer by answer, which is fairer where the machine's speed changes from minute to minute, and
   needs memory for all contenders at once.

Time to first token counts from pictures and text, so preparing them is in it for everybody; it is the median of the answers
after the first, which is given by itself. Time per token is the rest of the answer by its other tokens. Rows of batches are as
long as the shortest prompt. Memory is that of the whole process, seen from outside.

Medians, their ratios to ours and the targets are printed; everything measured is written to `WORKDIR/results.json` after every
process, and drawn in `WORKDIR/results.png`. `--add` adds to the results that are there, to measure in pieces.

`--contenders ours llama-Q4_K_M llama-Q4_0` compares with llama.cpp, where llama-cpp-python is installed (`llama.py`).

At 1.3b with 3 rounds, two cores take about an hour and a half; 10 GB of disk. At 7b use `--stored-weights`: the notebook's way of
loading takes 27 GB of memory.

`--tiny` tries all of it out on a tiny checkpoint. Its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from contenders import MODULES, NEEDS_PACKAGE, ONE_ROW, Job
from contenders.turns import give_turn
from export import export_command
from machine import machine, versions
from measure import disk_usage, run_measured
from prompts import make_prompts
from random_checkpoint import SIZES, TINY, is_complete, write_random_checkpoint
from report import summarize, text


HERE = Path(__file__).resolve().parent
WEIGHT_FORMAT = "int4"
PROMPTS, TINY_PROMPTS = [300, 1000, 2000, 4000], [80, 160]
BATCHES = [4, 8]
LIMITS = {"torch": 1000}
DEFAULT = [name for name, module in MODULES.items() if module not in NEEDS_PACKAGE]
ENV = {"CI": "true", "HF_HUB_OFFLINE": "1"}  # no telemetry, which forks and sends


def make_checkpoint(workdir: Path, size: str) -> Path:
    """The random checkpoint, made if it is not there."""
    folder = workdir / f"random-{size}"
    if not is_complete(folder):
        write_random_checkpoint(folder, size)
    return folder / "checkpoint"


def make(command: list[str | Path], checkpoint: Path, folder: Path) -> dict:
    """Run what writes `folder`, measured, from a warm file cache. If it did so before: what was measured then.

    Raises:
        `SystemExit`: it failed.
    """
    record, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    if record.exists() and folder.exists():
        return json.loads(record.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making {folder.name} ...", flush=True)
    _read(checkpoint.parent)  # and the vision tower beside it
    measurement = run_measured(command, env=ENV, watch=folder, log=log)
    if measurement.exit_code:
        raise SystemExit(f"{command[0]} ended with {measurement.exit_code}. End of {log}:\n{log.read_text()[-2000:]}")
    values = {"command": [str(part) for part in command], "bytes": disk_usage(folder), **asdict(measurement)}
    record.write_text(json.dumps(values, indent=2) + "\n")
    return values


def run_together(group: list[Job], workdir: Path) -> Iterator[dict]:
    """Processes that are all there and take turns, answer by answer: what else the machine does hits all of them alike."""
    with TemporaryDirectory(dir=workdir) as folder, ThreadPoolExecutor(len(group)) as pool:
        runs = {job.contender: pool.submit(run, replace(job, turns=folder), workdir) for job in group}
        order, last = Random(group[0].prompt_tokens), 1 + group[0].repeats
        for number in range(last + 1):  # load and answer; later answers; stages
            for job in order.sample(group, len(group)):  # whoever comes after a large one finds the caches cold
                if number == 0:
                    read_files(job)
                give_turn(folder, job.contender, runs[job.contender].done)
                if number == last:
                    runs[job.contender].result()  # what it has is given back before the next one begins
        for one in runs.values():
            yield {**one.result(), "cpu_seconds": None}  # of all processes that ended meanwhile


def run(job: Job, workdir: Path) -> dict:
    """One process of one contender."""
    if job.turns is None:
        read_files(job)
    file, log = workdir / f"job-{job.contender}.json", workdir / f"job-{job.contender}.log"
    file.write_text(json.dumps(asdict(job)))
    command = ["env", f"--chdir={HERE}", sys.executable, "-m", "contenders", file.resolve()]
    measurement = run_measured(command, env=ENV, log=log)
    lines = log.read_text(errors="replace").strip().splitlines()
    if measurement.exit_code == 0:
        result = json.loads(lines[-1])
    else:
        result = {"error": f"The process ended with {measurement.exit_code}: {' '.join(lines[-2:])[-400:]}"}
    if result.pop("uses_our_package", False) and job.contender in ("stock", "genai-sdpa", "genai-pa", "notebook"):
        raise SystemExit(f"{job.contender} imported this package, so it is not what it is called.")
    memory = {name: getattr(measurement, name) for name in ("peak_rss", "peak_anonymous")}
    settings = {name: getattr(job, name) for name in ("contender", "prompt_tokens", "batch")}
    costs = {
        "process_seconds": measurement.seconds,
        "cpu_seconds": measurement.cpu_seconds,
        "load": os.getloadavg()[0],
    }
    return {**settings, "memory": memory, **costs, **result}


def read_files(job: Job) -> None:
    """All that a contender may load, so that it loads from a warm file cache."""
    for path in job.paths.values():
        _read(Path(path))


def _read(folder: Path) -> None:
    """Into the page cache."""
    block = bytearray(1 << 24)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def needed_paths(contender: str, paths: dict[str, Path]) -> dict[str, str]:
    """Of all there is, what a contender reads."""
    names = {"torch_bf16": ("checkpoint", "bundle"), "notebook": ("notebook",), "llama": ("llama",)}
    names = names.get(MODULES[contender], ("bundle",))
    return {name: str(paths[name].resolve()) for name in names}


def jobs(arguments: argparse.Namespace, paths: dict[str, Path], prompts: dict[int, str], round_number: int):
    """One round: every configuration, and in it every contender. Who begins changes from round to round."""
    configurations = [(length, 1) for length in prompts] + [
        (min(prompts), batch) for batch in arguments.batches if batch > 1
    ]
    first = round_number % len(arguments.contenders)
    contenders = arguments.contenders[first:] + arguments.contenders[:first]
    limits = {name: int(tokens) for name, tokens in (limit.split("=") for limit in arguments.limit)}
    for length, batch in configurations:
        for contender in contenders:
            if length <= limits.get(contender, length) and (batch == 1 or contender not in ONE_ROW):
                yield Job(
                    contender=contender,
                    paths=needed_paths(contender, paths),
                    prompt=prompts[length],
                    prompt_tokens=length,
                    batch=batch,
                    new_tokens=arguments.new_tokens,
                    repeats=arguments.repeats,
                )


def benchmark(arguments: argparse.Namespace) -> dict:
    """Make what is not there, measure, write `results.json` as it grows."""
    workdir = arguments.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "results.json"
    checkpoint = (
        TINY / "checkpoint" if arguments.tiny else arguments.checkpoint or make_checkpoint(workdir, arguments.size)
    )
    paths = {
        "checkpoint": checkpoint,
        "bundle": arguments.bundle or workdir / "bundle",
        "notebook": arguments.notebook or workdir / "notebook",
        "llama": workdir / "llama",
    }
    result = {
        "size": "tiny" if arguments.tiny else arguments.size,
        "weight_format": WEIGHT_FORMAT,
        "machine": machine(),
        "versions": versions(),
        "new_tokens": arguments.new_tokens,
        "runs": json.loads(file.read_text())["runs"] if arguments.add and file.exists() else [],
    }
    if not arguments.bundle:
        result["export"] = make(
            export_command(checkpoint, paths["bundle"], WEIGHT_FORMAT), checkpoint, paths["bundle"]
        )
    if "notebook" in arguments.contenders and not arguments.notebook:
        command = [sys.executable, HERE / "notebook_conversion.py", checkpoint, paths["notebook"]]
        result["conversion"] = make(
            command + ["--stored-weights"] * arguments.stored_weights, checkpoint, paths["notebook"]
        )
    if any(MODULES[name] == "llama" for name in arguments.contenders):
        result["llama"] = make(
            [sys.executable, HERE / "llama.py", "convert", checkpoint, paths["llama"]], checkpoint, paths["llama"]
        )
    prompts = make_prompts(paths["bundle"], arguments.prompts or (TINY_PROMPTS if arguments.tiny else PROMPTS))
    for number in range(arguments.rounds):
        for measured in one_round(jobs(arguments, paths, prompts, number), workdir, arguments.together):
            result["runs"].append({"round": number, **measured})
            result["summary"] = summarize(result["runs"])
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(progress(number, measured), flush=True)
    return result


def one_round(round_jobs: Iterable[Job], workdir: Path, together: bool) -> Iterator[dict]:
    if not together:
        yield from (run(job, workdir) for job in round_jobs)
        return
    for _, group in groupby(round_jobs, key=lambda job: (job.prompt_tokens, job.batch)):
        yield from run_together(list(group), workdir)


def progress(number: int, run: dict) -> str:
    """One line for one process."""
    head = f"round {number + 1}  {run['contender']:<11}{run['prompt_tokens']:>6} tokens x {run['batch']}"
    if "error" in run:
        return f"{head}  {run['error']}"
    entry = summarize([run])[0]
    return (
        f"{head}  load {entry['load']:.1f} s, first token {entry.get('ttft_first', 0):.2f} s, then {entry.get('ttft', 0):.2f} s, "
        f"{entry.get('token_ms', 0):.1f} ms per token, {entry['peak_rss'] / 1e9:.2f} GB"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=MODULES, default=DEFAULT)
    parser.add_argument("--prompts", nargs="+", type=int, help=f"lengths in tokens (default: {PROMPTS})")
    parser.add_argument(
        "--batches", nargs="*", type=int, default=BATCHES, help="numbers of rows, beside 1; none to leave them out"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2, help="answers after the first, in each process")
    limits = [f"{name}={tokens}" for name, tokens in LIMITS.items()]
    parser.add_argument(
        "--limit", nargs="*", default=limits, help=f"longest prompt of slow contenders (default: {' '.join(limits)})"
    )
    parser.add_argument(
        "--together", action="store_true", help="take turns answer by answer, which takes memory for all at once"
    )
    parser.add_argument("--checkpoint", type=Path, help="take this one instead of a random one")
    parser.add_argument("--bundle", type=Path, help="measure this bundle instead of exporting one")
    parser.add_argument(
        "--notebook", type=Path, help="measure this conversion of the notebook's instead of making one"
    )
    parser.add_argument(
        "--stored-weights", action="store_true", help="the notebook's conversion does not load float32"
    )
    parser.add_argument("--add", action="store_true", help="keep the runs that results.json has, and add to them")
    parser.add_argument("--tiny", action="store_true", help="try it out on a tiny checkpoint")
    arguments = parser.parse_args()
    for package in {NEEDS_PACKAGE.get(MODULES[name]) for name in arguments.contenders} - {None}:
        if not find_spec(package):
            parser.error(f"a contender needs the package {package}; its module in benchmarks/ says how to install it")

    result = benchmark(arguments)
    print(text(result))
    from plot import plot  # matplotlib: after everything is written

    plot(result, arguments.workdir / "results.png")


if __name__ == "__main__":
    main()
