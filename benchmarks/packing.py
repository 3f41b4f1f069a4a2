"""Measure how long OpenVINO copies the weights of a language model into the layout of its kernels.

    python benchmarks/packing.py BUNDLE [--ov-config '{"CACHE_DIR": "cache", "CACHE_MODE": "OPTIMIZE_SPEED"}']

It reads, compiles and runs the graph for one token, twice. The first run copies. Seconds, processor time and anonymous
memory are printed. With a cache, run the program twice: the second time, the compiled model comes from the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import psutil
from machine import machine


def timed(name: str, function: Callable[[], Any]) -> Any:
    """Call a function, and print what it took."""
    process = psutil.Process()
    cpu, started = process.cpu_times(), time.perf_counter()
    result = function()
    seconds, now, memory = time.perf_counter() - started, process.cpu_times(), process.memory_info()
    print(
        f"{name:<10} {seconds:6.2f} s, of the processor {now.user - cpu.user:6.2f} s, of the system "
        f"{now.system - cpu.system:5.2f} s, anonymous memory {(memory.rss - memory.shared) / 1e9:.2f} GB",
        flush=True,
    )
    return result


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ov-config", type=json.loads, default={}, help="options of OpenVINO, as JSON")
    arguments = parser.parse_args()
    print(machine())

    core = openvino.Core()
    model = timed("read", lambda: core.read_model(arguments.bundle / "openvino_language_model.xml"))
    compiled = timed("compile", lambda: core.compile_model(model, "CPU", arguments.ov_config))
    request = compiled.create_infer_request()
    width = compiled.input("inputs_embeds").get_partial_shape()[2].get_length()
    inputs = {
        "inputs_embeds": np.zeros((1, 1, width), np.float32),
        "attention_mask": np.ones((1, 1), np.int64),
        "position_ids": np.zeros((1, 1), np.int64),
        "beam_idx": np.zeros(1, np.int32),
    }
    names = {name for port in compiled.inputs for name in port.get_names()}
    for run in ("first run", "second run"):
        request.reset_state()
        timed(run, lambda: request.infer({name: value for name, value in inputs.items() if name in names}))


if __name__ == "__main__":
    main()
