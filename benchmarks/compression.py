"""Compare this package's export with int4 weights with that of Optimum, in time, memory and disk.

    python benchmarks/compression.py WORKDIR [--size 7b]

- `one pass`: `optimum-cli export openvino --weight-format int4`. NNCF compresses each traced part before it is
written. - `two passes`: what Optimum does for other models. Everything is exported to a temporary folder, loaded with
Optimum's
  own class, compressed and written. The first pass is Optimum's unchanged export, which traces each part twice, with
  our reader of the checkpoint, because Optimum has none. The second pass runs in a process that cannot import this
  package.

They run one after the other. Before each, the checkpoint's files are evicted from the page cache. Disk is the maximum
size of the output folder's parent while the command runs. If WORKDIR has no random checkpoint, one is made. At 7b this
takes 30 GB of free disk in all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from export import evict, machine, versions
from measure import Measurement, disk_usage, run_measured
from random_checkpoint import is_complete, write_random_checkpoint


FIRST_PASS = """
import contextlib, sys
from optimum.intel import OVConfig
from optimum_llava_ov import host
from optimum_llava_ov.export import pipeline as main
host.exporting = lambda *args: contextlib.nullcontext()
main.read_ahead = lambda files: None
main.main_export(sys.argv[1], sys.argv[2], ov_config=OVConfig(dtype="fp16"))
"""
SECOND_PASS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'optimum_llava_ov': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from optimum.exporters.openvino.__main__ import _main_quantize
folder, recipe = Path(sys.argv[1]), {"bits": 4, "sym": False, "group_size": 128, "ratio": 0.8}
_main_quantize(str(folder), "image-text-to-text", "transformers", recipe, folder, None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--size", choices=["7b", "1.3b"], default="7b")
    parser.add_argument("--skip-two-passes", action="store_true")
    args = parser.parse_args()
    folder = args.workdir / f"random-{args.size}"
    if not is_complete(folder):
        write_random_checkpoint(folder, args.size)
    results = {"one pass": one_pass(folder / "checkpoint", args.workdir / "one-pass")}
    size = disk_usage(args.workdir / "one-pass")
    shutil.rmtree(args.workdir / "one-pass")
    if not args.skip_two_passes:
        results["two passes"] = two_passes(folder / "checkpoint", args.workdir / "two-passes")
        shutil.rmtree(args.workdir / "two-passes")
    report(results, size, args)


def one_pass(checkpoint: Path, output: Path) -> Measurement:
    output.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("optimum-cli")
    command = [program, "export", "openvino", "--model", checkpoint, "--weight-format", "int4", output / "bundle"]
    evict(checkpoint.parent)
    return _run(command, output, output.parent / "one-pass.log")


def two_passes(checkpoint: Path, output: Path) -> Measurement:
    output.mkdir(parents=True, exist_ok=True)
    evict(checkpoint.parent)
    first = _run([sys.executable, "-c", FIRST_PASS, checkpoint, output], output, output.parent / "first.log")
    second = _run([sys.executable, "-c", SECOND_PASS, output], output, output.parent / "second.log")
    return Measurement(
        seconds=first.seconds + second.seconds,
        cpu_seconds=first.cpu_seconds + second.cpu_seconds,
        peak_anonymous=max(first.peak_anonymous, second.peak_anonymous),
        peak_rss=max(first.peak_rss, second.peak_rss),
        peak_disk=max(first.peak_disk, second.peak_disk),
    )


def _run(command: list, watch: Path, log: Path) -> Measurement:
    measurement = run_measured(command, watch=watch, log=log)
    assert measurement.exit_code == 0, log.read_text()[-2000:]
    return measurement


def report(results: dict[str, Measurement], size: int, args: argparse.Namespace) -> None:
    print(f"{'':12}{'time':>10}{'CPU':>10}{'anonymous':>12}{'RSS':>12}{'disk':>12}")
    for name, m in results.items():
        values = (m.peak_anonymous, m.peak_rss, m.peak_disk)
        print(
            f"{name:12}{m.seconds:>8.1f} s{m.cpu_seconds:>8.1f} s"
            + "".join(f"{value / 1e9:>9.2f} GB" for value in values)
        )
    one = results["one pass"]
    print(f"\nbundle {size / 1e9:.2f} GB; peak disk {one.peak_disk / size:.2f} x the bundle")
    if "two passes" in results:
        print(f"time {one.seconds / results['two passes'].seconds:.2f} x two passes")
    file = args.workdir / f"compression-{args.size}.json"
    values = {
        name: {key: getattr(m, key) for key in ("seconds", "cpu_seconds", "peak_anonymous", "peak_rss", "peak_disk")}
        for name, m in results.items()
    }
    file.write_text(
        json.dumps({"results": values, "bundle_bytes": size, "machine": machine(), "versions": versions()}, indent=2)
        + "\n"
    )
    print(f"Wrote {file}")


if __name__ == "__main__":
    main()
