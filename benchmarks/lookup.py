"""Measure what a pass of several tokens takes, beside a pass of one token: the price of a guess.

    python benchmarks/lookup.py BUNDLE [--tokens 1 2 3 4 6 8] [--prompt 640] [--repeats 8] [--avx2]

Prompt lookup (`generate(..., prompt_lookup_num_tokens=N)`) and assistants guess the next N tokens and check all in one
pass of N + 1 tokens. Each pass gives one token more than the guesses that were right. So guesses pay if on average
more are right than the last column says. The passes take turns after one prompt, and medians are printed.

`--avx2` measures the class of processors that have AVX2 and nothing newer, on a processor that has more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from engines import AVX2_ENV, OUR_AVX2_CONFIG
from machine import machine

from optimum_llava_ov import OVModelForLlava


def measure(bundle: Path, tokens: list[int], prompt: int, repeats: int, ov_config: dict) -> dict[int, float]:
    """Return the median seconds of a pass for each number of tokens."""
    model = OVModelForLlava.from_pretrained(bundle, ov_config=ov_config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30_000, (1, prompt), generator=generator)
    past = model(input_ids=ids, attention_mask=torch.ones_like(ids)).past_key_values
    length = prompt
    times: dict[int, list[float]] = {count: [] for count in tokens}
    for _ in range(repeats + 1):
        for count in tokens:
            ids = torch.randint(1000, 30_000, (1, count), generator=generator)
            length += count
            started = time.perf_counter()
            past = model(
                input_ids=ids, attention_mask=torch.ones(1, length, dtype=torch.long), past_key_values=past
            ).past_key_values
            times[count].append(time.perf_counter() - started)
    return {count: statistics.median(of_count[1:]) for count, of_count in times.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--prompt", type=int, default=640, help="tokens before the passes")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--avx2", action="store_true", help="hide newer instructions from multiplications")
    arguments = parser.parse_args()
    if arguments.avx2:  # oneDNN reads the variable when it first multiplies
        os.environ |= AVX2_ENV
    print(machine())
    medians = measure(
        arguments.bundle,
        sorted({1, *arguments.tokens}),
        arguments.prompt,
        arguments.repeats,
        OUR_AVX2_CONFIG if arguments.avx2 else {},
    )
    for count, median in medians.items():
        ratio = median / medians[1]
        print(f"{count:>3} tokens  {1000 * median:7.1f} ms  {ratio:.2f} of one  {ratio - 1:.2f} right guesses pay")


if __name__ == "__main__":
    main()
