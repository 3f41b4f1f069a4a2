"""Write a LoRA adapter that changes a bundle's answers, in the names that PEFT gives the checkpoint's layers.

python adapter.py <bundle> <file>
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


bundle, file = map(Path, sys.argv[1:])
config = json.loads((bundle / "config.json").read_text())["text_config"]
width, rank = config["d_model"], 4
torch.manual_seed(0)
tensors = {}
for block in range(config["n_layers"]):
    name = f"base_model.model.transformer.blocks.{block}.attn.Wqkv"
    tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width)
    tensors[f"{name}.lora_B.weight"] = torch.randn(3 * width, rank)
save_file(tensors, file)
