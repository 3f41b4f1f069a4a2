"""Compute metrics from recordings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from optimum_llava_ov.bundle.layout import part_sizes
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.samples.files import Sample
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_size


@dataclass(frozen=True)
class Quality:
    """Compare a bundle with its reference.

    Attributes:
        kl_mean, kl_p95 (`float`): Kullback-Leibler divergence from the reference's distribution to the bundle's, in
            nats per token of the reference's answers: mean and 95th percentile.
        top1_agreement (`float`): Share of these tokens for which both models give the same token the highest
            probability.
        identical (`float`): Share of samples with the same greedy answer.
        first_divergence (`float` or `None`): Mean index of the first different token, over answers that differ.
        accuracy, reference_accuracy (`float` or `None`): Share of exact answers, if the data has answers.
        num_samples, num_tokens (`int`): Number of samples and tokens that were measured.
        size (`dict[str, int]`): Bytes of each part, and `total`.
        image_tokens (`int` or `None`): Number of tokens of an image or of one of its tiles, if the bundle says it.
    """

    kl_mean: float
    kl_p95: float
    top1_agreement: float
    identical: float
    first_divergence: float | None
    accuracy: float | None
    reference_accuracy: float | None
    num_samples: int
    num_tokens: int
    size: dict[str, int]
    image_tokens: int | None

    def to_dict(self) -> dict:
        return asdict(self)


def measure(samples: list[Sample], reference: Path, recording: Path, bundle: Path, tokenizer) -> Quality:
    """Compute the metrics of a bundle.

    Args:
        reference, recording: Folders that `record_reference` and `record_bundle` wrote.
        bundle: Folder of the bundle, for the sizes of its parts.
    """
    kl_of_samples: list[np.ndarray] = []
    same_top1: list[np.ndarray] = []
    divergences: list[int | None] = []
    is_exact: list[bool] = []
    reference_is_exact: list[bool] = []
    for index, sample in enumerate(samples):
        with np.load(reference / f"{index:05d}.npz") as recorded:
            expected = recorded["tokens"].tolist()
        with np.load(recording / f"{index:05d}.npz") as recorded:
            found = recorded["tokens"].tolist()
            kl_of_samples.append(recorded["kl"])
            same_top1.append(recorded["same_top1"])
        divergences.append(first_difference(expected, found))
        if sample.answer is not None:
            texts = (tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in (found, expected))
            for text, results in zip(texts, (is_exact, reference_is_exact)):
                results.append(text == sample.answer.strip())
    kl = np.concatenate(kl_of_samples)
    sizes = part_sizes(bundle)
    different = [index for index in divergences if index is not None]
    return Quality(
        kl_mean=float(kl.mean()),
        kl_p95=float(np.quantile(kl, 0.95)),
        top1_agreement=float(np.concatenate(same_top1).mean()),
        identical=1 - len(different) / len(samples),
        first_divergence=float(np.mean(different)) if different else None,
        accuracy=float(np.mean(is_exact)) if is_exact else None,
        reference_accuracy=float(np.mean(reference_is_exact)) if is_exact else None,
        num_samples=len(samples),
        num_tokens=len(kl),
        size={**sizes, "total": sum(sizes.values())},
        image_tokens=read_json(bundle / "config.json").get("image_seq_length"),
    )


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """Return the index of the first different token, or `None`. An answer that ends early differs where it ends."""
    for index, (left, right) in enumerate(zip(expected, found)):
        if left != right:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def table(qualities: dict[str, Quality]) -> str:
    """Return the metrics as a text table with one line for each bundle."""
    header = ("bundle", "size", "KL mean", "KL p95", "top-1", "same answers", "first difference", "exact answers")
    rows = [header]
    for name, quality in qualities.items():
        divergence = "-" if quality.first_divergence is None else f"token {quality.first_divergence:.1f}"
        accuracy = (
            "-" if quality.accuracy is None else f"{quality.accuracy:.1%} (reference {quality.reference_accuracy:.1%})"
        )
        rows.append(
            (
                name,
                readable_size(quality.size["total"]),
                f"{quality.kl_mean:.5f}",
                f"{quality.kl_p95:.5f}",
                f"{quality.top1_agreement:.1%}",
                f"{quality.identical:.1%}",
                divergence,
                accuracy,
            )
        )
    return "\n".join(table_lines(rows, "<" * len(header)))
