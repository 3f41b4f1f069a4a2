"""Measure the kernel for compressed weights beside OpenVINO's: one matrix of a 7B, for several numbers of tokens.

    python benchmarks/matmul.py [--tokens 1 8 512] [--repeats 20]

Both run the same compressed weights, in turns. Several copies of the matrix are used one after the other, so that
they come from memory and not from the processor's cache, as in a model. Medians and their ratios are printed, with the
error of the product: root mean square, relative to the product in float.

`--avx2` measures the class of processors that have AVX2 and nothing newer, on a processor that has more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import nncf
import numpy as np
import openvino
from engines import AVX2_CONFIG, AVX2_ENV
from machine import machine
from openvino import opset8 as ops

from optimum_llava_ov.kernels.extension import with_compressed_matmuls


ROWS, COLUMNS, COPIES = 11008, 4096, 4  # of the feed-forward layer of LLaMA 7B
MODES = {
    "int4, groups of 128": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 128, "all_layers": True},
    "int8, a scale for each row": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
}


def compressed(weights: np.ndarray, options: dict) -> openvino.Model:
    """Return the graph of `x (tokens, columns) @ weights (rows, columns).T`, compressed by NNCF."""
    x = ops.parameter([-1, weights.shape[1]], np.float32)
    model = openvino.Model([ops.matmul(x, ops.constant(weights), False, True)], [x])
    return nncf.compress_weights(model, **options)


def measure(options: dict, tokens: list[int], repeats: int, openvino_config: dict) -> list[str]:
    """Return a line for each number of tokens."""
    generator, core = np.random.default_rng(0), openvino.Core()
    models = [
        compressed(generator.standard_normal((ROWS, COLUMNS)).astype(np.float32), options) for _ in range(COPIES)
    ]
    exact = core.compile_model(models[0], "CPU", AVX2_CONFIG).create_infer_request()
    requests = {
        "kernel": [
            core.compile_model(with_compressed_matmuls(model), "CPU").create_infer_request() for model in models
        ],
        "OpenVINO": [core.compile_model(model, "CPU", openvino_config).create_infer_request() for model in models],
    }
    lines = []
    for count in tokens:
        x = generator.standard_normal((count, COLUMNS)).astype(np.float32)
        expected = exact.infer([x])[0].copy()
        times: dict[str, list[float]] = {name: [] for name in requests}
        errors = {}
        for name, copies in requests.items():
            errors[name] = np.sqrt(np.square(copies[0].infer([x])[0] - expected).mean() / np.square(expected).mean())
        for _ in range(repeats):
            for index in range(COPIES):
                for name, copies in requests.items():
                    started = time.perf_counter()
                    copies[index].infer([x])
                    times[name].append(time.perf_counter() - started)
        ours, theirs = (1000 * statistics.median(times[name]) for name in ("kernel", "OpenVINO"))
        lines.append(
            f"{count:>6} tokens  kernel {ours:8.2f} ms  OpenVINO {theirs:8.2f} ms  ratio {ours / theirs:.2f}  "
            f"error {errors['kernel']:.4f} and {errors['OpenVINO']:.4f}"
        )
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--avx2", action="store_true", help="hide newer instructions from OpenVINO's kernel")
    arguments = parser.parse_args()
    if arguments.avx2:  # oneDNN reads the variable when it first multiplies
        os.environ |= AVX2_ENV
    print(machine())
    for name, options in MODES.items():
        print(name)
        for line in measure(options, arguments.tokens, arguments.repeats, AVX2_CONFIG if arguments.avx2 else {}):
            print(line, flush=True)


if __name__ == "__main__":
    main()
