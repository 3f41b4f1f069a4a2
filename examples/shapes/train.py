"""Train a tiny LLaVA-MPT from scratch on coloured shapes, and write it as the original LLaVA code does.

    python examples/shapes/train.py --minutes 25

First the vision tower learns what is in each of the nine cells of a picture. Then it is frozen, as in LLaVA's own training, a pool of
pictures is encoded once, and projector and language model learn from ever new conversations about them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov.checkpoint.config import LlavaMptConfig
from optimum_llava_ov.evaluation.shapes import (
    COLOURS,
    SHAPES,
    SYSTEM_TURN,
    Scene,
    assistant_turn,
    conversation,
    random_scene,
    render,
    user_turn,
)
from optimum_llava_ov.models.llava_mpt import LlavaMptForConditionalGeneration
from optimum_llava_ov.models.merge import merge_image_features


logger = logging.getLogger("train")

FOLDER = Path(__file__).parent
IMAGE_SIZE, PATCH_SIZE = 96, 32
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
ADDED_TOKENS = ("<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>", "<im_end>")
IGNORED = -100

PREPROCESSOR = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "crop_size": IMAGE_SIZE,
    "size": IMAGE_SIZE,
}
VISION_CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "image_size": IMAGE_SIZE,
    "intermediate_size": 512,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": PATCH_SIZE,
}
# A larger alibi_bias_max than usual gives half of the heads slopes so small that they see pictures wherever they are.
CONFIG = {
    "_name_or_path": "llava-mpt-shapes",
    "architectures": ["LlavaMPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 96,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "freeze_mm_mlp_adapter": False,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "mm_hidden_size": VISION_CONFIG["hidden_size"],
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "../clip",
    "model_type": "llava_mpt",
    "n_heads": 8,
    "n_layers": 4,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "sep_image_conv_front": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "verbose": 0,
}


def build_tokenizer(num_conversations: int = 2000) -> Tokenizer:
    """Byte-level BPE in the style of GPT-NeoX, with the conversations' vocabulary. Any text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [SYSTEM_TURN.removeprefix("<|im_start|>").removesuffix("<|im_end|>")] * 50
    for index in range(num_conversations):
        for turn in conversation(f"vocabulary/{index}"):
            texts += [f"user\n{turn.question}", f"assistant\n{turn.answer}"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS])
    return tokenizer


def load(folder: Path) -> tuple[LlavaMptForConditionalGeneration, Tokenizer]:
    """What `save` has written, to be trained further."""
    model = LlavaMptForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32).requires_grad_(True)
    model.image_encoder.borders.requires_grad_(False)
    return model.train(), Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))


def build_model(tokenizer: Tokenizer) -> LlavaMptForConditionalGeneration:
    config = LlavaMptConfig.from_dict({**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    config.vision_config = CLIPVisionConfig(**VISION_CONFIG)
    config.im_start_token_id, config.im_end_token_id = (tokenizer.token_to_id(token) for token in ("<im_start>", "<im_end>"))
    config.image_token_id = config.padded_vocab_size = config.vocab_size
    model = LlavaMptForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            continue
        if name.endswith(("down_proj.weight", "fc2.weight", "self_attn.out_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * CONFIG["n_layers"]))
        else:
            nn.init.normal_(parameter, std=0.04 if parameter.ndim == 2 else 0.02)
    nn.init.normal_(model.language_model.lm_head.weight, std=EMBEDDING_STD)
    for block in model.language_model.blocks:
        _initialize_attention(block.attn)
    return model


EMBEDDING_STD = 0.1


def _initialize_attention(attention: nn.Module) -> None:
    """Let a token begin by attending to tokens like itself, and by taking over what it finds.

    After Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828. Finding the
    cell that a word speaks of is what takes longest to learn otherwise.
    """
    size = attention.out_proj.weight.shape[0]
    query_key, value = (nn.init.orthogonal_(torch.empty(size, size)) for _ in range(2))
    with torch.no_grad():
        attention.Wqkv.weight.copy_(torch.cat([0.9 * query_key, 0.9 * query_key, value]))
        attention.out_proj.weight.copy_(EMBEDDING_STD * value.T)


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon), in float32 and with all matrices of one shape at once.

    `torch.optim.Muon` works in bfloat16, one matrix after the other, which on a CPU takes as long as the rest of the step.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parts: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                # Query, key and value are matrices of their own.
                count = 3 if parameter.shape[0] == 3 * parameter.shape[1] else 1
                for weight, change in zip(parameter.chunk(count), update.chunk(count), strict=True):
                    parts.setdefault(weight.shape, []).append((weight, change))
            for shape, pairs in parts.items():
                changes = _orthogonal(torch.stack([change for _, change in pairs])) * max(1, shape[0] / shape[1]) ** 0.5
                for (weight, _), change in zip(pairs, changes, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix next to each, roughly: five Newton-Schulz iterations with Muon's coefficients."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


class Pool:
    """Pictures that were encoded once, in pairs of which the second has something in common with the first.

    Args:
        tower: maps `(pictures, 3, height, width)` to `(pictures, patches, vision_size)`.
        num_pairs: how many.
    """

    def __init__(self, tower: nn.Module, num_pairs: int, seed: int):
        rng, processor = random.Random(f"pool/{seed}"), CLIPImageProcessorPil(**PREPROCESSOR)
        self.pairs, features = [], []
        for _ in tqdm(range(0, num_pairs, 32), desc="Encoding pictures"):
            firsts = [random_scene(rng) for _ in range(32)]
            pairs = [(first, random_scene(rng, first)) for first in firsts]
            self.pairs += pairs
            with torch.no_grad():
                features.append(tower(preprocess(processor, [scene for pair in pairs for scene in pair])))
        self.features = torch.cat(features)
        self._all_pairs = self.pairs
        self._index = {id(scene): index for index, scene in enumerate(scene for pair in self.pairs for scene in pair)}

    def simple(self, max_objects: int) -> Pool:
        """The same pool without the pictures of more objects."""
        pool = copy.copy(self)
        pool.pairs = [pair for pair in self.pairs if pair[0].count() <= max_objects]
        return pool

    def new_scene(self, rng: random.Random, like: Scene | None) -> Scene:
        return rng.choice(self.pairs)[0] if like is None else self._all_pairs[self._index[id(like)] // 2][1]

    def features_of(self, scenes: list[Scene]) -> torch.Tensor:
        return self.features[[self._index[id(scene)] for scene in scenes]]


class Conversations:
    """Endless batches of new conversations: `input_ids`, `attention_mask`, `labels`, and `features` of the pictures."""

    def __init__(
        self, tokenizer: Tokenizer, pool: Pool, batch_size: int, seed: int, one_picture: bool = False, max_turns: int = 6
    ):
        self.tokenizer, self.pool, self.batch_size, self.seed = tokenizer, pool, batch_size, seed
        self.one_picture, self.max_turns = one_picture, max_turns
        self.image_token_id = tokenizer.get_vocab_size()
        self.image_length = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 2
        self._encode = functools.cache(self._encode_text)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in itertools.count():
            # Rows of a batch should be of one length: a part of a larger pool, sorted.
            rows = [self._row(f"train/{self.seed}/{self.one_picture}/{index}/{row}") for row in range(self.batch_size * 8)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            random.Random(index).shuffle(batches)
            yield from map(self._collate, batches)

    def _row(self, name: str) -> tuple[list[int], list[int], list[Scene]]:
        rng = random.Random(f"{name}/layout")
        input_ids = list(self._encode(SYSTEM_TURN))
        labels = [IGNORED] * len(input_ids)
        scenes: list[Scene] = []
        for turn in conversation(name, self.max_turns, self.one_picture, self.pool.new_scene):
            user = self._encode(user_turn(turn.question, len(turn.scenes), images_last=rng.random() < 0.1))
            answer = self._encode(assistant_turn(turn.answer))
            input_ids += user + answer
            labels += [IGNORED] * len(user) + answer
            scenes += turn.scenes
        return input_ids, labels, scenes

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split("<image>")):
            ids += [self.image_token_id] * self.image_length if index else []
            ids += self.tokenizer.encode(part).ids
        return ids

    def _collate(self, rows: list[tuple[list[int], list[int], list[Scene]]]) -> dict[str, torch.Tensor]:
        length = max(len(row[0]) for row in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, (ids, targets, _) in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(targets)
            attention_mask[index, : len(ids)] = 1
        scenes = [scene for row in rows for scene in row[2]]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "features": self.pool.features_of(scenes),
            "words": torch.stack([self._words(scene) for scene in scenes]),
        }

    def _words(self, scene: Scene) -> torch.Tensor:
        """`(9, 2)`: the words for colour and shape of what is in each cell."""
        words = torch.full((9, 2), IGNORED)
        for item in scene.objects:
            words[item.cell] = torch.tensor([self._encode(f" {name}")[-1] for name in (item.colour, item.shape)])
        return words


class Pictures:
    """Endless batches of pictures, and of what is in their cells: `(batch, 9)` numbers of shape and colour, 0 for none."""

    def __init__(self, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.processor = CLIPImageProcessorPil(**PREPROCESSOR)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        rng = random.Random(f"pictures/{self.seed}")
        while True:
            scenes = [random_scene(rng) for _ in range(self.batch_size)]
            shapes, colours = torch.zeros(2, self.batch_size, 9, dtype=torch.long)
            for index, scene in enumerate(scenes):
                for item in scene.objects:
                    shapes[index, item.cell] = SHAPES.index(item.shape) + 1
                    colours[index, item.cell] = list(COLOURS).index(item.colour) + 1
            yield preprocess(self.processor, scenes), shapes, colours


def preprocess(processor: CLIPImageProcessorPil, scenes: list[Scene]) -> torch.Tensor:
    # One by one: pictures have different sizes. Oversampling of 2 instead of 3 is faster, and as good at this size.
    images = [processor(render(scene, oversampling=2), return_tensors="np")["pixel_values"][0] for scene in scenes]
    return torch.from_numpy(np.stack(images)).float()


def train_tower(model: LlavaMptForConditionalGeneration, minutes: float, seed: int) -> None:
    """Teach the tower the contents of the cells. The classifier is thrown away."""
    tower = model.image_encoder.features
    classifier = nn.Linear(VISION_CONFIG["hidden_size"], len(SHAPES) + 1 + len(COLOURS) + 1)
    optimizers = Optimizers([*tower.named_parameters(), *classifier.named_parameters()], matrix_peak=0.02)
    side, start = IMAGE_SIZE // PATCH_SIZE, time.time()
    for step, (pixel_values, shapes, colours) in enumerate(Pictures(48, seed)):
        progress = (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        grid = tower(pixel_values).transpose(1, 2).unflatten(2, (side, side))
        logits = classifier(F.avg_pool2d(grid, side // 3).flatten(2).transpose(1, 2))
        shape_logits, colour_logits = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
        loss = F.cross_entropy(shape_logits.flatten(0, 1), shapes.flatten())
        loss = loss + F.cross_entropy(colour_logits.flatten(0, 1), colours.flatten())
        optimizers.step(loss, step, progress)
        if step % 50 == 0:
            right = (shape_logits.argmax(-1) == shapes) & (colour_logits.argmax(-1) == colours)
            objects = right[shapes > 0].float().mean()
            logger.info("tower %4d  %4.1f min  loss %.4f  objects %.3f", step, progress * minutes, loss.item(), objects)


def train(
    model: LlavaMptForConditionalGeneration,
    tokenizer: Tokenizer,
    pool: Pool,
    minutes: float,
    batch_size: int,
    seed: int,
    start_lesson: float = 0.0,
    rate: float = 1.0,
) -> None:
    """Train projector and language model on the tokens of the assistant's turns.

    Args:
        start_lesson: 0 begins with single objects, 1 goes straight to everything, for a model that was trained before.
        rate: factor of the learning rates.
    """
    named = [*model.language_model.named_parameters(), *model.image_encoder.projector.named_parameters()]
    optimizers = Optimizers(named, matrix_peak=0.02 * rate, peak=2e-3 * rate)
    # To read a picture at all is learned from single objects, in minutes; to find the right one among several comes next; and
    # comparing pictures is learned once one can be read. Begun with everything at once, the loss stays where guessing leaves it.
    lessons = [
        (0.05, iter(Conversations(tokenizer, pool.simple(1), batch_size, seed, one_picture=True, max_turns=4))),
        (0.12, iter(Conversations(tokenizer, pool.simple(2), batch_size, seed, one_picture=True, max_turns=4))),
        (0.35, iter(Conversations(tokenizer, pool, batch_size, seed, one_picture=True))),
        (1.00, iter(Conversations(tokenizer, pool, batch_size, seed))),
    ]
    start, average = time.time(), None
    for step in itertools.count():
        progress = (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        batch = next(next(lesson for until, lesson in lessons if max(progress, start_lesson) <= until))
        labels, words = batch.pop("labels")[:, 1:], batch.pop("words")
        logits = forward(model, **batch)
        # What is seen of a cell shall be like the words for it: the alignment of LLaVA's first stage. The same word in question and
        # picture then attracts attention, and finding the right cell is soon learned.
        cells = model.image_encoder.projector(batch["features"]) @ model.language_model.lm_head.weight.T
        alignment = sum(F.cross_entropy(cells.flatten(0, 1), words[..., i].flatten(), ignore_index=IGNORED) for i in (0, 1))
        logits = logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizers.step(loss + 0.3 * alignment, step, progress)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 0:
            right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
            logger.info(
                "step %5d  %4.1f min  loss %.4f  tokens %.4f  alignment %.3f", step, progress * minutes, average, right, alignment
            )


class Optimizers:
    """Muon for the matrices of the layers, AdamW for everything else, under one schedule."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], matrix_peak: float, peak: float = 1e-3, warmup: int = 50):
        parameters = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in parameters]
        self.warmup = warmup
        self.optimizers = []
        is_matrix = [(".layers." in name or "blocks." in name) and parameter.ndim == 2 for name, parameter in parameters]
        matrices = [parameter for (_, parameter), is_muon in zip(parameters, is_matrix, strict=True) if is_muon]
        others = [parameter for (_, parameter), is_muon in zip(parameters, is_matrix, strict=True) if not is_muon]
        self.optimizers.append((Muon(matrices, lr=matrix_peak), matrix_peak))
        self.optimizers.append((torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.02), peak))

    def step(self, loss: torch.Tensor, step: int, progress: float) -> None:
        """One update; the learning rate falls from its peak to nothing, as a cosine, while `progress` goes from 0 to 1."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1, progress)))
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()


def forward(
    model: LlavaMptForConditionalGeneration, input_ids: torch.Tensor, attention_mask: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Logits, with head, embedding table and image borders tied as they are in a checkpoint that is loaded."""
    table, config = model.language_model.lm_head.weight, model.config
    embeds = F.embedding(input_ids.clamp(max=table.shape[0] - 1), table)
    borders = table[[config.im_start_token_id, config.im_end_token_id]].unsqueeze(1).expand(-1, len(features), -1).unsqueeze(2)
    images = torch.cat([borders[0], model.image_encoder.projector(features), borders[1]], dim=1)
    embeds = merge_image_features(input_ids, embeds, images, config.image_token_id)
    return model.language_model(embeds, attention_mask).logits


def save(model: LlavaMptForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `checkpoint/` and `clip/`, with the files and the names of the original."""
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    checkpoint.mkdir(parents=True, exist_ok=True)
    clip.mkdir(parents=True, exist_ok=True)

    tokenizer.save(str(checkpoint / "tokenizer.json"))
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    _write_json(checkpoint / "tokenizer_config.json", {**settings, **names, "tokenizer_class": "GPTNeoXTokenizer"})
    special = {"additional_special_tokens": list(ADDED_TOKENS[:2]), **names, "pad_token": END_OF_TEXT}
    _write_json(checkpoint / "special_tokens_map.json", special)
    _write_json(checkpoint / "config.json", {**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    eos_token_id = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, "<|im_end|>")]
    generation = {
        "_from_model_config": True,
        "transformers_version": "4.28.0.dev0",
        "use_cache": True,
        "eos_token_id": eos_token_id,
    }
    _write_json(checkpoint / "generation_config.json", generation)

    tensors = {"transformer.wte.weight": model.language_model.lm_head.weight}
    for name, parameter in model.language_model.named_parameters():
        if name != "lm_head.weight":
            tensors[f"transformer.{name}"] = parameter
    for name, parameter in model.image_encoder.projector.named_parameters():
        tensors[f"transformer.mm_projector.{name}"] = parameter
    _write_shards(checkpoint, {name: tensor.detach().half().clone() for name, tensor in tensors.items()})

    # The model has no layers behind the selected one, but a tower on disk is complete.
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION_CONFIG))
    tower.vision_model.load_state_dict(model.image_encoder.features.state_dict(), strict=False)
    state_dict = {
        f"vision_model.{name}": parameter.detach().half().clone() for name, parameter in tower.vision_model.named_parameters()
    }
    save_file(state_dict, clip / "model.safetensors", metadata={"format": "pt"})
    _write_json(clip / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": VISION_CONFIG})
    _write_json(clip / "preprocessor_config.json", PREPROCESSOR)


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two files and their index, as the original is sharded."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards, weight_map, written = ({}, {}), {}, 0
    for name, tensor in tensors.items():
        shard = int(written >= total / 2)
        shards[shard][name] = tensor
        weight_map[name] = f"pytorch_model-{shard + 1:05d}-of-00002.bin"
        written += tensor.nbytes
    for index, shard in enumerate(shards):
        torch.save(shard, folder / f"pytorch_model-{index + 1:05d}-of-00002.bin")
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="training of the language model (default: %(default)s)")
    parser.add_argument("--tower-minutes", type=float, default=3, help="training of the tower before (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=8000, help="pairs of pictures to talk about (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations in a batch (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one when resuming, for other conversations")
    parser.add_argument("--resume", action="store_true", help="train what is in --output further")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where to write checkpoint/ and clip/ (default: here)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(args.seed)
    if args.resume:
        model, tokenizer = load(args.output)
    else:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%d tokens, %.2f M parameters", tokenizer.get_vocab_size(), num_parameters / 1e6)
        train_tower(model, args.tower_minutes, args.seed)
    pool = Pool(model.image_encoder.features, args.num_pairs, args.seed)
    train(model, tokenizer, pool, args.minutes, args.batch_size, args.seed, start_lesson=float(args.resume), rate=args.rate)
    save(model, tokenizer, args.output)
    logger.info("Written to %s", args.output)


if __name__ == "__main__":
    main()
