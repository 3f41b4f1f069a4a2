"""Report the measurements of `engines.py`: medians, ratios, targets. Uses the standard library only."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass


OURS, STOCK, SDPA, PA, NOTEBOOK = "ours", "stock", "genai-sdpa", "genai-pa", "notebook"
LLAMA, LLAMA_Q4_0 = "llama-Q4_K_M", "llama-Q4_0"
# Name, unit, factor for the stored value, digits
MEASURES = {
    "ttft": ("time to first token", "s", 1, 3),
    "ttft_first": ("time to first token, first answer after loading", "s", 1, 3),
    "token_ms": ("time per token", "ms", 1, 1),
    "tokens_per_second": ("tokens per second, decoding, whole batch", "1/s", 1, 1),
    "tokens_per_second_total": ("tokens per second, prompt included, whole batch", "1/s", 1, 1),
    "load": ("loading", "s", 1, 2),
    "peak_rss": ("peak RSS", "GB", 1e-9, 2),
    "peak_anonymous": ("peak anonymous memory", "GB", 1e-9, 2),
    "preprocess_ms": ("image and text to inputs", "ms", 1, 1),
    "stage_preprocess": ("image to pixel values", "ms", 1, 1),
    "stage_vision": ("vision encoder", "ms", 1, 1),
}


@dataclass(frozen=True)
class Target:
    """Compare a value of the results with its target: at most `limit`, or at least `limit` if `at_least`."""

    name: str
    limit: float
    value: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def summarize(runs: list[dict]) -> list[dict]:
    """Return medians of all rounds for each contender, prompt length and batch size.

    If all runs failed, the entry has only `error`.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[run["prompt_tokens"], run["batch"], run["contender"]].append(run)
    return [
        {"contender": contender, "prompt_tokens": length, "batch": batch, **_summary(group)}
        for (length, batch, contender), group in sorted(groups.items(), key=lambda item: item[0][:2])
    ]


def _summary(runs: list[dict]) -> dict:
    good = [run for run in runs if "error" not in run]
    if not good:
        return {"error": runs[-1]["error"]}
    values = defaultdict(list)
    for run in good:
        for name in ("peak_rss", "peak_anonymous"):
            values[name].append(run["memory"][name])
        values["load"].append(run["load_seconds"])
        values["ttft_first"].append(run["first"]["first_token_seconds"])
        for name, value in run["stages"].items():
            values[f"stage_{name}"].append(value)
        for answer in run["later"]:
            for name, value in _speeds(answer, run["batch"]).items():
                values[name].append(value)
    summary = {name: statistics.median(values[name]) for name in MEASURES if values[name]}
    spread = {name: [min(values[name]), max(values[name])] for name in summary}
    return {
        **summary,
        "spread": spread,
        "rounds": len(good),
        **({"errors": len(runs) - len(good)} if len(good) < len(runs) else {}),
    }


def _speeds(answer: dict, batch: int) -> dict[str, float]:
    new_tokens = len(answer["tokens"][0])
    decoding = answer["seconds"] - answer["first_token_seconds"]
    speeds = {"ttft": answer["first_token_seconds"], "tokens_per_second_total": batch * new_tokens / answer["seconds"]}
    if new_tokens > 1:
        speeds["token_ms"] = 1000 * decoding / (new_tokens - 1)
        speeds["tokens_per_second"] = batch * (new_tokens - 1) / decoding
    if answer["preprocess_seconds"] is not None:
        speeds["preprocess_ms"] = 1000 * answer["preprocess_seconds"]
    return speeds


def find(summaries: list[dict], contender: str, length: int, measure: str, batch: int = 1) -> float | None:
    """Return one median, or `None` if it was not measured."""
    for entry in summaries:
        if (entry["contender"], entry["prompt_tokens"], entry["batch"]) == (contender, length, batch):
            return entry.get(measure)
    return None


def targets(result: dict) -> list[Target]:
    """Return the targets of our class with the measured values."""
    return _mpt_targets(result) if result.get("family", "mpt") == "mpt" else _llama_targets(result)


def _llama_targets(result: dict) -> list[Target]:
    """Return the targets of LLaVA-1.5. Some depend on the processor: VNNI multiplies bytes."""
    summaries = result["summary"]
    lengths = sorted({entry["prompt_tokens"] for entry in summaries})
    has_vnni = any("vnni" in feature for feature in result["machine"]["features"])
    found = []
    for opponent in (SDPA, PA):
        for length in lengths:
            found += [
                _target("time to first token", "ttft", summaries, length, opponent, 1.05),
                _target("ms per token", "token_ms", summaries, length, opponent, 1.05),
                _target("peak RSS", "peak_rss", summaries, length, opponent, 0.8),
            ]
    # The length that was measured nearest to 1,000
    middle = min(lengths, key=lambda length: abs(length - 1000))
    found.append(_target("ms per token", "token_ms", summaries, middle, STOCK, 0.8))
    for opponent in (LLAMA, LLAMA_Q4_0):
        limit = 0.5 if has_vnni else 0.8
        found.append(_target("time to first token", "ttft", summaries, lengths[0], opponent, limit))
    if has_vnni:
        found.append(_target("ms per token", "token_ms", summaries, lengths[0], LLAMA, 1.05))
    return found


def _target(title: str, measure: str, summaries: list[dict], length: int, opponent: str, limit: float) -> Target:
    """Return the target of a ratio of our class to another contender."""
    value = _divide(find(summaries, OURS, length, measure), find(summaries, opponent, length, measure))
    return Target(f"{title} at {length} / {opponent}", limit, value)


def _mpt_targets(result: dict) -> list[Target]:
    summaries = result["summary"]

    def ratio(measure: str, length: int, opponent: str) -> float | None:
        return _divide(find(summaries, OURS, length, measure), find(summaries, opponent, length, measure))

    lengths = {entry["prompt_tokens"] for entry in summaries}
    short, long = min(lengths), 2000 if 2000 in lengths else max(lengths)
    found = []
    for length in sorted({short, long}):
        found += [
            Target(f"time to first token at {length} / {SDPA}", 1.05, ratio("ttft", length, SDPA)),
            Target(f"ms per token at {length} / {SDPA}", 1.08, ratio("token_ms", length, SDPA)),
            Target(f"peak RSS at {length} / {SDPA}", 1.15, ratio("peak_rss", length, SDPA)),
        ]
    found.append(Target(f"ms per token at {short} / {NOTEBOOK}", 0.65, ratio("token_ms", short, NOTEBOOK)))
    if long != short:
        found += [
            Target(f"ms per token at {long} / {NOTEBOOK}", 0.3, ratio("token_ms", long, NOTEBOOK)),
            Target(f"time to first token at {long} / {NOTEBOOK}", 0.45, ratio("ttft", long, NOTEBOOK)),
        ]
    found += [
        Target(f"ms per token at {short} / {LLAMA}", 1, ratio("token_ms", short, LLAMA)),
        Target(f"time to first token at {short} / {LLAMA}", 1 / 1.5, ratio("ttft", short, LLAMA)),
    ]
    export, conversion = result.get("export") or {}, result.get("conversion") or {}
    batches = [find(summaries, OURS, short, "tokens_per_second", batch) for batch in (8, 1)]
    return [
        *found,
        Target(f"peak RSS at {short} / {NOTEBOOK}", 0.5, ratio("peak_rss", short, NOTEBOOK)),
        Target(f"disk / {NOTEBOOK}", 0.55, _divide(export.get("bytes"), conversion.get("bytes"))),
        Target(f"conversion time / {NOTEBOOK}", 0.5, _divide(export.get("seconds"), conversion.get("seconds"))),
        Target(
            "first answer's time to first token / later ones'",
            1.5,
            _divide(find(summaries, OURS, short, "ttft_first"), find(summaries, OURS, short, "ttft")),
        ),
        Target("tokens per second, batch of 8 / batch of 1", 3, _divide(*batches), at_least=True),
    ]


def text(result: dict) -> str:
    """Return the results as text, with ratios to ours in brackets."""
    summaries, machine = result["summary"], result["machine"]
    contenders = list(dict.fromkeys(run["contender"] for run in result["runs"]))
    lines = [
        f"{result.get('family', 'mpt')} {result['size']}: {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load'][0]:.1f}",
        "Medians; in brackets the ratio to ours.",
    ]
    lines += [
        f"{name}: {cost['seconds']:.1f} s, {cost['peak_anonymous'] / 1e9:.2f} GB anonymous memory, "
        f"{cost['peak_rss'] / 1e9:.2f} GB RSS, {cost['bytes'] / 1e9:.2f} GB on disk"
        for name in ("export", "conversion")
        if (cost := result.get(name))
    ]
    configurations = list(dict.fromkeys((entry["prompt_tokens"], entry["batch"]) for entry in summaries))
    for measure, (title, unit, factor, digits) in MEASURES.items():
        rows = []
        for length, batch in configurations:
            cells = [_cell(summaries, name, length, batch, measure, factor, digits) for name in contenders]
            if any(cell not in ("", "fails") for cell in cells):
                rows.append((f"{length} tokens" + (f", batch of {batch}" if batch > 1 else ""), *cells))
        if rows:
            lines += ["", f"{title}, {unit}", *_table([("", *contenders), *rows])]
    if failures := [entry for entry in summaries if "error" in entry]:
        lines += ["", "failures"]
        lines += [
            f"  {e['contender']}, {e['prompt_tokens']} tokens, batch of {e['batch']}: {e['error']}" for e in failures
        ]
    lines += ["", "targets"]
    for target in targets(result):
        value = "not measured" if target.value is None else f"{target.value:.2f}"
        state = {True: "met", False: "MISSED", None: ""}[target.met]
        lines.append(
            f"  {target.name:<56}{value:>14}  ({'>=' if target.at_least else '<='} {target.limit:.3g})  {state}"
        )
    return "\n".join(lines)


def _cell(
    summaries: list[dict], contender: str, length: int, batch: int, measure: str, factor: float, digits: int
) -> str:
    if find(summaries, contender, length, "error", batch):
        return "fails"
    value = find(summaries, contender, length, measure, batch)
    if value is None:
        return ""
    relative = _divide(value, find(summaries, OURS, length, measure, batch))
    return f"{factor * value:.{digits}f}" + (f" ({relative:.2f})" if relative and contender != OURS else "")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
