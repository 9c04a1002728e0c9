#!/usr/bin/env python3
"""Draw what speculation gains: by acceptance and batch on a GPU, and by kind of prompt and method on either device.

    python benchmarks/speculation/plot.py FILE... --out FILE.png [--cost BATCH:C:V ...]

FILE: JSON lines of benchmarks/gpu/speculation.py, of by_kind.py, or of both; of equal settings the last counts.

By acceptance and batch: time a token without speculation over that with it, prompts left out, beside what is expected
of k guesses that are right with probability a each, (1 - a^(k+1)) / (1 - a) / (1 + k c + v) (Leviathan et al. 2023,
theorem 3.8, with v): c is the time of making a guess and v what verifying k of them adds to a step, both as shares of
a step without speculation. They are rows' own, draft_cost and verify_cost, or --cost; without either there is no curve.
The dashed curve is of the best number of guesses up to k, none included, v in proportion: what adaptive lengths aim at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Row = dict[str, Any]
Costs = dict[int, tuple[float, float]]  # c and v by batch
_POINTS = [number / 100 for number in range(100)]


def expected(acceptance: float, guesses: int, draft_cost: float, verify_cost: float) -> float:
    """Speed-up by so many guesses a step. acceptance: 0 to 1, of each guess whose predecessors were right."""
    tokens = sum(acceptance**index for index in range(guesses + 1))
    return tokens / (1 + guesses * draft_cost + verify_cost)


def expected_of_best(acceptance: float, most: int, draft_cost: float, verify_cost: float) -> float:
    """Speed-up by the best number of guesses up to `most`. verify_cost: of `most`."""
    return max(expected(acceptance, k, draft_cost, verify_cost * k / most) for k in range(most + 1))


def costs_of(rows: list[Row], given: list[str]) -> Costs:
    """given: BATCH:C:V each, which come before what rows say. Raises ValueError for what is not of that form."""
    found = {row["batch"]: (row["draft_cost"], row["verify_cost"]) for row in rows if "draft_cost" in row}
    for text in given:
        batch, draft_cost, verify_cost = text.split(":")
        found[int(batch)] = float(draft_cost), float(verify_cost)
    return found


def draw_batch(axes: Axes, batch: int, rows: list[Row], costs: tuple[float, float] | None) -> None:
    """Rows of one batch. Raises ValueError without one of no speculation."""
    base = next((row["ms_a_token"] for row in rows if row["acceptance"] == "none"), None)
    if base is None:
        raise ValueError(f"batch {batch} has no row of acceptance none")
    guessing = [row for row in rows if row["acceptance"] != "none"]
    for is_fixed, color in ((True, "tab:orange"), (False, "tab:blue")):
        for marker, draft in zip("os^vD", sorted({row["draft"] for row in guessing})):
            some = [row for row in guessing if row["fixed"] == is_fixed and row["draft"] == draft]
            points = sorted((float(row["acceptance"]), base / row["ms_a_token"]) for row in some)
            if points:
                how = f"always {some[0]['tokens']}" if is_fixed else "adaptive"
                axes.plot(*zip(*points), marker, color=color, label=f"{how}, {draft}")
    if costs is not None and guessing:
        most = guessing[0]["tokens"]
        fixed = [expected(a, most, *costs) for a in _POINTS]
        axes.plot(_POINTS, fixed, "-", color="tab:orange", label=f"always {most}, expected")
        axes.plot(
            _POINTS,
            [expected_of_best(a, most, *costs) for a in _POINTS],
            "--",
            color="tab:blue",
            label="best, expected",
        )
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(title=f"{batch} at once", xlabel="acceptance of a guess", xlim=(-0.03, 1), ylim=(0, None))


def label(row: Row) -> str:
    """Of a row by kind."""
    return f"{row['method']}, always {row['drafts']}" if row.get("fixed") else str(row["method"])


def draw_kinds(axes: Axes, rows: list[Row], value: str, base: str | None) -> None:
    """Bars by kind, one a method. base: what the same answers had without speculation, a black line in the bar."""
    kinds, methods = list(dict.fromkeys(row["kind"] for row in rows)), list(dict.fromkeys(map(label, rows)))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        own = [row for row in rows if label(row) == method]
        places = [kinds.index(row["kind"]) + (index - (len(methods) - 1) / 2) * width for row in own]
        axes.bar(places, [row[value] for row in own], width, label=method)
        if base is not None:
            ends = [place - width / 2 for place in places], [place + width / 2 for place in places]
            name = "without speculation" if index == 0 else None
            axes.hlines([row[base] for row in own], *ends, color="black", label=name)
    axes.set_xticks(range(len(kinds)), kinds)


def draw(rows: list[Row], given_costs: list[str], out: Path) -> None:
    """Raises ValueError where there is nothing to draw, or no base to compare with."""
    gpu = {(row["batch"], row["acceptance"], row["fixed"], row["draft"]): row for row in rows if "acceptance" in row}
    kinds: dict[str, dict[tuple[str, str], Row]] = {}  # by device
    for row in rows:
        if row.get("benchmark") == "by_kind":
            kinds.setdefault(row.get("device", "cpu"), {})[row["kind"], label(row)] = row
    batches = sorted({batch for batch, *_ in gpu})
    if not batches and not kinds:
        raise ValueError("no rows of gpu/speculation.py or by_kind.py")
    height = bool(batches) + len(kinds)
    figure = pyplot.figure(figsize=(max(10, 3.4 * len(batches)), 3.8 * height), layout="constrained")
    parts = list(figure.subfigures(height, 1, squeeze=False)[:, 0])
    if batches:
        costs, part = costs_of(list(gpu.values()), given_costs), parts.pop(0)
        panels = part.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for axes, batch in zip(panels, batches):
            draw_batch(axes, batch, [row for key, row in gpu.items() if key[0] == batch], costs.get(batch))
        panels[0].set_ylabel("speed-up")
        panels[0].legend(fontsize="small")
    for device, part in zip(sorted(kinds), parts):
        left, right = part.subplots(1, 2)
        draw_kinds(left, list(kinds[device].values()), "tokens_a_step", None)
        draw_kinds(right, list(kinds[device].values()), "tokens_s", "plain_tokens_s")
        left.axhline(1, color="grey", linewidth=0.5)
        left.set_ylabel("tokens a step")
        right.set_ylabel(f"tokens/s, {device.upper()}")
        right.legend(fontsize="small")
    figure.savefig(out, dpi=120)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("files", nargs="+", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--cost", nargs="+", default=[], metavar="BATCH:C:V")
    args = ap.parse_args()
    draw([json.loads(line) for path in args.files for line in path.read_text().splitlines()], args.cost, args.out)


if __name__ == "__main__":
    main()
