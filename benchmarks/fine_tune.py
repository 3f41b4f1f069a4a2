"""Measure the export of a full-size LoRA adapter beside the export of its base model: time and memory.

    python benchmarks/fine_tune.py FOLDER [--rank 128] [--weight-format int4]

FOLDER is what `random_checkpoint.py` writes: a LLaVA in `checkpoint`, its tower in `clip`. An adapter of all linear
layers of the language model is written to `FOLDER/lora`. It stays there. Then two commands are measured, each from a
cold disk: `optimum-cli export openvino` of the base model and of the adapter. The bundles are deleted.

Targets at 7b in int4 with rank 128: up to 1.35 x the time of the base model, and up to 2.6 GB of anonymous memory. The
disk needs room for the merged weights: 13 GB at 7b.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from export import evict
from machine import machine, versions
from measure import run_measured
from safetensors.torch import save_file

from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_files, weight_files


TIME_FACTOR, ANONYMOUS_LIMIT = 1.35, 2.6e9
# Linear layers of the decoders of LLaMA, Mistral and MPT
LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "Wqkv", "out_proj",
)  # fmt: skip


def write_random_lora(base: Path, folder: Path, rank: int) -> None:
    """Write an adapter of all linear layers of a checkpoint's language model, with small random values."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in map_files(weight_files(Repository(str(base)), "the weights")).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEAR and "vision_tower" not in name:
            out_features, in_features = weight.shape
            for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = torch.empty(shape).normal_(0, 0.002, generator=generator).to(torch.bfloat16)
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": list(LINEAR)}
    config["base_model_name_or_path"] = f"../{base.name}"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(base / "config.json", folder / "config.json")


def measure_export(folder: Path, model: str, weight_format: str) -> dict:
    """Export `folder/model` from a cold disk and delete the bundle. Return the measurement."""
    evict(folder)
    output, log = folder / "exported", folder / f"export-{model}-{weight_format}.log"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()  # the export writes temporary files next to the bundle
    cli = Path(sys.executable).with_name("optimum-cli")
    command = [cli, "export", "openvino", "--model", folder / model, output / "bundle"]
    try:
        command += ["--weight-format", weight_format]
        measurement = run_measured(command, env={"HF_HUB_OFFLINE": "1"}, watch=output, log=log)
    finally:
        shutil.rmtree(output)
    if measurement.exit_code:
        raise SystemExit(f"The export ended with {measurement.exit_code}. End of {log}:\n{log.read_text()[-2000:]}")
    return asdict(measurement)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--weight-format", default="int4")
    arguments = parser.parse_args()

    folder = arguments.folder
    write_random_lora(folder / "checkpoint", folder / "lora", arguments.rank)
    base, lora = (measure_export(folder, model, arguments.weight_format) for model in ("checkpoint", "lora"))
    result = {"rank": arguments.rank, "base": base, "lora": lora, "machine": machine(), "versions": versions()}
    (folder / f"fine-tune-{arguments.weight_format}.json").write_text(json.dumps(result, indent=2) + "\n")
    for label, measurement in (("base model", base), ("adapter", lora)):
        print(f"{label:<12}{measurement['seconds']:8.1f} s{measurement['peak_anonymous'] / 1e9:8.2f} GB anonymous")
    ratio = lora["seconds"] / base["seconds"]
    print(f"time / base model {ratio:.2f}, target {TIME_FACTOR}: {'met' if ratio <= TIME_FACTOR else 'MISSED'}")
    is_small = lora["peak_anonymous"] <= ANONYMOUS_LIMIT
    print(f"anonymous memory, target {ANONYMOUS_LIMIT / 1e9} GB: {'met' if is_small else 'MISSED'}")


if __name__ == "__main__":
    main()
