"""Plot quality against size, or against the number of tokens of an image."""

from __future__ import annotations

from pathlib import Path

from optimum_llava_ov.evaluation.metrics import Quality


def plot(qualities: dict[str, Quality], file: Path) -> None:
    """Plot bundles: size on the x axis, divergence from the reference on the y axis. Lower left is better.

    If the bundles differ in the number of tokens of an image, this number is on the x axis.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'The plot needs matplotlib. Install it with: pip install "optimum-llava-ov[eval]"'
        ) from error

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    tokens = [quality.image_tokens for quality in qualities.values() if quality.image_tokens is not None]
    by_tokens = len(tokens) == len(qualities) and len(set(tokens)) > 1
    sizes = [quality.size["total"] / 1e6 for quality in qualities.values()]
    values = [float(number) for number in tokens] if by_tokens else sizes
    # A logarithmic axis cannot show the zero divergence of an unchanged model
    divergences = [max(quality.kl_mean, 1e-7) for quality in qualities.values()]
    axes.scatter(values, divergences, s=70, color="#0068b5", zorder=3)
    for (name, quality), value, divergence in zip(qualities.items(), values, divergences):
        label = name if quality.accuracy is None else f"{name}\n{quality.accuracy:.1%} exact answers"
        axes.annotate(label, (value, divergence), xytext=(8, 6), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(left=0, right=max(values) * 1.3)
    axes.margins(y=0.2)
    axes.set_xlabel("tokens of an image" if by_tokens else "size of the weights, MB")
    axes.set_ylabel("KL divergence from the reference, nats per token")
    axes.grid(True, which="major", color="#e5e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
