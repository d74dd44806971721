"""One run as its user sees it: what is to come, a table per op as soon as it is done, files that hold what there is."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import plot, report
from . import run as running
from .results import Report, Row


@dataclass(frozen=True)
class Files:
    """Where a report goes."""

    json: Path
    csv: Path | None
    png: Path

    def write(self, whole: Report) -> None:
        for path in (self.json, self.csv, self.png):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_json(self.json)
        if self.csv is not None:
            whole.write_csv(self.csv)
        plot.draw(whole, self.png)

    def __str__(self) -> str:
        return ", ".join(str(path) for path in (self.json, self.csv, self.png) if path is not None)


def measure(
    planned: list[running.Plan],
    providers: tuple[str, ...],
    absent: dict[str, str],
    seed: int,
    min_time: float,
    environment: Mapping[str, Any],
    files: Files,
    console: Console,
    device: torch.device,
) -> list[Row]:
    """Run the plans in their order; `absent` are the providers left out, and why.

    After every op its table is printed and the files are written anew. A run that is interrupted prints and writes the
    rows that it has, and the files say that they are partial.
    """
    ops = Counter(plan.family.op for plan in planned)
    counts = ", ".join(f"{op} {count}" for op, count in ops.items())
    console.print(f"{len(planned)} rows: {counts}", highlight=False)
    for name, reason in absent.items():
        console.print(f"{name}: {reason}", highlight=False, markup=False)
    command = " ".join(["lwft-bench", *sys.argv[1:]])
    found: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(planned))
        for _, plans in itertools.groupby(planned, lambda plan: plan.family.op):
            of_op: list[Row] = []
            members = list(plans)
            try:
                progress.update(bar, description=_described(members[0]))
                for done, row in enumerate(running.rows(members, providers, seed, min_time, device), 1):
                    of_op.append(row)
                    progress.update(bar, advance=1, description=_described(members[min(done, len(members) - 1)]))
            finally:
                if of_op:
                    found += of_op
                    report.print_table(of_op, console, device)
                    files.write(Report(command, seed, environment, found, len(planned)))
    return found


def _described(plan: running.Plan) -> str:
    return f"{plan.family.op}: {plan.case.name}, {plan.dtype}, {plan.mode}"
