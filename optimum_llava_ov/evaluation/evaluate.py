"""Compare bundles with a reference. `optimum-cli llava-ov eval` calls this."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from optimum_llava_ov.bundle.check import check_loads
from optimum_llava_ov.bundle.layout import weights_file
from optimum_llava_ov.bundle.settings import write_json
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.checkpoint.reader import check_checkpoint_options
from optimum_llava_ov.evaluation.metrics import Quality, measure
from optimum_llava_ov.evaluation.record import load, prepare_folder, record_bundle, record_reference
from optimum_llava_ov.samples.files import Sample, read_samples
from optimum_llava_ov.samples.shapes import built_in_samples
from optimum_llava_ov.system.devices import check_device


logger = logging.getLogger(__name__)


def evaluate(
    bundles: list[str | Path],
    reference: str | Path,
    dataset: str | Path | None = None,
    num_samples: int = 64,
    max_new_tokens: int = 64,
    work_dir: str | Path | None = None,
    device: str = "CPU",
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Quality]:
    """Compare bundles with a reference, and write `eval.json` into each.

    The results are deterministic: answers are greedy, and the choice of samples is fixed.

    Args:
        bundles: Folders of bundles.
        reference: Folder or model id of an original checkpoint, which runs in torch, or another bundle.
        dataset: Folder of images or a JSONL file (see [`~optimum_llava_ov.samples.files.read_samples`]). Default:
            generated images of coloured shapes, with questions and answers.
        work_dir: Folder for recordings, from which an interrupted run resumes. Default: `<first bundle>/.eval`.
        model_kwargs: Options of the reference, as for [`main_export`], such as the `base_model` of a fine-tune.

    Returns:
        The quality of each bundle, by the name of its folder.

    Raises:
        `ValueError`: The device does not exist, a folder is not a bundle, or an option of the reference is unknown.
    """
    check_device(device)
    check_checkpoint_options(model_kwargs)
    folders = [Path(bundle) for bundle in bundles]
    for folder in folders:
        complete_replacement(folder)
        check_loads(folder)
    samples = built_in_samples(num_samples) if dataset is None else read_samples(dataset)[:num_samples]
    settings = {
        "reference": str(reference),
        "model_kwargs": dict(model_kwargs or {}),
        "dataset": None if dataset is None else str(dataset),
        "prompts": [sample.prompt for sample in samples],
        "max_new_tokens": max_new_tokens,
    }
    recordings = Path(work_dir) if work_dir else folders[0] / ".eval"
    expected = recordings / "reference"

    _record(reference, device, samples, expected, settings, max_new_tokens, model_kwargs=model_kwargs)
    qualities = {}
    for folder in folders:
        found = recordings / folder.resolve().name
        modified = weights_file(folder, "language_model").stat().st_mtime_ns
        _record(folder, device, samples, found, {**settings, "bundle": modified}, max_new_tokens, expected)
        quality = measure(samples, expected, found, folder, AutoTokenizer.from_pretrained(folder))
        qualities[folder.resolve().name] = quality
        write_json(folder / "eval.json", {**quality.to_dict(), "settings": _public(settings, dataset)})
    return qualities


def _record(
    name: str | Path,
    device: str,
    samples: list[Sample],
    folder: Path,
    settings: dict,
    max_new_tokens: int,
    reference: Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    prepare_folder(folder, settings)
    if len(list(folder.glob("*.npz"))) >= len(samples):
        logger.info("%s is already recorded", name)
        return
    model, processor = load(name, device, model_kwargs)
    if reference is None:
        record_reference(model, processor, samples, folder, max_new_tokens)
    else:
        record_bundle(model, processor, samples, reference, folder, max_new_tokens)
    del model
    gc.collect()


def _public(settings: dict, dataset: str | Path | None) -> dict:
    """Return settings for publication: names instead of paths."""
    return {
        "reference": Path(settings["reference"]).name
        if Path(settings["reference"]).exists()
        else settings["reference"],
        "dataset": "coloured shapes (built in)" if dataset is None else Path(dataset).name,
        "max_new_tokens": settings["max_new_tokens"],
        "versions": {name: version(name) for name in ("optimum-llava-ov", "openvino", "nncf", "transformers")},
    }
