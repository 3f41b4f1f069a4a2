"""Record the answers of a model and the probabilities of their tokens on disk, sample by sample.

The reference is recorded first and freed before a bundle is loaded, so that both are never in memory together. An
interrupted recording continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import LlavaProcessor

from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, holds_original_checkpoint
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.samples.files import Sample


def load(
    name: str | Path, device: str = "CPU", model_kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, LlavaProcessor]:
    """Load a bundle as `OVModelForLlava`, or an original checkpoint in torch.

    A checkpoint is loaded in float32 if the memory suffices, otherwise in bfloat16.

    Args:
        model_kwargs: options of a checkpoint, as for [`OriginalCheckpoint.open`].

    Raises:
        `ValueError`: there are options, but it is not a checkpoint.
    """
    options = model_kwargs or {}
    if holds_original_checkpoint(name, base_model=options.get("base_model")):
        checkpoint = OriginalCheckpoint.open(name, **options)
        size = sum(file.stat().st_size for file in checkpoint.weight_files)
        model = OriginalLlavaForConditionalGeneration.from_checkpoint(
            checkpoint, dtype=torch.float32 if 2.5 * size < psutil.virtual_memory().free else torch.bfloat16
        )
        return model, build_processor(checkpoint)
    if options:
        raise ValueError(
            f"{str(name)!r} is not an original checkpoint, so it takes no --model-kwargs "
            f"({', '.join(options)}). Leave the option out."
        )
    from optimum_llava_ov.modeling import OVModelForLlava

    model = OVModelForLlava.from_pretrained(name, device=device)
    return model, load_processor(model.model_save_dir)


def record_reference(
    model: Any, processor: LlavaProcessor, samples: list[Sample], folder: Path, max_new_tokens: int
) -> None:
    """Write for each sample the greedy answer, and the log-probabilities of the whole vocabulary for each token."""
    for index, sample in _missing(samples, folder, "Reference"):
        inputs = sample.inputs(processor)
        tokens = _greedy(model, inputs, max_new_tokens)
        _write(
            folder / f"{index:05d}.npz", tokens=tokens, log_probs=_log_probs(model, inputs, tokens).astype(np.float16)
        )


def record_bundle(
    model: Any, processor: LlavaProcessor, samples: list[Sample], reference: Path, folder: Path, max_new_tokens: int
) -> None:
    """Write for each sample the bundle's greedy answer, and its divergence from the reference.

    The divergence is computed for the tokens of the reference's answer.
    """
    for index, sample in _missing(samples, folder, "Bundle"):
        with np.load(reference / f"{index:05d}.npz") as recorded:
            expected = recorded["log_probs"].astype(np.float32)
            reference_tokens = recorded["tokens"]
        inputs = sample.inputs(processor)
        found = _log_probs(model, inputs, reference_tokens)
        expected = expected - _logsumexp(expected)  # normalize again after rounding to float16
        kl = (np.exp(expected) * (expected - found)).sum(axis=-1)
        _write(
            folder / f"{index:05d}.npz",
            tokens=_greedy(model, inputs, max_new_tokens),
            kl=np.maximum(kl, 0),
            same_top1=expected.argmax(axis=-1) == found.argmax(axis=-1),
        )


def prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a recording, or continue one with the same settings. A recording with other settings is deleted."""
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        for old in folder.glob("*.npz"):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


def _missing(samples: list[Sample], folder: Path, description: str):
    todo = [(index, sample) for index, sample in enumerate(samples) if not (folder / f"{index:05d}.npz").exists()]
    return tqdm(todo, desc=description, initial=len(samples) - len(todo), total=len(samples), unit="sample")


def _greedy(model: Any, inputs: Any, max_new_tokens: int) -> np.ndarray:
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return output[0, inputs["input_ids"].shape[1] :].numpy()


def _log_probs(model: Any, inputs: Any, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities `(tokens, vocab_size)` float32 for each token of the answer."""
    answer = torch.from_numpy(tokens[:-1])[None]
    full = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1),
    }
    with torch.no_grad():
        logits = model(**full, logits_to_keep=len(tokens)).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def _logsumexp(values: np.ndarray) -> np.ndarray:
    return np.log(np.exp(values).sum(axis=-1, keepdims=True))


def _write(file: Path, **arrays: np.ndarray) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # the stub takes any name for `allow_pickle`
    partial.rename(file)
