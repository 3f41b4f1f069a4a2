"""Plot time per token and time to first token against the length of the prompt."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator


# Okabe and Ito's colours, which colour-blind people can distinguish
STYLES = {
    "ours": ("#0072b2", "o"),
    "genai-sdpa": ("#009e73", "s"),
    "genai-pa": ("#56b4e9", "D"),
    "stock": ("#e69f00", "^"),
    "notebook": ("#d55e00", "v"),
    "torch": ("#999999", "P"),
}
OTHER = ("#cc79a7", "X")
# As in docs/performance.md
NAMES = {
    "ours": "OVModelForLlava",
    "genai-sdpa": "GenAI SDPA",
    "genai-pa": "GenAI PA",
    "stock": "stock optimum-intel",
    "notebook": "the OpenVINO notebook's pipeline",
}
PANELS = {"token_ms": "ms per token", "ttft": "seconds to first token"}


def plot(result: dict, file: Path) -> None:
    """Plot the medians at batch size 1, with one line for each contender."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2), PANELS.items()):
        _panel(axes, result["summary"], measure)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    machine = result["machine"]
    figure.suptitle(
        f"LLaVA-MPT {result['size']}, batch size 1 with an image; {machine['cpu']}, {machine['cores']} cores. "
        "Lower is better.",
        fontsize=10,
        color="#444444",
    )
    figure.savefig(file)


def _panel(axes: Axes, summaries: list[dict], measure: str) -> None:
    single = [entry for entry in summaries if entry["batch"] == 1]
    lengths = sorted({entry["prompt_tokens"] for entry in single})
    for contender in dict.fromkeys(entry["contender"] for entry in single):
        entries = [entry for entry in single if entry["contender"] == contender]
        points = [(entry["prompt_tokens"], entry[measure]) for entry in entries if measure in entry]
        if not points:
            continue
        color, marker = STYLES.get(contender, OTHER)
        weight, order = (2.6, 4) if contender == "ours" else (1.6, 3)
        axes.plot(
            *zip(*points),
            color=color,
            marker=marker,
            linewidth=weight,
            zorder=order,
            label=NAMES.get(contender, contender),
        )
        if failed := [
            entry["prompt_tokens"] for entry in entries if "error" in entry and entry["prompt_tokens"] > points[-1][0]
        ]:
            place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"fails at {failed[0]:,}", points[-1], **place, fontsize=8, color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_xlabel("tokens in the prompt, image included")
    axes.grid(True, which="both", axis="y", color="#eeeeee", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
