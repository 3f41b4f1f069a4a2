"""Prepare inputs of the language model for data-aware compression, from images and prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nncf
import numpy as np
import openvino
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from optimum_llava_ov import host
from optimum_llava_ov.bundle.layout import PARTS, SMALL_PARTS
from optimum_llava_ov.models.image_layout import ImageLayout
from optimum_llava_ov.models.merge import merge_image_features
from optimum_llava_ov.samples.files import Sample, read_samples


if TYPE_CHECKING:
    from transformers import LlavaProcessor

DEFAULT_NUM_SAMPLES = 32


def calibration_dataset(
    dataset: str | list[str], num_samples: int | None, processor: LlavaProcessor, folder: Path
) -> nncf.Dataset:
    """Compute inputs of the language model for the samples of a data set.

    The exported parts in `folder` compute them, so that the language model gets the same inputs as in use.

    Args:
        dataset: name of a data set that Optimum knows and downloads, or `[path]` of a folder or JSONL file.
        num_samples: maximum number of samples, drawn with a fixed seed.
        processor: processor of the bundle.
        folder: folder with the text embeddings model and the vision embeddings model.
    """
    samples = _named_samples(dataset) if isinstance(dataset, str) else read_samples(dataset[0])
    samples = random.Random(0).sample(samples, min(len(samples), num_samples or DEFAULT_NUM_SAMPLES))
    core = openvino.Core()
    layout = ImageLayout.of_bundle(AutoConfig.from_pretrained(folder))
    # In float32 on all processors. Otherwise those with bf16 would compute in it, and compress to other weights.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    table, encoder = (core.compile_model(folder / PARTS[part], "CPU", exact) for part in SMALL_PARTS)
    return nncf.Dataset(
        [
            _inputs(sample, processor, table, encoder, layout)
            for sample in tqdm(samples, desc="Preparing calibration data")
        ]
    )


def _inputs(
    sample: Sample, processor: LlavaProcessor, table: Any, encoder: Any, layout: ImageLayout
) -> dict[str, np.ndarray]:
    inputs = sample.inputs(processor)
    embeds = torch.from_numpy(table(inputs["input_ids"].numpy())[0])
    if "pixel_values" in inputs:
        features = layout.features(
            lambda pixels: torch.from_numpy(encoder(pixels.numpy())[0].copy()),
            inputs["pixel_values"],
            inputs.get("image_sizes"),
        )
        embeds = merge_image_features(inputs["input_ids"], embeds, features, processor.image_token_id)
    length = embeds.shape[1]
    return {
        "inputs_embeds": embeds.numpy(),
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }


def _named_samples(name: str) -> list[Sample]:
    """Download the first samples of a data set that Optimum knows. This needs the `datasets` package."""
    known = host.named_datasets()
    if name not in known:
        raise ValueError(
            f"{name!r} is not a data set for vision-language models. Expected {', '.join(known)}, a folder of images, "
            "or a JSONL file of {image, prompt}."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"The data set {name!r} needs the package `datasets`: pip install datasets") from error
    columns = known[name]["inputs"]
    stream = load_dataset(known[name]["id"], split=known[name]["split"], streaming=True).take(512)
    return [
        Sample(item[columns["instruction"]], (item[columns["image"]],))
        for item in tqdm(stream, desc="Downloading calibration data", unit="image")
    ]
