"""Compare the ways to run a LLaVA: our class, stock optimum-intel, GenAI, llama.cpp, torch, and the OpenVINO
notebook's pipeline. The last two are for LLaVA-MPT only.

    python benchmarks/engines.py WORKDIR [--family mpt|llama|mistral] [--size 1.3b] [--rounds 3]
        [--contenders ours genai-sdpa ...] [--prompts 300 2000]

It uses a random checkpoint of full size. If WORKDIR has none, `random_checkpoint.py` makes one.

1. `optimum-cli export openvino --weight-format int4` writes WORKDIR/bundle, and the notebook's conversion writes
   WORKDIR/notebook. Time, memory and disk of both are measured. Existing folders are not made again; delete them for
   that. `--bundle` uses another bundle.
2. Each contender runs in a separate process for each length of the prompt and each batch size. All contenders run with
   one length, then with the next length, and so on, for several rounds. Files are read before each process, so that
   all start from a warm file cache. All answers are greedy, have the same length, and are about different images. With
   `--together`, contenders take turns answer by answer. This is fairer if the speed of the machine changes, but needs
   memory for all contenders at once.

Time to first token begins with images and text, so it includes preprocessing for all contenders. It is the median of
all answers but the first, which is reported separately. Time per token is the remaining time of the answer divided by
its other tokens. Batches use the shortest prompt. Memory is that of the whole process, measured from outside.

Medians, their ratios to ours and the targets are printed. All measurements are written to `WORKDIR/results.json` after
every process, and plotted in `WORKDIR/results.png`. `--add` adds to the existing results, to measure in parts.
`--name` gives the two files another name than `results`.

`--contenders ours llama-Q4_K_M llama-Q4_0` compares with llama.cpp, if llama-cpp-python is installed (`llama.py`).

The images of `llama` and `mistral` are square, because their checkpoints pad images, which GenAI cannot do, and
llama.cpp does in another way.

At 1.3b with 3 rounds, two cores take about an hour and a half, and 10 GB of disk. At 7b use `--stored-weights`,
because the notebook loads weights in float32, which takes 27 GB of memory.

`--avx2` measures the class of processors that have AVX2 and nothing newer, on a processor that has more. `--rounds 0`
makes the files and measures nothing.

`--tiny` runs everything on a tiny checkpoint, as a check. Its numbers have no meaning.
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

from contenders import MODULES, MPT_ONLY, NEEDS_PACKAGE, ONE_SEQUENCE, Job
from contenders.turns import give_turn
from export import export_command
from machine import machine, versions
from measure import disk_usage, run_measured
from prompts import make_prompts
from random_checkpoint import is_complete, random_folder, write_random_checkpoint
from random_families import TINY, add_family_arguments, check_family_arguments
from report import summarize, text


HERE = Path(__file__).resolve().parent
WEIGHT_FORMAT = "int4"
MPT_PROMPTS, TINY_PROMPTS = [300, 1000, 2000, 4000], [80, 160]
PROMPTS = [700, 1000, 2000]  # 576 of an image
SQUARE = (640, 640)
BATCHES = [4, 8]
LIMITS = {"torch": 1000}
ENV = {"CI": "true", "HF_HUB_OFFLINE": "1"}  # no telemetry, which forks and sends
# oneDNN obeys the variable, but OpenVINO's plugin does not. Without the properties it would ask oneDNN for what
# only newer processors have.
AVX2_ENV = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2_CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
OUR_AVX2_CONFIG = {**AVX2_CONFIG, "MATMUL_KERNEL": "avx2"}  # our class sees a newer processor, too


def make_checkpoint(workdir: Path, size: str, family: str) -> Path:
    """Return the random checkpoint. Make it if it does not exist."""
    folder = random_folder(workdir, size, family)
    if not is_complete(folder):
        write_random_checkpoint(folder, size, family=family)
    return folder / "checkpoint"


def make(command: list[str | Path], checkpoint: Path, folder: Path) -> dict:
    """Run a command that writes `folder` from a warm file cache, and measure it. Reuse an earlier measurement.

    Raises:
        `SystemExit`: The command failed.
    """
    record, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    if record.exists() and folder.exists():
        return json.loads(record.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making {folder.name} ...", flush=True)
    _read(checkpoint.parent)  # with the vision tower
    measurement = run_measured(command, env=ENV, watch=folder, log=log)
    if measurement.exit_code:
        raise SystemExit(f"{command[0]} ended with {measurement.exit_code}. End of {log}:\n{log.read_text()[-2000:]}")
    values = {"command": [str(part) for part in command], "bytes": disk_usage(folder), **asdict(measurement)}
    record.write_text(json.dumps(values, indent=2) + "\n")
    return values


def run_together(group: list[Job], workdir: Path) -> Iterator[dict]:
    """Run processes together. They take turns answer by answer, so that other load affects all of them."""
    with TemporaryDirectory(dir=workdir) as folder, ThreadPoolExecutor(len(group)) as pool:
        runs = {job.contender: pool.submit(run, replace(job, turns=folder), workdir) for job in group}
        order, last = Random(group[0].prompt_tokens), 1 + group[0].repeats
        for number in range(last + 1):  # load and answer; later answers; stages
            for job in order.sample(
                group, len(group)
            ):  # a random order, because a large contender evicts the caches of the next
                if number == 0:
                    read_files(job)
                give_turn(folder, job.contender, runs[job.contender].done)
                if number == last:
                    runs[job.contender].result()  # free its memory before the next one begins
        for one in runs.values():
            yield {**one.result(), "cpu_seconds": None}  # it would include other processes


def run(job: Job, workdir: Path) -> dict:
    """Run one process of one contender."""
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
        raise SystemExit(f"{job.contender} imported this package, but it must run without it.")
    memory = {name: getattr(measurement, name) for name in ("peak_rss", "peak_anonymous")}
    settings = {name: getattr(job, name) for name in ("contender", "prompt_tokens", "batch")}
    costs = {
        "process_seconds": measurement.seconds,
        "cpu_seconds": measurement.cpu_seconds,
        "load": os.getloadavg()[0],
    }
    return {**settings, "memory": memory, **costs, **result}


def read_files(job: Job) -> None:
    """Read all files that a contender may load, so that it loads from a warm file cache."""
    for path in job.paths.values():
        _read(Path(path))


def _read(path: Path) -> None:
    """Read a file, or all files of a folder, into the page cache."""
    block = bytearray(1 << 24)
    for file_or_folder in [path, *path.rglob("*")]:
        if file_or_folder.is_file():
            with file_or_folder.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def needed_paths(contender: str, paths: dict[str, Path]) -> dict[str, str]:
    """Return the paths that a contender reads."""
    if MODULES[contender] == "llama":
        # One file of several, because all of them together would evict others from the page cache
        files = {"llama": f"{contender.removeprefix('llama-')}.gguf", "mmproj": "mmproj.gguf"}
        found = {name: paths["llama"] / file for name, file in files.items() if (paths["llama"] / file).exists()}
    else:
        names = {"torch_bf16": ("checkpoint", "bundle"), "notebook": ("notebook",)}
        found = {name: paths[name] for name in names.get(MODULES[contender], ("bundle",))}
    return {name: str(path.resolve()) for name, path in found.items()}


def jobs(arguments: argparse.Namespace, paths: dict[str, Path], prompts: dict[int, str], round_number: int):
    """Yield the jobs of one round: all contenders for each configuration. Each round begins with another contender."""
    configurations = [(length, 1) for length in prompts] + [
        (min(prompts), batch) for batch in arguments.batches if batch > 1
    ]
    first = round_number % len(arguments.contenders)
    contenders = arguments.contenders[first:] + arguments.contenders[:first]
    limits = {name: int(tokens) for name, tokens in (limit.split("=") for limit in arguments.limit)}
    for length, batch in configurations:
        for contender in contenders:
            if length <= limits.get(contender, length) and (batch == 1 or contender not in ONE_SEQUENCE):
                yield Job(
                    contender=contender,
                    paths=needed_paths(contender, paths),
                    prompt=prompts[length],
                    prompt_tokens=length,
                    batch=batch,
                    new_tokens=arguments.new_tokens,
                    repeats=arguments.repeats,
                    image_size=Job.image_size if arguments.family == "mpt" else SQUARE,
                    ov_config=(OUR_AVX2_CONFIG if contender == "ours" else AVX2_CONFIG) if arguments.avx2 else {},
                )


def benchmark(arguments: argparse.Namespace) -> dict:
    """Make missing files, measure, and write the results after each measurement."""
    workdir = arguments.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / f"{arguments.name}.json"
    family, size = arguments.family, "tiny" if arguments.tiny else arguments.size
    if arguments.checkpoint:
        checkpoint = arguments.checkpoint
    elif arguments.tiny and family == "mpt":
        checkpoint = TINY / "checkpoint"
    else:
        checkpoint = make_checkpoint(workdir, size, family)
    paths = {
        "checkpoint": checkpoint,
        "bundle": arguments.bundle or workdir / "bundle",
        "notebook": arguments.notebook or workdir / "notebook",
        "llama": arguments.llama or workdir / "llama",
    }
    result = {
        "family": family,
        "size": size,
        "weight_format": WEIGHT_FORMAT,
        "machine": machine(),
        "avx2": arguments.avx2,
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
    if any(MODULES[name] == "llama" for name in arguments.contenders) and not arguments.llama:
        result["llama"] = make(
            [sys.executable, HERE / "llama.py", "convert", checkpoint, paths["llama"]], checkpoint, paths["llama"]
        )
    default_prompts = PROMPTS if family != "mpt" else TINY_PROMPTS if arguments.tiny else MPT_PROMPTS
    prompts = make_prompts(paths["bundle"], arguments.prompts or default_prompts)
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
    """Return one line about one process."""
    head = f"round {number + 1}  {run['contender']:<11}{run['prompt_tokens']:>6} tokens x {run['batch']}"
    if "error" in run:
        return f"{head}  {run['error']}"
    entry = summarize([run])[0]
    return (
        f"{head}  load {entry['load']:.1f} s, first token {entry.get('ttft_first', 0):.2f} s, "
        f"then {entry.get('ttft', 0):.2f} s, {entry.get('token_ms', 0):.1f} ms per token, "
        f"{entry['peak_rss'] / 1e9:.2f} GB"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    add_family_arguments(parser, default_size="1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=MODULES, help="default: those of the family")
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=int,
        help=f"lengths in tokens, image included (default: {MPT_PROMPTS} for mpt, or else {PROMPTS})",
    )
    parser.add_argument(
        "--batches", nargs="*", type=int, default=BATCHES, help="batch sizes besides 1; without values, no batches"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2, help="number of answers after the first in each process")
    limits = [f"{name}={tokens}" for name, tokens in LIMITS.items()]
    parser.add_argument(
        "--limit", nargs="*", default=limits, help=f"longest prompt of slow contenders (default: {' '.join(limits)})"
    )
    parser.add_argument(
        "--together", action="store_true", help="take turns answer by answer; needs memory for all contenders at once"
    )
    parser.add_argument(
        "--avx2",
        action="store_true",
        help="hide what the processor has beyond AVX2 from matrix multiplications; llama.cpp needs a build of its "
        "own, which LLAMA_CPP_LIB_PATH names",
    )
    parser.add_argument("--checkpoint", type=Path, help="use this checkpoint instead of a random one")
    parser.add_argument("--bundle", type=Path, help="measure this bundle instead of exporting one")
    parser.add_argument("--notebook", type=Path, help="measure this conversion of the notebook instead of making one")
    parser.add_argument("--llama", type=Path, help="measure these files of `llama.py convert` instead of making them")
    parser.add_argument(
        "--stored-weights",
        action="store_true",
        help="the notebook's conversion keeps the stored weights and does not load float32",
    )
    parser.add_argument("--name", default="results", help="name of the files with the results")
    parser.add_argument("--add", action="store_true", help="add to the runs in the existing results")
    parser.add_argument("--tiny", action="store_true", help="run on a tiny checkpoint, as a check")
    arguments = parser.parse_args()
    check_family_arguments(parser, arguments)
    possible = [name for name in MODULES if arguments.family == "mpt" or name not in MPT_ONLY]
    if arguments.contenders is None:
        arguments.contenders = [name for name in possible if MODULES[name] not in NEEDS_PACKAGE]
    if unknown := set(arguments.contenders) - set(possible):
        parser.error(f"{', '.join(sorted(unknown))}: only for mpt")
    for package in {NEEDS_PACKAGE.get(MODULES[name]) for name in arguments.contenders} - {None}:
        if not find_spec(package):
            parser.error(
                f"a contender needs the package {package}; see its module in benchmarks/ for how to install it"
            )

    if arguments.avx2:
        ENV.update(AVX2_ENV)
    result = benchmark(arguments)
    if not result["runs"]:
        return
    print(text(result))
    from plot import plot  # imported late, so that a missing matplotlib does not lose results

    plot(result, arguments.workdir / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
