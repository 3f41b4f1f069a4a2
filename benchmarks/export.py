"""Measure the export of a full-size checkpoint: time, memory and disk.

    python benchmarks/export.py WORKDIR [--size 7b] [--weight-format fp16] [--keep]

It uses a random checkpoint. If WORKDIR has none, `random_checkpoint.py` makes one. Two commands are measured:

1. `cp -r` of the checkpoint and its vision tower to another folder of WORKDIR. This is the minimum that an export must
   do: read all weights and write them. Copy-on-write, copy offload and holes are disabled, so that all bytes are read
   and written.
2. `optimum-cli export openvino --model CHECKPOINT OUT --weight-format ...`, offline.

Both run under the same conditions. Before each, everything is written to disk and the source files are dropped from
the page cache (`posix_fadvise`, which does not need root), so both read from a cold disk. Two times are reported:
until the command ends, and until all its files are written to disk (fsync of each). The second is compared, because
data in the page cache is not written yet. The copy is deleted before the export starts.

Targets: up to 2 x cp + 40 s, and up to 1.5 GB of anonymous memory at 7b in fp16.

The result is printed and written to `WORKDIR/export-SIZE-FORMAT.json`, with versions, machine and memory over time.
The copy, the bundle, and a checkpoint that this run made are deleted at the end, unless `--keep` is given. The two
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
from random_checkpoint import is_complete, write_random_checkpoint
from random_families import FAMILIES


COPY_FACTOR, EXTRA_SECONDS = 2, 40
ANONYMOUS_LIMIT = 1.5e9


def benchmark(workdir: Path, size: str, weight_format: str, keep: bool) -> dict:
    """Make the checkpoint if needed, copy it and export it. Return the values that are written as JSON."""
    source, copied, exported = workdir / f"random-{size}", workdir / "copied", workdir / "exported"
    scratch = [copied, exported]
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    if not is_complete(source):
        scratch.append(source)
        write_random_checkpoint(source, size)
    try:
        copy = _run_cold(copy_command(source, copied), source, copied, workdir / f"cp-{size}.log")
        shutil.rmtree(copied)
        exported.mkdir()  # the export writes temporary files next to the bundle
        command = export_command(source / "checkpoint", exported / "bundle", weight_format)
        export = _run_cold(command, source, exported, workdir / f"export-{size}-{weight_format}.log")
        result = {
            "size": size,
            "weight_format": weight_format,
            "machine": machine(),
            "versions": versions(),
            "source_bytes": disk_usage(source),
            "bundle_bytes": disk_usage(exported),
            "copy": copy,
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
    """Return the two targets, and whether they are met."""
    copy, export = result["copy"], result["export"]
    limit = COPY_FACTOR * copy["seconds_synced"] + EXTRA_SECONDS
    return {
        "seconds_limit": limit,
        "seconds_met": export["seconds_synced"] <= limit,
        "ratio": export["seconds_synced"] / copy["seconds_synced"],
        "anonymous_limit": ANONYMOUS_LIMIT,
        "anonymous_met": export["peak_anonymous"] <= ANONYMOUS_LIMIT,
    }


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
    """Return the result as text: `cp` and the export side by side, then the targets."""
    copy, export, targets = result["copy"], result["export"], result["criteria"]
    rows = [
        ("", "cp", "export"),
        *(
            (f"{label}", f"{copy[name]:.1f} s", f"{export[name]:.1f} s")
            for label, name in [("time", "seconds"), ("time, synced", "seconds_synced"), ("CPU time", "cpu_seconds")]
        ),
        *(
            (label, _gigabytes(copy[name]), _gigabytes(export[name]))
            for label, name in [
                ("peak anonymous memory", "peak_anonymous"),
                ("peak RSS", "peak_rss"),
                ("peak disk of output", "peak_disk"),
            ]
        ),
        ("disk of result", _gigabytes(result["source_bytes"]), _gigabytes(result["bundle_bytes"])),
    ]
    machine = result["machine"]
    lines = [
        f"Export of {result['size']} to {result['weight_format']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{_gigabytes(machine['memory_bytes'])} memory, load {machine['load'][0]:.1f}",
        *(f"{label:<24}{first:>12}{second:>12}" for label, first, second in rows),
        f"time / cp {targets['ratio']:.2f}; target {COPY_FACTOR} x cp + {EXTRA_SECONDS} s = "
        f"{targets['seconds_limit']:.1f} s: {_met(targets['seconds_met'])}",
        f"anonymous memory; target {_gigabytes(targets['anonymous_limit'])}: {_met(targets['anonymous_met'])}",
    ]
    return "\n".join(lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--size", choices=FAMILIES["mpt"].sizes, default="7b")
    parser.add_argument("--weight-format", default="fp16")
    parser.add_argument("--keep", action="store_true", help="do not delete checkpoint and bundle")
    arguments = parser.parse_args()

    result = benchmark(arguments.workdir, arguments.size, arguments.weight_format, arguments.keep)
    file = arguments.workdir / f"export-{arguments.size}-{arguments.weight_format}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
