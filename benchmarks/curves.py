"""Scaling curves: what a unit of work costs as one size grows, and the time of a call as threads are added.

The cost of a token must not grow with the number of tokens: a working set that leaves a cache, a workspace that grows
faster than the input or a cut that leaves threads idle shows here before anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

from .report import coloured_ratio, short_dtype, time_of
from .results import OURS, Row

LEAST_SIZES, LEAST_COUNTS = 3, 2
THREADS = "threads"
GROWTH = 1.1  # a cost that grows less is called level: runs differ by more than a tenth

# What a call is made of, by the size that varies; the other sizes (ranks, head sizes) have no such unit. As S grows,
# the tokens of the batch stay as many, and each sees more keys.
UNITS: dict[str, tuple[str, Callable[[Any], int]]] = {
    "T": ("token", lambda sizes: int(sizes["T"])),
    "S": ("query and key", lambda sizes: int(sizes["B"] * sizes["S"] * sizes["L"])),
    "L": ("key", lambda sizes: int(sizes["B"] * sizes["L"])),
}


@dataclass(frozen=True)
class Curve:
    """Rows that differ in one number, in its order: a size or the thread count."""

    name: tuple[str, ...]  # op, what is held, dtype, mode, and the threads where a size varies
    axis: str
    points: list[tuple[int, Row]]

    @property
    def unit(self) -> str:
        """What the cost is told of: "token", or "call"."""
        return UNITS[self.axis][0] if self.axis in UNITS else "call"

    def cost(self, row: Row, seconds: float) -> float:
        """Seconds of one unit of a call of `row` that takes so many."""
        return seconds / UNITS[self.axis][1](row.sizes) if self.axis in UNITS else seconds

    def costs(self, ours: bool) -> list[float | None]:
        """The cost at each point, ours or the best peer's."""
        rows = [row for _, row in self.points]
        medians = [row.median((OURS if ours else row.best_peer()) or "") for row in rows]
        return [None if m is None else self.cost(row, m) for m, row in zip(medians, rows, strict=True)]

    def growths(self, ours: bool) -> Iterator[float | None]:
        """At each point, its cost / the least at a smaller size; None at the first."""
        least = None
        for cost in self.costs(ours):
            yield None if cost is None or least is None else cost / least
            least = cost if least is None else least if cost is None else min(least, cost)


def curves(rows: list[Row]) -> list[Curve]:
    """The curves that the rows hold: of at least three sizes, and of at least two thread counts at their last point."""
    found = []
    on_curves = [row for row in rows if row.curve is not None]
    for name, group in _grouped(on_curves, lambda row: (row.op, row.curve, row.dtype, row.mode, row.threads)):
        op, (held, axis), dtype, mode, threads = name
        points = sorted(((row.sizes[axis], row) for row in group), key=lambda point: point[0])
        if len({size for size, _ in points}) >= LEAST_SIZES:
            found.append(Curve((op, held, dtype, mode, threads_of(threads)), axis, points))
    for name, group in _grouped(on_curves, lambda row: (row.op, *row.curve, row.dtype, row.mode)):
        op, _, axis, dtype, mode = name
        last = max(row.sizes[axis] for row in group)
        points = sorted(((row.threads, row) for row in group if row.sizes[axis] == last), key=lambda point: point[0])
        if len({count for count, _ in points}) >= LEAST_COUNTS:
            found.append(Curve((op, points[0][1].case, dtype, mode), THREADS, points))
    return found


def _grouped(rows: list[Row], key: Callable[[Any], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def threads_of(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def print_tables(rows: list[Row], console: Console) -> None:
    """A table of the costs along sizes and one of the times along threads, and which of our costs grow."""
    found = curves(rows)
    by_size = [curve for curve in found if curve.axis in UNITS]
    by_threads = [curve for curve in found if curve.axis == THREADS]
    for title, members, last_column, last in (
        ("cost as a size grows; growth: cost / the least at a smaller size", by_size, "growth", Curve.growths),
        ("time as threads are added; gain: time of the fewest / time", by_threads, "gain", gains),
    ):
        if members:
            _print_table(title, members, last_column, last, console)
    growing = [
        f"{', '.join(curve.name)}, {curve.axis}={size}: {growth:.2f} times the least per {curve.unit} of smaller sizes"
        for curve in by_size
        for (size, _), growth in zip(curve.points, curve.growths(True), strict=True)
        if growth is not None and growth > GROWTH
    ]
    if by_size:
        console.print(f"points where our cost grows by more than {GROWTH - 1:.0%}: {len(growing)}", highlight=False)
    for line in growing:
        console.print(f"  {line}", highlight=False, markup=False)


def gains(curve: Curve, ours: bool) -> Iterator[float | None]:
    costs = curve.costs(ours)
    for cost in costs:
        yield None if cost is None or costs[0] is None else costs[0] / cost


def _print_table(
    title: str,
    members: list[Curve],
    last_column: str,
    last: Callable[[Curve, bool], Iterator[float | None]],
    console: Console,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("op", "", "dtype", "mode", "thr", "at"):
        table.add_column(column)
    for column in (OURS, last_column, "best peer", last_column, "vs best peer"):
        table.add_column(column, justify="right", no_wrap=True)

    def cell(seconds: float | None, unit: str) -> str:
        return "-" if seconds is None else time_of(seconds) + ("" if unit == "call" else f" / {unit}")

    for curve in members:
        table.add_section()
        lasts = zip(last(curve, True), last(curve, False), strict=True)
        costs = zip(curve.costs(True), curve.costs(False), strict=True)
        for (at, row), (ours, theirs), (our_last, their_last) in zip(curve.points, costs, lasts, strict=True):
            table.add_row(
                curve.name[0],
                escape(curve.name[1]),
                short_dtype(row.dtype),
                row.mode,
                str(row.threads),
                f"{curve.axis}={at}",
                cell(ours, curve.unit),
                "" if our_last is None else f"{our_last:.2f}",
                cell(theirs, curve.unit),
                "" if their_last is None else f"{their_last:.2f}",
                coloured_ratio(row),
            )
    console.print(table)
