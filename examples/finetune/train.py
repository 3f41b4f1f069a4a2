"""Fine-tune a LLaVA with LoRA on a CPU, and write what the original training code writes.

    pip install "optimum-llava-ov[finetune]"
    python examples/finetune/train.py rings ring-lora

The folder has `adapter_config.json` and `adapter_model.safetensors` (LoRA matrices of the language model, by PEFT),
`non_lora_trainables.bin` (what is trained as a whole) and `config.json`. The data set is a folder with a `train.json`
in the format of LLaVA's training data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoProcessor, ProcessorMixin

from optimum_llava_ov import OriginalLlavaForConditionalGeneration


BASE = Path(__file__).resolve().parents[1] / "shapes" / "checkpoint-llama"
IGNORED = -100  # label of tokens that are not trained


def add_lora(model: OriginalLlavaForConditionalGeneration, rank: int, alpha: int) -> PeftModel:
    """Freeze a model, and add trainable LoRA matrices to the linear layers of its decoder, as the original does.

    The projector is trained as a whole, as in the original. So are the embeddings and the head: this tiny model has
    never seen the tokens of "ring", which a real model has.
    """
    model.requires_grad_(False)
    layers = model.language_model.model.layers.named_modules()
    linear = sorted({name.split(".")[-1] for name, module in layers if isinstance(module, torch.nn.Linear)})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear)
    adapter = get_peft_model(model.language_model, config)  # changes the layers in place
    for module in (model.image_encoder.projector, model.embed_tokens):
        module.requires_grad_(True)
    model.language_model.lm_head.weight.requires_grad_(True)
    return adapter


def save(model: OriginalLlavaForConditionalGeneration, adapter: PeftModel, base: Path, output: Path) -> None:
    """Write the folder that `LLaVA/llava/train/train.py --lora_enable True` writes."""
    config = adapter.peft_config["default"]
    config.base_model_name_or_path, config.task_type = os.path.relpath(base, output), "CAUSAL_LM"
    adapter.save_pretrained(output, save_embedding_layers=False)
    tokens = model.config.num_known_tokens  # without `<image>`, for which this package adds a row
    others = model.image_encoder.projector.state_dict(prefix="model.mm_projector.")
    others["model.embed_tokens.weight"] = model.embed_tokens.weight[:tokens].detach()
    others["lm_head.weight"] = model.language_model.lm_head.weight[:tokens].detach()
    others = {f"base_model.model.{name}": tensor.half() for name, tensor in others.items()}
    torch.save(others, output / "non_lora_trainables.bin")
    values = json.loads((base / "config.json").read_text())
    values["mm_vision_tower"] = os.path.relpath(base / values["mm_vision_tower"], output)
    (output / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (output / "README.md").unlink()  # a card of PEFT without content


class DataSet:
    """Encode conversations about images once. The vision tower is frozen, so its output is kept, not the images."""

    def __init__(self, folder: Path, model: OriginalLlavaForConditionalGeneration, processor: ProcessorMixin):
        self.processor, self.samples = processor, []
        self.pad_token_id = processor.tokenizer.pad_token_id
        for sample in tqdm(json.loads((folder / "train.json").read_text()), desc="Encoding"):
            image = Image.open(folder / sample["image"]).convert("RGB")
            pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                features = model.image_encoder.features(pixel_values)[0]
            self.samples.append((*self._encode(sample["conversations"], len(features)), features))

    def _encode(self, turns: list[dict[str, str]], image_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `input_ids`, and `labels` that have only the tokens of the assistant."""
        messages, labels = [], []
        for turn in turns:
            text = turn["value"].removeprefix("<image>\n")
            content = [{"type": "image"}] if text != turn["value"] else []
            role = "user" if turn["from"] == "human" else "assistant"
            messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
            prompt = self.processor.apply_chat_template(messages, add_generation_prompt=role == "user")
            ids = self.processor.tokenizer(prompt.replace("<image>", "<image>" * image_length))["input_ids"]
            labels += ids[len(labels) :] if role == "assistant" else [IGNORED] * (len(ids) - len(labels))
        return torch.tensor(ids), torch.tensor(labels)

    def batches(self, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield endless batches. The sequences of a batch have about the same length."""
        rng, size = random.Random(seed), min(size, len(self.samples))
        while True:
            order = rng.sample(range(len(self.samples)), len(self.samples))
            order.sort(key=lambda index: len(self.samples[index][0]) + 8 * rng.random())
            starts = list(range(0, len(order) - size + 1, size))
            rng.shuffle(starts)
            for start in starts:
                yield self._collate([self.samples[index] for index in order[start : start + size]])

    def _collate(self, samples: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        input_ids, labels, features = zip(*samples)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
            "features": torch.stack(features),
        }


def train(
    model: OriginalLlavaForConditionalGeneration,
    batches: Iterator[dict[str, torch.Tensor]],
    steps: int,
    rate: float,
    projector_rate: float,
) -> None:
    """Train all parameters that are not frozen. The projector has a learning rate of its own, as in the original."""
    projector = list(model.image_encoder.projector.parameters())
    others = [weight for name, weight in model.named_parameters() if weight.requires_grad and "projector" not in name]
    parameters = [*projector, *others]
    groups = [{"params": projector, "lr": projector_rate}, {"params": others, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    losses = []
    for _ in (progress := tqdm(range(steps), desc="Training")):
        batch = next(batches)
        labels = batch.pop("labels")
        image_features = model.image_encoder.projector(batch.pop("features"))
        logits = model(**batch, image_features=image_features).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses = [*losses[-49:], loss.item()]
        progress.set_postfix(loss=sum(losses) / len(losses))
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.json and images")
    parser.add_argument("output", type=Path, help="folder to write the fine-tune to")
    parser.add_argument("--base", type=Path, default=BASE, help="LLaVA to fine-tune (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices (default: %(default)s)")
    parser.add_argument("--alpha", type=int, default=32, help="the scale is alpha / rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="number of batches (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="conversations in a batch (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--projector-rate", type=float, default=1e-3, help="learning rate of the projector (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # more are slower for matrices of this size
    torch.manual_seed(args.seed)
    model = OriginalLlavaForConditionalGeneration.from_pretrained(args.base, dtype="float32")
    data = DataSet(args.data, model, AutoProcessor.from_pretrained(args.base))
    adapter = add_lora(model, args.rank, args.alpha)
    adapter.print_trainable_parameters()
    train(model, data.batches(args.batch_size, args.seed), args.steps, args.rate, args.projector_rate)
    save(model, adapter, args.base, args.output)
    print(f"Wrote the fine-tune to {args.output}")


if __name__ == "__main__":
    main()
