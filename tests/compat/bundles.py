"""Make the checkpoint that the checks are run with, and export it in three precisions.

    python bundles.py <folder of the original checkpoint and its tower> <folder>

The checkpoint is the original one with weights in float32, so that what others compute in torch is computed in float32.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from optimum.intel import OVConfig
from safetensors.torch import load_file, save_file

from optimum_llava_ov import main_export
from optimum_llava_ov.export.recipes import default_recipe, recipe_of


original, folder = map(Path, sys.argv[1:])
for name in ("checkpoint", "clip"):
    shutil.copytree(original / name, folder / name)
    for file in (folder / name).glob("*.bin"):
        torch.save({key: tensor.float() for key, tensor in torch.load(file, weights_only=True).items()}, file)
    for file in (folder / name).glob("*.safetensors"):
        save_file({key: tensor.float() for key, tensor in load_file(file).items()}, file, {"format": "pt"})
config = folder / "checkpoint" / "config.json"
config.write_text(json.dumps({**json.loads(config.read_text()), "torch_dtype": "float32"}))

main_export(folder / "checkpoint", folder / "fp32", ov_config=OVConfig(dtype="fp32"))
for name in ("int8", "int4"):
    main_export(
        folder / "checkpoint", folder / name, ov_config=OVConfig(quantization_config=recipe_of(default_recipe(name)))
    )
