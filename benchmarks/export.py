"""Measure the export of a full-size checkpoint: time, memory and disk.

    python benchmarks/export.py WORKDIR [--family mpt|llama|mistral|yi] [--size 7b] [--layers N] [--weight-format fp16]
                                        [--keep]

It uses a random checkpoint. If WORKDIR has none, `random_checkpoint.py` makes one. These commands are measured:

1. `cp -r` of the checkpoint and its vision tower to another folder of WORKDIR. This is the minimum that an export must
   do: read all weights and write them. Copy-on-write, copy offload and holes are disabled, so that all bytes are read
   and written.
2. `optimum-cli export openvino --model CHECKPOINT OUT --weight-format ...`, offline.
3. For all families but `mpt`, the same export of a narrow checkpoint with as many layers. This is the time for
   imports and tracing, which the weights do not change.

All run under the same conditions. Before each, everything is written to disk and the source files are dropped from
the page cache (`posix_fadvise`, which does not need root), so all read from a cold disk. Two times are reported:
until the command ends, and until all its files are written to disk (fsync of each). The second is compared, because
data in the page cache is not written yet. The copy is deleted before the export starts.

Targets of `mpt`: up to 2 x cp + 40 s, and up to 1.5 GB of anonymous memory at 7b in fp16. Targets of the others: up to
1.3 x (cp + narrow export) in fp16, and up to 1.1 GB of anonymous memory at 7b (int4: 2.5 GB) and 1.5 GB at 13b and 34b
(int4: 3.5 GB).

The result is printed and written to `WORKDIR/export-FAMILY-SIZE-FORMAT.json`, with versions, machine and memory over
time. The copy, the bundle, and a checkpoint that this run made are deleted at the end, unless `--keep` is given. The
logs stay. At 7b in fp16 this takes 30 GB of disk. OpenVINO sends telemetry, which takes time; `CI=true` in the
environment disables it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from machine import machine, versions
from measure import disk_usage, run_measured
from random_checkpoint import is_complete, random_folder, write_random_checkpoint
from random_families import add_family_arguments, add_layers_argument, check_family_arguments


MPT_COPY_FACTOR, MPT_EXTRA_SECONDS, COPY_FACTOR = 2, 40, 1.3
# Anonymous memory, by size and weight format
MPT_ANONYMOUS_LIMIT = 1.5e9
ANONYMOUS_LIMITS = {("7b", "fp16"): 1.1e9, ("7b", "int4"): 2.5e9, ("13b", "fp16"): 1.5e9, ("13b", "int4"): 3.5e9}
ANONYMOUS_LIMITS |= {("34b", "fp16"): 1.5e9, ("34b", "int4"): 3.5e9}


def benchmark(
    workdir: Path, family: str, size: str, weight_format: str, keep: bool, layers: int | None = None
) -> dict:
    """Make the checkpoint if needed, copy it and export it. Return the values that are written as JSON."""
    source, copied, exported = random_folder(workdir, size, family, layers), workdir / "copied", workdir / "exported"
    narrow = workdir / "narrow"
    scratch = [copied, exported, narrow]
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    if not is_complete(source):
        scratch.append(source)
        write_random_checkpoint(source, size, family=family, layers=layers)
    name = f"{family}-{size}-{weight_format}"
    try:
        copy = _run_cold(copy_command(source, copied), source, copied, workdir / f"cp-{family}-{size}.log")
        shutil.rmtree(copied)
        tracing = None
        if family != "mpt":
            write_random_checkpoint(narrow, size, family=family, narrow=True, layers=layers)
            tracing = _export_cold(narrow, exported, weight_format, workdir / f"narrow-{name}.log")
            shutil.rmtree(exported)
        export = _export_cold(source, exported, weight_format, workdir / f"export-{name}.log")
        result = {
            "family": family,
            "size": size,
            "layers": layers,
            "weight_format": weight_format,
            "machine": machine(),
            "versions": versions(),
            "source_bytes": disk_usage(source),
            "bundle_bytes": disk_usage(exported),
            "copy": copy,
            "tracing": tracing,
            "export": export,
        }
        result["criteria"] = criteria(result)
        return result
    finally:
        for folder in [] if keep else scratch:
            shutil.rmtree(folder, ignore_errors=True)


def copy_command(source: Path, target: Path) -> list[str | Path]:
    """Return a `cp` command without shortcuts of the file system."""
    return ["cp", "-r", "--reflink=never", "--sparse=never", source, target]


def export_command(checkpoint: Path, bundle: Path, weight_format: str) -> list[str | Path]:
    """Return the export command of this Python's `optimum-cli`."""
    cli = Path(sys.executable).with_name("optimum-cli")
    return [cli, "export", "openvino", "--model", checkpoint, bundle, "--weight-format", weight_format]


def criteria(result: dict) -> dict:
    """Return the targets, and whether they are met. A limit is `None` if there is no target."""
    copy, tracing, export = result["copy"]["seconds_synced"], result["tracing"], result["export"]
    anonymous_limit = ANONYMOUS_LIMITS.get((result["size"], result["weight_format"]))
    if not tracing:
        anonymous_limit = MPT_ANONYMOUS_LIMIT
        seconds_limit = MPT_COPY_FACTOR * copy + MPT_EXTRA_SECONDS
        seconds_target = f"{MPT_COPY_FACTOR} x cp + {MPT_EXTRA_SECONDS} s"
    elif result["weight_format"] == "fp16":
        seconds_limit = COPY_FACTOR * (copy + tracing["seconds_synced"])
        seconds_target = f"{COPY_FACTOR} x (cp + narrow export)"
    else:
        seconds_limit = seconds_target = None
    return {
        "seconds_target": seconds_target,
        "seconds_limit": seconds_limit,
        "seconds_met": None if seconds_limit is None else export["seconds_synced"] <= seconds_limit,
        "ratio": export["seconds_synced"] / copy,
        "anonymous_limit": anonymous_limit,
        "anonymous_met": None if anonymous_limit is None else export["peak_anonymous"] <= anonymous_limit,
    }


def _export_cold(source: Path, folder: Path, weight_format: str, log: Path) -> dict:
    """Export `source` to `folder/bundle`. The export writes temporary files next to the bundle."""
    folder.mkdir()
    return _run_cold(export_command(source / "checkpoint", folder / "bundle", weight_format), source, folder, log)


def _run_cold(command: list[str | Path], source: Path, target: Path, log: Path) -> dict:
    """Run a command that reads `source` from a cold disk and writes `target`. See the module's description."""
    evict(source)
    measurement = run_measured(command, env={"HF_HUB_OFFLINE": "1"}, watch=target, log=log)
    if measurement.exit_code:
        raise SystemExit(f"{command[0]} ended with {measurement.exit_code}. End of {log}:\n{log.read_text()[-2000:]}")
    started = time.monotonic()
    _for_each_file(target, os.fsync)
    seconds_synced = measurement.seconds + time.monotonic() - started
    return {"command": [str(part) for part in command], "seconds_synced": seconds_synced, **asdict(measurement)}


def evict(folder: Path) -> None:
    """Write everything to disk and drop the folder's files from the page cache."""
    os.sync()
    _for_each_file(folder, lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))


def _for_each_file(folder: Path, function) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                function(descriptor)
            finally:
                os.close(descriptor)


def table(result: dict) -> str:
    """Return the result as text: the commands side by side, then the targets."""
    targets = result["criteria"]
    commands = {"cp": result["copy"], "narrow export": result["tracing"], "export": result["export"]}
    commands = {name: measured for name, measured in commands.items() if measured}
    rows = [
        ("", *commands),
        *(
            (label, *(f"{measured[name]:.1f} s" for measured in commands.values()))
            for label, name in [("time", "seconds"), ("time, synced", "seconds_synced"), ("CPU time", "cpu_seconds")]
        ),
        *(
            (label, *(_gigabytes(measured[name]) for measured in commands.values()))
            for label, name in [
                ("peak anonymous memory", "peak_anonymous"),
                ("peak RSS", "peak_rss"),
                ("peak disk of output", "peak_disk"),
            ]
        ),
    ]
    machine = result["machine"]
    lines = [
        f"Export of {result['family']} {result['size']} to {result['weight_format']}: "
        f"{_gigabytes(result['source_bytes'])} to {_gigabytes(result['bundle_bytes'])}; "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{_gigabytes(machine['memory_bytes'])} memory, load {machine['load'][0]:.1f}",
        *(f"{label:<24}" + "".join(f"{cell:>15}" for cell in cells) for label, *cells in rows),
        f"time / cp {targets['ratio']:.2f}",
    ]
    if targets["seconds_limit"] is not None:
        target = f"{targets['seconds_target']} = {targets['seconds_limit']:.1f} s"
        lines.append(f"time; target {target}: {_met(targets['seconds_met'])}")
    if targets["anonymous_limit"] is not None:
        target = _gigabytes(targets["anonymous_limit"])
        lines.append(f"anonymous memory; target {target}: {_met(targets['anonymous_met'])}")
    return "\n".join(lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    add_family_arguments(parser, default_size="7b")
    add_layers_argument(parser)
    parser.add_argument("--weight-format", default="fp16")
    parser.add_argument("--keep", action="store_true", help="do not delete checkpoint and bundle")
    arguments = parser.parse_args()
    check_family_arguments(parser, arguments)
    family, size, weight_format = arguments.family, arguments.size, arguments.weight_format

    result = benchmark(arguments.workdir, family, size, weight_format, arguments.keep, arguments.layers)
    file = arguments.workdir / f"export-{family}-{size}-{weight_format}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
