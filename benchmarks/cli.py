"""The command line `lwft-bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import machine, report
from . import plot as plotting
from . import run as running
from .case import PRESETS

PROVIDERS = (*report.PEERS_ORDER, report.OURS)
COMPILE_NOTE = "torch.compile is left out of this preset (compiling takes minutes); --preset full or --providers compile has it."


class _Commands(click.Group):
    """Imports `finetune` when it is asked for: it needs transformers and PEFT."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), "finetune"])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name != "finetune":
            return super().get_command(context, name)
        from .finetune import finetune

        return finetune


@click.group(cls=_Commands)
def main() -> None:
    """The ops of lwft_kernels, and a real fine-tune, against what people use today."""


def _counts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return (torch.get_num_threads(),)
    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("numbers separated by commas, as 1,2") from None
    if min(counts) < 1:
        raise click.BadParameter("at least one thread")
    return counts


@main.command()
@click.argument("families", nargs=-1, type=click.Choice([*running.FAMILIES, "all"]))
@click.option("--preset", type=click.Choice(PRESETS), default="quick", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(running.DTYPES), help="Default: by case.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(running.MODES), help="Default: both.")
@click.option("--threads", callback=_counts, help="CPU threads, as 1,2. Default: torch's.")
@click.option("--providers", multiple=True, type=click.Choice(PROVIDERS), help="Default: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--min-time", default=None, type=float, help="Seconds of timing per provider and row.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    default=Path("results/run.json"),
    show_default=True,
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Also write CSV.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Also draw the picture of `plot`.")
def run(
    families: tuple[str, ...],
    preset: str,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    threads: tuple[int, ...],
    providers: tuple[str, ...],
    seed: int,
    min_time: float | None,
    json_path: Path,
    csv_path: Path | None,
    png_path: Path | None,
) -> None:
    """Check, then time the ops of FAMILIES (default: all).

    Every provider is first held to a float64 oracle; one that is wrong is not timed, and if it is ours the exit status
    is 1. Providers are timed in turn, medians are shown with half their quartile spread, and the last columns give our
    ratio to the best peer and the share of the machine's measured limit that we reach.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = tuple(running.FAMILIES) if not families or "all" in families else families
    without_compile = preset != "full" and not providers
    asked = providers or tuple(name for name in PROVIDERS if not (without_compile and name == "compile"))
    if min_time is None:
        min_time = {"smoke": 0.001, "quick": 0.25, "full": 0.5}[preset]
    planned = running.plans(chosen, preset, dtypes, modes or running.MODES, threads)
    found: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("timing", total=len(planned))
        for row in running.rows(planned, asked, seed, min_time):
            found.append(row)
            progress.update(bar, advance=1, description=row["op"])
    result = {
        "command": " ".join(["lwft-bench", *sys.argv[1:]]),
        "seed": seed,
        "environment": machine.environment(),
        "rows": found,
    }
    for op in dict.fromkeys(row["op"] for row in found):
        report.print_table(op, [row for row in found if row["op"] == op], console)
    if without_compile:
        console.print(COMPILE_NOTE)
    report.write_json(result, json_path)
    if csv_path is not None:
        report.write_csv(result, csv_path)
    if png_path is not None:
        png_path.parent.mkdir(parents=True, exist_ok=True)
        plotting.draw(result, png_path)
    written = ", ".join(str(path) for path in (json_path, csv_path, png_path) if path is not None)
    console.print(f"seed {seed}; written: {written}")
    if any("wrong" in row["providers"].get(report.OURS, {}) for row in found):
        raise SystemExit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def env(as_json: bool) -> None:
    """Versions, processor, compiler, what is loaded, and why something is not: for bug reports."""
    facts = machine.environment()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console().print(table)


@main.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def plot(result: Path, output: Path) -> None:
    """Draw RESULT, a JSON file of `run`: ratios to the best peer, and scaling curves where there are sizes enough."""
    plotting.draw(json.loads(result.read_text()), output)
    click.echo(f"written: {output}")
