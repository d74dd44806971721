"""Pictures of a result file: how we stand to the best peer, and how time grows with the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import OURS, ratio

COLOURS = {"lwft": "#1f77b4", "eager": "#777777", "sdpa": "#d62728", "compile": "#9467bd", "addmm": "#8c564b",
           "peft": "#ff7f0e"}  # fmt: skip


def curves(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one scaling curve (at least three sizes), by its title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["curve"] is not None:
            name, size = row["curve"]
            title = (
                f"{row['op']} {name}, {row['dtype']}, {row['mode']}, {row['threads']} thr: time per {size}"
            )
            found.setdefault(title, []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row["sizes"][row["curve"][1]])
    return {title: rows for title, rows in found.items() if len(rows) >= 3}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG: a bar per row, then the scaling curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [(row, found) for row in result["rows"] if (found := ratio(row)) is not None]
    lines = curves(result)
    height = 1.2 + 0.24 * max(len(bars), 1)
    curve_rows = (len(lines) + 1) // 2
    figure = plt.figure(figsize=(12, height + 3.2 * curve_rows), layout="constrained")
    top, *rest = figure.subfigures(
        2 if curve_rows else 1,
        1,
        height_ratios=[height, 3.2 * curve_rows][: 2 if curve_rows else 1],
        squeeze=False,
    )[:, 0]
    axes = top.subplots()
    labels = [f"{r['op']}: {r['case']}, {r['dtype']}, {r['mode']}, {r['threads']} thr" for r, _ in bars]
    values = [value for _, (value, _) in bars]
    positions = range(len(bars))
    axes.barh(positions, values, color=["#2ca02c" if v >= 1 else "#d62728" for v in values], height=0.7)
    for position, (_, (value, best)) in zip(positions, bars, strict=True):
        axes.text(value, position, f" {value:.2f}x {best}", va="center", fontsize=7)
    axes.set_yticks(positions, labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of the best peer / our time (above 1: we are faster)")
    axes.margins(y=0.005, x=0.15)
    axes.set_title(
        f"{result['environment']['processor']}, torch {result['environment']['torch']}", fontsize=9
    )
    if rest:
        grid = rest[0].subplots(curve_rows, 2, squeeze=False).flat
        for axes, (title, rows) in zip(grid, lines.items(), strict=False):
            _curve(axes, title, rows)
        for axes in list(grid)[len(lines) :]:
            axes.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """Microseconds per unit of the size: a line that does not rise means that cost does not grow with it."""
    for name in {n: None for row in rows for n in row["providers"]}:
        points = [
            (row["sizes"][row["curve"][1]], 1e6 * row["providers"][name]["median"])
            for row in rows
            if row["providers"].get(name, {}).get("median")
        ]
        if points:
            style = {"linewidth": 2.2} if name == OURS else {"linewidth": 1.0}
            axes.plot(*zip(*((x, y / x) for x, y in points), strict=True), marker="o", markersize=3, label=name,
                      color=COLOURS.get(name), **style)  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="us per unit")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
