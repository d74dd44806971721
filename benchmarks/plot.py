"""Pictures of a result file: how we stand to the best peer, and what a unit of work costs as sizes and threads grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .curves import Curve, curves, threads_of
from .report import PEERS
from .results import OURS, Report, Row

COLOURS = {"lwft": "#1f77b4", "eager": "#777777", "sdpa": "#d62728", "compile": "#9467bd", "addmm": "#8c564b",
           "peft": "#ff7f0e"}  # fmt: skip
FASTER, SLOWER = "#2ca02c", "#d62728"
BAR_INCHES, CURVE_INCHES, CURVES_A_ROW = 0.2, 2.9, 3


def draw(report: Report, path: Path) -> None:
    """Write the PNG: a bar per row, then the scaling curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [row for row in report.rows if row.ratio() is not None]
    lines = curves(report.rows)
    heights = [1.4 + BAR_INCHES * max(len(bars), 1)]
    if lines:
        heights.append(CURVE_INCHES * math.ceil(len(lines) / CURVES_A_ROW))
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _bars(parts[0].subplots(), bars)
    environment, partial = report.environment, report.partial()
    parts[0].suptitle(
        f"{_machine(environment)}, torch {environment['torch']}, "
        f"commit {environment['commit']}, {environment['date'][:10]}" + (f" - {partial}" if partial else ""),
        fontsize=9,
    )
    if lines:
        grid = parts[1].subplots(math.ceil(len(lines) / CURVES_A_ROW), CURVES_A_ROW, squeeze=False)
        for axes, curve in itertools.zip_longest(grid.flat, lines):
            if curve is None:
                axes.set_visible(False)
            else:
                _curve(axes, curve)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _machine(environment: Mapping[str, Any]) -> str:
    if "compute capability" in environment:  # the calls ran on a GPU
        return str(environment["GPU"])
    return f"{environment['processor']}, instruction set {environment['instruction set']}"


def _bars(axes: Any, rows: list[Row]) -> None:
    """Ratios on a logarithmic axis from 1: half as fast is as long to the left as twice as fast to the right."""
    values = [row.ratio() or 1.0 for row in rows]
    logs = [math.log2(value) for value in values]
    axes.barh(range(len(rows)), logs, color=[FASTER if x >= 0 else SLOWER for x in logs], height=0.7)
    for position, (row, value, x) in enumerate(zip(rows, values, logs, strict=True)):
        text = f" {value:.2f}x {row.best_peer()} "
        axes.text(x, position, text, va="center", ha="left" if x >= 0 else "right", fontsize=7)
    threads = {row.threads for row in rows}
    labels = [
        f"{row.op}: {row.case}, {row.dtype}, {row.mode}" + (f", {threads_of(row.threads)}" if len(threads) > 1 else "")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.005, x=0.2)
    low, high = (math.floor(min([-1.0, *logs])), math.ceil(max([1.0, *logs])))
    ticks = range(low, high + 1)
    axes.set_xticks(ticks, [f"{2.0**tick:g}x" for tick in ticks])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    title = "time of the best peer / our time: right of 1x we are faster, left of it slower"
    axes.set_title(title + (f"; {threads_of(threads.pop())}" if len(threads) == 1 else ""), fontsize=9)


def _curve(axes: Any, curve: Curve) -> None:
    """The cost of every provider, and the dashed least that the machine could need."""
    for name in (*PEERS, OURS):
        points = [(x, curve.cost(row, median)) for x, row in curve.points if (median := row.median(name)) is not None]
        if points:
            width = 2.2 if name == OURS else 1.0
            axes.plot(*zip(*points, strict=True), "o-", ms=3, label=name, color=COLOURS.get(name), linewidth=width)
    limits = [(x, curve.cost(row, row.limit()[0])) for x, row in curve.points]
    axes.plot(*zip(*limits, strict=True), "--", color="black", linewidth=0.8, label="limit")
    axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel=f"seconds / {curve.unit}")
    positions = [x for x, _ in curve.points]
    axes.set_xticks(positions, [str(x) for x in positions], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_title(", ".join(curve.name), fontsize=8)
    axes.legend(fontsize=6)
