"""Run the campaign.

PYTHONPATH=tests python -m fuzz --seconds 3600
PYTHONPATH=tests python -m fuzz --seed 0 --only images --number 17
"""

import argparse
import sys
import tempfile
from pathlib import Path

from fuzz.campaign import ROUNDS, rounds, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, help="How many rounds (default: 1, without --seconds).")
    parser.add_argument("--seconds", type=float, help="How long.")
    parser.add_argument("--seed", default="0", help="Another one tries other things (default: %(default)s).")
    parser.add_argument("--first", type=int, default=0, help="The round to begin with (default: %(default)s).")
    parser.add_argument("--only", choices=ROUNDS, action="append", help="One kind of input; may be repeated.")
    parser.add_argument("--number", type=int, help="With --only, this attempt alone.")
    parser.add_argument("--bundle", type=Path, help="Of tests/golden/linear_fp16_sharded (default: exported anew).")
    args = parser.parse_args()

    names = args.only or list(ROUNDS)
    count = 1 if args.rounds is None and args.seconds is None else args.rounds
    tasks = rounds(names, count, args.seconds, args.first)
    if args.number is not None:
        tasks = ((name, args.number) for name in names)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        report = run(tasks, args.seed, Path(folder), args.bundle or _export(Path(folder) / "bundle"))
    print(f"{report.table()}\n\nSeed {args.seed}, {report.seconds:.0f} seconds.")
    return 1 if report.findings else 0


def _export(folder: Path) -> Path:
    from conftest import Golden

    from optimum_llava_ov import main_export

    main_export(Golden("linear_fp16_sharded").checkpoint, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
