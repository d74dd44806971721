"""Pictures of a result file: how we stand to the best peer, and how the rate grows with sizes and threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import PEERS
from .results import OURS, Report, Row

COLOURS = {"lwft": "#1f77b4", "eager": "#777777", "sdpa": "#d62728", "compile": "#9467bd", "addmm": "#8c564b",
           "peft": "#ff7f0e"}  # fmt: skip
FASTER, SLOWER = "#2ca02c", "#d62728"
LEAST_SIZES = 3
BAR_INCHES, CURVE_INCHES, CURVES_A_ROW = 0.2, 2.9, 3


@dataclass(frozen=True)
class Curve:
    """Rows that differ in one number: a size or the thread count."""

    title: str
    axis: str
    points: list[tuple[float, Row]]


def curves(rows: list[Row]) -> list[Curve]:
    """The scaling curves that the rows hold: at least three sizes, or at least two thread counts."""
    by_size = _gathered(
        [row for row in rows if row.curve is not None],
        lambda row: (row.op, *row.curve, row.dtype, row.mode, row.threads),
        lambda key: f"{key[0]}, {key[1]}, {key[3]}, {key[4]}, {_threads(key[5])}",
        lambda row: row.curve[1],
        lambda row: row.sizes[row.curve[1]],
        LEAST_SIZES,
    )
    by_threads = _gathered(
        rows,
        lambda row: (row.op, row.case, row.dtype, row.mode),
        lambda key: f"{key[0]}, {key[1]}, {key[2]}, {key[3]}",
        lambda row: "threads",
        lambda row: row.threads,
        2,
    )
    return [*by_size, *by_threads]


def _gathered(
    rows: list[Row],
    key: Callable[[Any], tuple[Any, ...]],
    title: Callable[[tuple[Any, ...]], str],
    axis: Callable[[Any], str],
    position: Callable[[Any], float],
    least: int,
) -> list[Curve]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    found = []
    for name, members in groups.items():
        points = sorted(((position(row), row) for row in members), key=lambda point: point[0])
        if len({x for x, _ in points}) >= least:
            found.append(Curve(title(name), axis(members[0]), points))
    return found


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


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
    environment = report.environment
    parts[0].suptitle(
        f"{environment['processor']}, instruction set {environment['instruction set']}, torch {environment['torch']}, "
        f"commit {environment['commit']}, {environment['date'][:10]}",
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
        f"{row.op}: {row.case}, {row.dtype}, {row.mode}" + (f", {_threads(row.threads)}" if len(threads) > 1 else "")
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
    axes.set_title(title + (f"; {_threads(threads.pop())}" if len(threads) == 1 else ""), fontsize=9)


def _curve(axes: Any, curve: Curve) -> None:
    """The rate at which the least possible work is done, and the dashed limit of the machine."""
    rows = [row for _, row in curve.points]
    by_copy = sum(row.limit()[1] == "copy" for row in rows) * 2 > len(rows)

    def rate(row: Row, seconds: float) -> float:
        return (row.bytes if by_copy else row.flops) / seconds / 1e9

    names = [name for name in (*PEERS, OURS) if any(row.median(name) for row in rows)]
    for name in names:
        points = [(x, rate(row, median)) for x, row in curve.points if (median := row.median(name)) is not None]
        style = {"linewidth": 2.2} if name == OURS else {"linewidth": 1.0}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=COLOURS.get(name), **style)
    limits = [(x, rate(row, row.limit()[0])) for x, row in curve.points]
    axes.plot(*zip(*limits, strict=True), "--", color="black", linewidth=0.8, label="limit")
    axes.set(xscale="log", xlabel=curve.axis, ylabel="GB/s" if by_copy else "GFLOP/s")
    axes.set_ylim(bottom=0)
    positions = sorted({x for x, _ in curve.points})
    axes.set_xticks(positions, [f"{x:g}" for x in positions], fontsize=7)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(curve.title, fontsize=8)
    axes.legend(fontsize=6)
