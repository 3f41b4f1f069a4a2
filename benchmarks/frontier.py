"""Compare speed and quality of recipes and activation group sizes, for the language model alone.

    python benchmarks/frontier.py WORKDIR [--size 1.3b] [--rounds 2] [--kernel]

Exports a random checkpoint once for each recipe, and once in fp16. Then each pair of recipe and
DYNAMIC_QUANTIZATION_GROUP_SIZE runs in a separate process, in turn: a prompt of 300 tokens, then single tokens.
Quality is the divergence (KL, nats per token) from the fp16 model computed in float32. Prints a table in Markdown,
fastest first.

With `--kernel`, each recipe also runs with this package's kernel for AVX2, both in f32. To compare their speed on a
processor that has more, hide it from OpenVINO's kernel: `ONEDNN_MAX_CPU_ISA=AVX2`.

The weights are random, so they have no structure and no outliers. KL therefore tells how much noise a choice adds, not
whether answers change. For that, use `recipes.py`, or `optimum-cli llava-ov eval` on your own model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino
from export import export_command
from random_checkpoint import is_complete, write_random_checkpoint
from random_families import FAMILIES

from optimum_llava_ov.kernels.extension import AVX2, MATMUL_KERNEL, with_compressed_matmuls


PROMPT, NEW_TOKENS = 300, 32
INT4 = ["--weight-format", "int4"]
RECIPES = {
    "int8": ["--weight-format", "int8"],
    "int4 (default: asym g128 r0.8)": INT4,
    "int4 asym g128 r1.0": [*INT4, "--group-size", "128", "--ratio", "1.0"],
    "int4 sym g128 r1.0": [*INT4, "--sym", "--group-size", "128", "--ratio", "1.0"],
    "int4 asym g64 r1.0": [*INT4, "--group-size", "64", "--ratio", "1.0"],
    "int4 sym per channel r1.0": [*INT4, "--sym", "--group-size", "-1", "--ratio", "1.0"],
}
GROUPS = {"int4 (default: asym g128 r0.8)": [None, 64, 32, 0]}  # None: as exported
KERNEL = "this package's kernel"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
REFERENCE = {**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--size", choices=FAMILIES["mpt"].sizes, default="1.3b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--kernel", action="store_true", help="also measure this package's kernel for AVX2")
    parser.add_argument("--one", nargs=3, metavar=("BUNDLE", "SETTINGS", "LOGITS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(Path(args.one[0]), json.loads(args.one[1]), Path(args.one[2]))))
        return

    source = args.workdir / f"random-{args.size}"
    if not is_complete(source):
        write_random_checkpoint(source, args.size)
    reference = export(source, args.workdir / "fp16", ["--weight-format", "fp16"])
    folders = {name: args.workdir / f"recipe-{number}" for number, name in enumerate(RECIPES)}
    bundles = {name: export(source, folders[name], RECIPES[name]) for name in args.recipes}

    run_alone(reference, REFERENCE, args.workdir / "reference.npy")
    expected = np.load(args.workdir / "reference.npy")
    pairs = [(name, group) for name in args.recipes for group in GROUPS.get(name, [None])]
    if args.kernel:
        pairs = [(name, group) for name in args.recipes for group in (None, KERNEL)]
    results = {pair: [] for pair in pairs}
    for _ in range(args.rounds):
        for name, group in pairs:
            settings = {**F32} if args.kernel else {}
            if group == KERNEL:
                settings[MATMUL_KERNEL] = AVX2
            elif group is not None:
                settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(group)
            found = run_alone(bundles[name], settings, args.workdir / "logits.npy")
            found["kl"] = divergence(expected, np.load(args.workdir / "logits.npy"))
            results[name, group].append(found)
    print(table(results))


def export(source: Path, folder: Path, options: list[str]) -> Path:
    """Export the random checkpoint, unless the bundle exists."""
    if not (folder / "config.json").exists():
        command = export_command(source / "checkpoint", folder, "")[:5]
        subprocess.run([*command, folder, *options], check=True, env={**os.environ, "CI": "true"})
    return folder


def run_alone(bundle: Path, settings: dict[str, str], logits: Path) -> dict[str, float]:
    command = [sys.executable, __file__, ".", "--one", str(bundle), json.dumps(settings), str(logits)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run(bundle: Path, settings: dict[str, str], logits: Path) -> dict[str, float]:
    """Measure the seconds of a prompt and of a token after warm-up, and write the prompt's log-probabilities."""
    core = openvino.Core()
    model = core.read_model(bundle / "openvino_language_model.xml")
    if settings.pop(MATMUL_KERNEL, None):
        model = with_compressed_matmuls(model)
    compiled = core.compile_model(model, "CPU", settings)
    embed = core.compile_model(bundle / "openvino_text_embeddings_model.xml", "CPU")
    embeds = embed(np.random.default_rng(0).integers(0, 50_000, (1, PROMPT)))[0]
    request = compiled.create_infer_request()
    prompts, tokens = [], []
    for _ in range(3):
        request.reset_state()
        prompts.append(step(request, embeds, 0))
        np.save(logits, log_softmax(request.get_tensor("logits").data[0]))
        tokens += [step(request, embeds[:, index : index + 1], PROMPT + index) for index in range(NEW_TOKENS)]
    return {"prompt": statistics.median(prompts[1:]), "token": statistics.median(tokens[NEW_TOKENS:])}


def step(request: openvino.InferRequest, embeds: np.ndarray, past: int) -> float:
    length = embeds.shape[1]
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, past + length), np.int64),
        "position_ids": np.zeros((1, length), np.int64),
        "beam_idx": np.zeros(1, np.int32),
    }
    started = time.perf_counter()
    request.infer(inputs, share_inputs=True, share_outputs=True)
    return time.perf_counter() - started


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())


def table(results: dict[tuple[str, int | str | None], list[dict[str, float]]]) -> str:
    rows = []
    for (name, group), runs in results.items():
        prompt, token = (statistics.median(run[key] for run in runs) for key in ("prompt", "token"))
        cells = [
            name,
            "as exported" if group is None else str(group),
            f"{1 / token:.1f}",
            f"{PROMPT / prompt:.0f}",
            f"{runs[0]['kl']:.1e}",
        ]
        rows.append((token, f"| {' | '.join(cells)} |"))
    lines = [
        "| recipe | activations in groups of | decode, tokens/s | prompt, tokens/s | KL |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


if __name__ == "__main__":
    main()
