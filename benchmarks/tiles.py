"""Measure a LLaVA-1.6 of full size: an image of 672 x 672 pixels in five tiles, 2,928 tokens.

    python benchmarks/tiles.py WORKDIR [--size 7b] [--bundle BUNDLE] [--rounds 3]

It uses a random LLaVA-1.5 with the options of LLaVA-1.6 (vicuna), exported to int4. `OVModelForLlava` and GenAI
take turns, `--rounds` times, each time in a new process that answers:

1. a text of 64 tokens, so that kernels and weights are prepared;
2. a question about an image: time to the first token, memory of the process;
3. another question about the same image, where `OVModelForLlava` continues the cache.

Then the image encoder of `OVModelForLlava` is measured on new images, beside one call of the same graph with all
tiles in a batch. Targets: first token up to 1.05 x GenAI and peak RSS up to 0.8 x; the second question up to 0.1 x the
first; the encoder up to 1.1 x one batch.

Medians are printed and written to `WORKDIR/tiles-SIZE.json`. At 7b a round takes 5 minutes on a processor with VNNI,
and half an hour with AVX2 only. It needs 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import openvino
import torch
from contenders import Job
from contenders.__main__ import random_image
from engines import ENV, HERE, make, make_checkpoint
from export import export_command
from machine import machine, versions
from measure import run_measured
from random_families import FAMILIES
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlava


SIDE, NEW_TOKENS, ROUNDS = 672, 8, 3
QUESTIONS = ("What is in this picture?", "Which colours has it?")
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-1.6
TILING = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
    "mm_patch_merge_type": "spatial_unpad",
}


def make_tiled(source: Path, folder: Path) -> Path:
    """Link the files of a LLaVA-1.5, and write the options and the newline of a LLaVA-1.6."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config, index = json.loads((source / "config.json").read_text()), folder / "pytorch_model.bin.index.json"
    names = json.loads((source / index.name).read_text())
    names["weight_map"]["model.image_newline"] = "newline.bin"
    torch.save(
        {"model.image_newline": torch.zeros(config["hidden_size"], dtype=torch.float16)}, folder / "newline.bin"
    )
    tower = (source / config["mm_vision_tower"]).resolve() if config["mm_vision_tower"].startswith(".") else None
    config |= TILING | ({"mm_vision_tower": str(tower)} if tower else {})
    for file, values in ((folder / "config.json", config), (index, names)):
        file.unlink()
        file.write_text(json.dumps(values))
    return folder


def prompt_of(bundle: Path, question: str, image: bool = True) -> str:
    """Write a question in the bundle's chat template."""
    content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    return AutoProcessor.from_pretrained(bundle).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def ask(contender: str, bundle: Path, workdir: Path) -> dict:
    """Ask a contender two questions, in a process of its own."""
    job = Job(
        contender,
        {"bundle": str(bundle.resolve())},
        prompt_of(bundle, "word " * 60, image=False),
        prompt_tokens=0,
        new_tokens=NEW_TOKENS,
        image_size=(SIDE, SIDE),
    )
    questions = [prompt_of(bundle, question) for question in QUESTIONS]
    file, log = workdir / f"tiles-{contender}.json", workdir / f"tiles-{contender}.log"
    file.write_text(json.dumps(asdict(job) | {"questions": questions}))
    command = ["env", f"--chdir={HERE}", sys.executable, "-m", "contenders.two_questions", file.resolve()]
    measurement = run_measured(command, env=ENV, log=log)
    if measurement.exit_code:
        raise SystemExit(f"{contender} ended with {measurement.exit_code}. End of {log}:\n{log.read_text()[-2000:]}")
    memory = {"rss": measurement.peak_rss, "anonymous": measurement.peak_anonymous, "load": os.getloadavg()[0]}
    return json.loads(log.read_text().strip().splitlines()[-1]) | memory


def run_encoder(bundle: Path) -> dict:
    """Measure the image encoder: tile by tile as the model does it, and all tiles in one batch. Seconds, medians."""
    model, processor = OVModelForLlava.from_pretrained(bundle), AutoProcessor.from_pretrained(bundle)
    graph = openvino.Core().compile_model(bundle / "openvino_vision_embeddings_model.xml", "CPU")
    times: dict[str, list[float]] = {"encoder": [], "batch": []}
    for seed in range(1, 2 + ROUNDS):  # the first one is a warm-up
        inputs = processor(text="<image>", images=random_image(seed, (SIDE, SIDE)), return_tensors="pt")
        started = time.perf_counter()
        model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
        middle = time.perf_counter()
        graph(inputs["pixel_values"][0].numpy())
        times["encoder"].append(middle - started)
        times["batch"].append(time.perf_counter() - middle)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--size", choices=FAMILIES["llama"].sizes, default="7b")
    parser.add_argument("--bundle", type=Path, help="measure this bundle instead of exporting one")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="number of processes of each contender")
    arguments = parser.parse_args()

    workdir, bundle = arguments.workdir, arguments.bundle
    workdir.mkdir(parents=True, exist_ok=True)
    if bundle is None:
        checkpoint = make_tiled(make_checkpoint(workdir, arguments.size, "llama"), workdir / f"tiled-{arguments.size}")
        bundle = workdir / f"tiles-bundle-{arguments.size}"
        make(export_command(checkpoint, bundle, "int4"), checkpoint, bundle)
    found = {"machine": machine(), "versions": versions()}
    runs: dict[str, list[dict]] = {"ours": [], "genai-sdpa": []}
    for number in range(arguments.rounds):
        for contender in sorted(runs, reverse=number % 2 == 0):
            runs[contender].append(ask(contender, bundle, workdir))
            print(contender, json.dumps(runs[contender][-1]), flush=True)
    for contender, values in runs.items():
        found[contender] = {name: statistics.median(run[name] for run in values) for name in values[0]}
    found["runs"] = runs
    found["encoder"] = run_encoder(bundle)
    print("image encoder, s", json.dumps(found["encoder"]))
    ours, genai, encoder = found["ours"], found["genai-sdpa"], found["encoder"]
    targets = [
        ("first token / GenAI", ours["first"] / genai["first"], 1.05),
        ("peak RSS / GenAI", ours["rss"] / genai["rss"], 0.8),
        ("second question / first", ours["second"] / ours["first"], 0.1),
        ("image encoder / one batch", encoder["encoder"] / encoder["batch"], 1.1),
    ]
    found["targets"] = {name: ratio for name, ratio, _ in targets}
    (workdir / f"tiles-{arguments.size}.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, ratio, limit in targets:
        print(f"{name:<28}{ratio:6.3f}  (<= {limit})  {'met' if ratio <= limit else 'MISSED'}")


if __name__ == "__main__":
    main()
