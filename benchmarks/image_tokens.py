"""Measure what fewer tokens for an image cost: exact answers of a shapes model, by number of tokens and method.

    python benchmarks/image_tokens.py [--family llama|mpt] [--num 100] [--merge 9 8 7 6 5 4 3] [--pool 4 1]

Each setting is the torch model with that reduction in its image encoder, asked in the same held-out conversations. The
images of these models have 9 patches. The result is printed as a table, by kind of question.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

from evaluate import TorchChat, evaluate  # noqa: E402
from families import FAMILIES  # noqa: E402

from optimum_llava_ov.checkpoint.image_tokens import METHODS  # noqa: E402
from optimum_llava_ov.samples.shapes import KINDS, held_out  # noqa: E402


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--num", type=int, default=100, help="number of conversations")
    for method, default in zip(METHODS, ([9, 8, 7, 6, 5, 4, 3], [4, 1])):
        parser.add_argument(f"--{method}", nargs="*", type=int, default=default, help="numbers of tokens")
    arguments = parser.parse_args()

    family = FAMILIES[arguments.family]
    print(f"| method | tokens | {' | '.join(KINDS)} | **all** |\n|{' --- |' * (len(KINDS) + 3)}", flush=True)
    for method in METHODS:
        for count in getattr(arguments, method):
            chat = TorchChat(SHAPES / family.checkpoint, image_tokens=count, image_token_method=method)
            conversations = held_out(arguments.num, 0, family.held_out_scene)
            asked, right, _ = evaluate(chat, conversations, arguments.num)
            cells = [f"{right[kind] / max(1, asked[kind]):.1%}" for kind in KINDS]
            cells.append(f"{right.total() / asked.total():.1%} of {asked.total()}")
            print(f"| {method} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
