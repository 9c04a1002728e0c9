#!/usr/bin/env python3
"""The measured rows beside the bar: a Markdown table and a graph.

    python benchmarks/gpu/report.py [--rows benchmarks/results/gpu-rows.jsonl] [--out benchmarks/results]
                                    [--sections offline-8b,served]

bar.json says which rows there are, what the peer reached, and the limit. Of each workload the latest invocation
counts (rows of equal stamp), the median over its repeats. A ratio above 1 means that Octavo is better, whichever way
round the metric goes. "of limit" is the share of the limit that is reached. Every row of the sections asked for must
have been measured, on one kind of GPU: otherwise the missing ones are named, nothing is written, and the exit
status is 1. Writes GPU-DATE.md and GPU-DATE.png, such as h200-2026-12-01.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:  # the table needs none
    pyplot = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
TICKS = (0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20)
Row = dict[str, Any]


class MissingRowsError(ValueError):
    """Rows that the bar has and nobody measured."""


@dataclass(frozen=True)
class Comparison:
    """One line of the table. `values`: one for each repeat of the invocation."""

    section: str
    label: str
    unit: str
    better: str  # "lower" or "higher"
    values: list[float]
    vllm: float | None
    limit: float | None
    goal: float | None
    rows: list[Row]

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    def over(self, other: float | None) -> float | None:
        """How many times better the value is than `other`; None where there is no other."""
        if other is None:
            return None
        return other / self.value if self.better == "lower" else self.value / other

    @property
    def ratio(self) -> float | None:
        """Octavo over the peer: above 1, Octavo is better."""
        return self.over(self.vllm)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        return None if self.goal is None else self.over(self.goal) >= 1  # type: ignore[operator]


def latest(rows: Sequence[Row], section: str, workload: str) -> list[Row]:
    """The rows of the last invocation that ran this workload."""
    of_it = [row for row in rows if row.get("section") == section and row.get("workload") == workload]
    newest = max((row["stamp"] for row in of_it), default=None)
    return [row for row in of_it if row["stamp"] == newest]


def usable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def compare(bar: Row, rows: Sequence[Row], sections: Sequence[str]) -> list[Comparison]:
    """One Comparison for each row of the bar in `sections`, in the bar's order.

    Raises MissingRowsError naming all rows that are missing or hold no positive number, and ValueError for a section
    that the bar lacks, or for rows of different GPUs.
    """
    known = {entry["section"] for entry in bar["rows"]}
    if unknown := [section for section in sections if section not in known]:
        raise ValueError(f"sections={','.join(unknown)} is unknown; allowed: {', '.join(sorted(known))}")
    found, missing = [], []
    for entry in bar["rows"]:
        if entry["section"] not in sections:
            continue
        measured = latest(rows, entry["section"], entry["workload"])
        values = [row.get(entry["metric"]) for row in measured]
        if not values or not all(map(usable, values)):
            missing.append(f"{entry['section']} / {entry['workload']} / {entry['metric']}")
            continue
        fields = {name: entry[name] for name in ("section", "label", "unit", "better", "vllm", "limit", "goal")}
        found.append(Comparison(values=values, rows=measured, **fields))
    if missing:
        raise MissingRowsError("missing rows:\n  " + "\n  ".join(missing))
    gpus = {row["gpu"] for comparison in found for row in comparison.rows}
    if len(gpus) > 1:
        raise ValueError(f"the rows are of different GPUs: {', '.join(sorted(gpus))}; name sections measured on one")
    return found


def number(value: float | None) -> str:
    """Three significant digits or more, "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def versions(comparisons: Sequence[Comparison], name: str) -> str:
    return ", ".join(sorted({str(row[name]) for comparison in comparisons for row in comparison.rows}))


def markdown(bar: Row, comparisons: Sequence[Comparison], left_out: Sequence[str], graph: str) -> str:
    """The report's text."""
    gpu = versions(comparisons, "gpu")
    lines = [
        f"# Octavo beside {bar['peer']} on one GPU, {versions(comparisons, 'date')}",
        "",
        f"Octavo: {gpu}, torch {versions(comparisons, 'torch')}, triton {versions(comparisons, 'triton')}, "
        f"commit {versions(comparisons, 'commit')}.",
        f"Peer: {bar['source']}; {bar['conditions']}.",
        "Ratio above 1: Octavo is better. Medians over the repeats of one invocation; every repeat is listed below.",
    ]
    if gpu != bar["gpu"]:
        lines.append(f"**The peer was measured on another card ({bar['gpu']}): the ratios are not like for like.**")
    if left_out:
        lines.append(f"Not measured here: {', '.join(left_out)}.")
    lines += [
        "",
        f"| row | unit | Octavo | {bar['peer']} | ratio | limit | of limit | goal | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        share = c.over(c.limit)
        cells = [c.label, c.unit, number(c.value), number(c.vllm), "-" if c.ratio is None else f"{c.ratio:.2f}"]
        cells += [number(c.limit), "-" if share is None else f"{share:.0%}", number(c.goal)]
        cells.append({None: "-", True: "yes", False: "no"}[c.reached])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"![ratios]({graph})", "", "Commands, and every repeat:", ""]
    lines += [f"    {command}" for command in dict.fromkeys(r["command"] for c in comparisons for r in c.rows)]
    lines.append("")
    lines += [f"    {c.label}: {', '.join(map(number, c.values))} {c.unit}" for c in comparisons]
    return "\n".join(lines) + "\n"


def draw(bar: Row, comparisons: Sequence[Comparison], path: Path) -> None:
    """A bar for each row that the peer has: the ratio, on a logarithmic axis, 1 in the middle."""
    shown = [(c, c.ratio) for c in comparisons if c.ratio is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.32 * len(shown)), layout="constrained")
    ratios = [ratio for _, ratio in shown]
    colours = ["#2a7f62" if ratio >= 1 else "#b5493b" for ratio in ratios]
    axes.barh(range(len(shown)), [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.7)
    axes.set_xscale("log")
    low, high = min([0.8, *ratios]) / 1.15, max([1.25, *ratios]) * 1.25
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(pyplot.NullLocator())
    axes.set_yticks(range(len(shown)), [c.label for c, _ in shown], fontsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    for place, (c, ratio) in enumerate(shown):
        text = f"{ratio:.2f}  ({number(c.value)} beside {number(c.vllm)} {c.unit})"
        axes.text(max(ratio, 1), place, f"  {text}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as good as {bar['peer']} (> 1: Octavo is better)")
    gpu = versions(comparisons, "gpu")
    peer = "" if gpu == bar["gpu"] else f" (peer: {bar['gpu']})"
    axes.set_title(f"Octavo / {bar['peer']}, {gpu}{peer}, {versions(comparisons, 'date')}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def short_name(gpu: str) -> str:
    """File name of a card: "NVIDIA H200" -> "h200", "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = [word for word in gpu.lower().split() if word != "nvidia"]
    return words[0] if words else "none"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE.parent / "results" / "gpu-rows.jsonl")
    parser.add_argument("--bar", type=Path, default=HERE / "bar.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--sections", help="those to report, comma-separated; the default is all of the bar's")
    args = parser.parse_args(arguments)
    try:
        bar = json.loads(args.bar.read_text())
        known = list(dict.fromkeys(entry["section"] for entry in bar["rows"]))
        sections = args.sections.split(",") if args.sections else known
        rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
        comparisons = compare(bar, rows, sections)
        if pyplot is None:
            raise ValueError("the graph needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as wrong:
        print(f"report: {wrong}", file=sys.stderr)
        return 1
    last = max(row["date"] for c in comparisons for row in c.rows)
    stem = f"{short_name(versions(comparisons, 'gpu'))}-{last}"
    args.out.mkdir(parents=True, exist_ok=True)
    left_out = [section for section in known if section not in sections]
    draw(bar, comparisons, args.out / f"{stem}.png")
    (args.out / f"{stem}.md").write_text(markdown(bar, comparisons, left_out, f"{stem}.png"))
    print(args.out / f"{stem}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
