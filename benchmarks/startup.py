"""Measure how much longer `import` and `optimum-cli --help` take if this package is installed.

    python benchmarks/startup.py [--rounds 9]

Runs are interleaved, and medians are compared. "Without" is a process in which the package cannot be imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'optimum_llava_ov': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import logging; logging.disable(logging.ERROR)
"""
HELP = """
import sys
sys.argv = ["optimum-cli", "--help"]
from optimum.commands.optimum_cli import main
main()
"""
PROGRAMS = {
    "import optimum": "import optimum",
    "import optimum, optimum_llava_ov": "import optimum, optimum_llava_ov",
    "optimum-cli --help without": WITHOUT + HELP,
    "optimum-cli --help with": HELP,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, code in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:36}{median:8.3f} s")
    print(
        f"import: {medians['import optimum, optimum_llava_ov'] - medians['import optimum']:+.3f} s "
        "(target: below 0.3 s)"
    )
    ratio = medians["optimum-cli --help with"] / medians["optimum-cli --help without"]
    print(f"optimum-cli --help: {ratio:.2f} x (target: at most 1.1 x)")


if __name__ == "__main__":
    main()
