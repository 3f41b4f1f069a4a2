"""`optimum-cli llava-ov eval`, and the same from Python."""

from __future__ import annotations

import gc
import logging
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer

from optimum_llava_ov.bundle.check import check_loads
from optimum_llava_ov.bundle.settings import write_json
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.evaluation.metrics import Quality, measure
from optimum_llava_ov.evaluation.record import load, prepare_folder, record_bundle, record_reference
from optimum_llava_ov.samples.files import Sample, read_samples
from optimum_llava_ov.samples.shapes import built_in_samples


logger = logging.getLogger(__name__)


def evaluate(
    bundles: list[str | Path],
    reference: str | Path,
    dataset: str | Path | None = None,
    num_samples: int = 64,
    max_new_tokens: int = 64,
    work_dir: str | Path | None = None,
    device: str = "CPU",
) -> dict[str, Quality]:
    """Compare bundles with a reference, and write `eval.json` into each.

    Everything is deterministic: greedy answers, and a fixed choice of samples.

    Args:
        bundles: folders of bundles.
        reference: an original checkpoint (folder or model id), which is run in torch, or another bundle.
        dataset: a folder of images or a JSONL file (see [`~optimum_llava_ov.samples.read_samples`]); without one, images of
            coloured shapes, drawn here, with their answers.
        work_dir: where recordings are kept, so that an interrupted run continues; `<first bundle>/.eval` if not given.

    Returns:
        The numbers for each bundle, by the name of its folder.
    """
    bundles = [Path(bundle) for bundle in bundles]
    for bundle in bundles:
        complete_replacement(bundle)
        check_loads(bundle)
    samples = built_in_samples(num_samples) if dataset is None else read_samples(dataset)[:num_samples]
    settings = {
        "reference": str(reference),
        "dataset": None if dataset is None else str(dataset),
        "prompts": [sample.prompt for sample in samples],
        "max_new_tokens": max_new_tokens,
    }
    work_dir = Path(work_dir) if work_dir else bundles[0] / ".eval"

    _record(reference, device, samples, work_dir / "reference", settings, max_new_tokens)
    qualities = {}
    for bundle in bundles:
        recording = work_dir / bundle.resolve().name
        fingerprint = (bundle / "openvino_language_model.bin").stat().st_mtime_ns
        _record(
            bundle,
            device,
            samples,
            recording,
            {**settings, "bundle": fingerprint},
            max_new_tokens,
            work_dir / "reference",
        )
        quality = measure(samples, work_dir / "reference", recording, bundle, AutoTokenizer.from_pretrained(bundle))
        qualities[bundle.resolve().name] = quality
        write_json(bundle / "eval.json", {**quality.to_dict(), "settings": _public(settings, dataset)})
    return qualities


def _record(
    name: str | Path,
    device: str,
    samples: list[Sample],
    folder: Path,
    settings: dict,
    max_new_tokens: int,
    reference: Path | None = None,
) -> None:
    prepare_folder(folder, settings)
    if len(list(folder.glob("*.npz"))) >= len(samples):
        logger.info("%s is recorded already", name)
        return
    model, processor = load(name, device)
    if reference is None:
        record_reference(model, processor, samples, folder, max_new_tokens)
    else:
        record_bundle(model, processor, samples, reference, folder, max_new_tokens)
    del model
    gc.collect()


def _public(settings: dict, dataset: str | Path | None) -> dict:
    """What of the settings strangers should see: names, no paths."""
    return {
        "reference": Path(settings["reference"]).name
        if Path(settings["reference"]).exists()
        else settings["reference"],
        "dataset": "coloured shapes (built in)" if dataset is None else Path(dataset).name,
        "max_new_tokens": settings["max_new_tokens"],
        "versions": {name: version(name) for name in ("optimum-llava-ov", "openvino", "nncf", "transformers")},
    }
