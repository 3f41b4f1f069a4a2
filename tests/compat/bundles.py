"""Export a checkpoint in three precisions: `python bundles.py <checkpoint> <folder>`."""

import sys
from pathlib import Path

from optimum.intel import OVConfig

from optimum_llava_ov import main_export
from optimum_llava_ov.export.recipes import default_recipe, recipe_of


checkpoint, folder = map(Path, sys.argv[1:])
main_export(checkpoint, folder / "fp32", ov_config=OVConfig(dtype="fp32"))
for name in ("int8", "int4"):
    main_export(checkpoint, folder / name, ov_config=OVConfig(quantization_config=recipe_of(default_recipe(name))))
