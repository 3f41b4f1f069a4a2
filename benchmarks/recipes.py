"""Compare compression recipes on the shapes model: exact answers, KL, size and speed.

    python benchmarks/recipes.py WORKDIR [--num-samples 400]

Exports the checkpoint of this repository once for each recipe, compares all bundles with the checkpoint in torch as
`optimum-cli llava-ov eval` does, and prints a table in Markdown. Data-aware recipes are calibrated on other images
than those of the evaluation. Tokens per second are measured for single greedy answers, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from optimum.intel import OVConfig

from optimum_llava_ov import main_export
from optimum_llava_ov.evaluation.evaluate import evaluate
from optimum_llava_ov.evaluation.plot import plot
from optimum_llava_ov.evaluation.record import load
from optimum_llava_ov.export.recipes import INT4_RECIPE, INT8_RECIPE
from optimum_llava_ov.samples.shapes import built_in_samples, held_out


CHECKPOINT = Path(__file__).parent.parent / "examples" / "shapes" / "checkpoint"
INT4 = {"bits": 4, "group_size_fallback": "adjust"}
RECIPES = {
    "float": None,
    "int8": INT8_RECIPE,
    "int4 (default)": INT4_RECIPE,
    "int4 asym g128 r1.0": {**INT4, "group_size": 128, "ratio": 1.0},
    "int4 sym g128 r0.8": {**INT4, "sym": True, "group_size": 128, "ratio": 0.8},
    "int4 sym g128 r1.0": {**INT4, "sym": True, "group_size": 128, "ratio": 1.0},
    "int4 asym g64 r0.8": {**INT4, "group_size": 64, "ratio": 0.8},
    "int4 asym g32 r0.8": {**INT4, "group_size": 32, "ratio": 0.8},
    "int4 asym g32 r1.0": {**INT4, "group_size": 32, "ratio": 1.0},
    "int4 default + AWQ": {**INT4_RECIPE, "quant_method": "awq"},
    "int4 default + data": {**INT4_RECIPE, "data": True},
    "int4 default + AWQ + scale estimation": {
        **INT4_RECIPE,
        "quant_method": "awq",
        "scale_estimation": True,
        "data": True,
    },
    "nf4 g32": {"bits": 4, "dtype": "nf4", "group_size": 32},
    "mxfp4": {"bits": 4, "dtype": "mxfp4", "group_size": 32},
}


def export_all(workdir: Path) -> dict[str, Path]:
    dataset = calibration_data(workdir / "calibration")
    bundles = {}
    for name, recipe in RECIPES.items():
        bundles[name] = workdir / name.replace(" ", "_")
        config = None
        if recipe is not None:
            recipe = dict(recipe)
            if recipe.pop("data", False):
                recipe.update(dataset=[str(dataset)], num_samples=32)
            config = OVConfig(quantization_config=recipe)
        main_export(CHECKPOINT, bundles[name], ov_config=config)
    return bundles


def calibration_data(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, turns in enumerate(held_out(48, seed=7)):
        turn = turns[0]
        names = [f"{index}-{number}.png" for number in range(len(turn["images"]))]
        for name, image in zip(names, turn["images"]):
            image.save(folder / name)
        lines.append(json.dumps({"images": names, "prompt": turn["question"]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def tokens_per_second(bundles: dict[str, Path], rounds: int = 5) -> dict[str, float]:
    loaded = {name: load(bundle) for name, bundle in bundles.items()}
    sample = built_in_samples(1)[0]
    times: dict[str, list[float]] = {name: [] for name in bundles}
    for _ in range(rounds + 1):
        for name, (model, processor) in loaded.items():
            inputs, start = sample.inputs(processor), time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs, do_sample=False, min_new_tokens=64, max_new_tokens=64)
            times[name].append(time.perf_counter() - start)
    return {name: 64 / statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--num-samples", type=int, default=400)
    args = parser.parse_args()
    bundles = export_all(args.workdir)
    qualities = evaluate(
        list(bundles.values()), CHECKPOINT, num_samples=args.num_samples, work_dir=args.workdir / "recordings"
    )
    speeds = tokens_per_second(bundles)
    print(
        "| recipe | exact answers | KL mean | KL p95 | same answers | size | tokens/s |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, bundle in bundles.items():
        quality = qualities[bundle.name]
        print(
            f"| {name} | {quality.accuracy:.1%} | {quality.kl_mean:.5f} | {quality.kl_p95:.5f} "
            f"| {quality.identical:.1%} | {quality.size['total'] / 1e6:.2f} MB | {speeds[name]:.0f} |"
        )
    plot({name: qualities[bundle.name] for name, bundle in bundles.items()}, args.workdir / "recipes.png")


if __name__ == "__main__":
    main()
