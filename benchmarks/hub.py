"""Measure how much more memory it takes to publish and load a large bundle than a small one. No file may be in memory.

    python benchmarks/hub.py [--gigabytes 4] [--folder <with space for three times as much>]

The Hub is `tests/hub_server.py`, in a separate process. The large bundle is the shapes model, with random bytes
appended to its weights file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Measurement, run_measured


ROOT = Path(__file__).parent.parent
TARGET = 200e6  # bytes
LOAD = "from optimum_llava_ov import OVModelForLlavaMPT; OVModelForLlavaMPT.from_pretrained('me/model', compile=False)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bundle = Path(folder) / "bundle"
        export = ["optimum-cli", "export", "openvino", "--model", ROOT / "examples" / "shapes" / "checkpoint", bundle]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        small = measure(bundle, Path(folder) / "small")
        with (bundle / "openvino_language_model.bin").open("ab") as file:
            block = os.urandom(1 << 24)
            file.writelines(block for _ in range(int(args.gigabytes * 1e9) >> 24))
        large = measure(bundle, Path(folder) / "large")
    print(f"{'':10}{'small bundle':>16}{f'{args.gigabytes:g} GB':>12}{'growth':>12}{'seconds':>10}")
    for step, (before, after) in {"upload": (small[0], large[0]), "download": (small[1], large[1])}.items():
        growth = after.peak_anonymous - before.peak_anonymous
        peaks = f"{before.peak_anonymous / 1e6:13.0f} MB{after.peak_anonymous / 1e6:9.0f} MB{growth / 1e6:9.0f} MB"
        print(f"{step:10}{peaks}{after.seconds:10.0f}   (target: below {TARGET / 1e6:.0f} MB)")


def measure(bundle: Path, folder: Path) -> tuple[Measurement, Measurement]:
    """Push and load a bundle, both with an empty cache. `folder` is deleted afterwards."""
    command = [sys.executable, ROOT / "tests" / "hub_server.py", folder / "server"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        env = {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_me"}
        env |= {"HF_HUB_CACHE": str(folder / "home" / "hub"), "HF_HUB_OFFLINE": "0"}
        push = run_measured(["optimum-cli", "llava-ov", "push", bundle, "me/model"], env)
        load = run_measured([sys.executable, "-c", LOAD], env)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)
    if push.exit_code or load.exit_code:
        raise SystemExit("Pushing or loading failed; see above.")
    return push, load


if __name__ == "__main__":
    main()
