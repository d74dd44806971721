"""The command line `lwft-bench`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import lwft_kernels

from . import curves as scaling
from . import kernels as triton_kernels
from . import machine, report, results, session
from . import plot as plotting
from . import run as running
from .case import GPU_PRESETS, PRESETS

PROVIDERS = (*report.PEERS, results.OURS)
MIN_TIME = {
    "smoke": 0.001,
    "quick": 0.15,
    "full": 0.25,
    "gpu": 0.1,
    "gpu-smoke": 0.001,
}  # seconds of timing per provider and row
NO_COMPILE = "left out, compiling takes minutes; `run --preset full` or --providers has it"
LEFT_OUT = "left out by --without"
LEAST_WIDTH = 165  # of a table that goes to a file


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


class _Words(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Words of a list, separated by commas; the option may also be repeated."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = ",".join(words)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in value.split(","))
        for word in words:
            if word not in self.words:
                self.fail(f"{word!r} is not one of {', '.join(self.words)}", parameter, context)
        return words


def _joined(_: click.Context, __: click.Parameter, value: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for words in value for word in words))


def _counts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("numbers separated by commas, as 1,2") from None
    if min(counts) < 1:
        raise click.BadParameter("at least one thread")
    return counts


def _device(_: click.Context, __: click.Parameter, value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"{value!r} is no device") from None
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter("cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise click.BadParameter("torch sees no GPU here")
        torch.cuda.set_device(device)
    return device


def _words_option(flag: str, name: str, words: tuple[str, ...], help: str) -> Any:
    return click.option(flag, name, multiple=True, type=_Words(*words), callback=_joined, help=help)


_PATH = click.Path(path_type=Path, dir_okay=False)


def _measuring(json_path: str) -> Callable[[Any], Any]:
    """The arguments and options of the commands that measure: those of `_measured`."""
    decorators = (
        click.argument("families", nargs=-1, type=click.Choice([*running.FAMILIES, "all"])),
        _words_option("--dtype", "dtypes", running.DTYPES, "Default: by case."),
        _words_option("--mode", "modes", running.MODES, "Forward, forward and backward. Default: both."),
        click.option("--threads", callback=_counts, help="CPU threads, as 1,2."),
        _words_option("--providers", "providers", PROVIDERS, "Default: all."),
        _words_option("--without", "without", PROVIDERS, "Providers to leave out; compile takes the longest."),
        click.option("--seed", default=0, show_default=True, help="Of the arguments."),
        click.option(
            "--min-time",
            type=click.FloatRange(min=0.0),
            help="Seconds of timing per provider and row. Default: by preset.",
        ),
        click.option("--json", "json_path", type=_PATH, default=Path(json_path), show_default=True),
        click.option("--csv", "csv_path", type=_PATH, help="Also write CSV."),
        click.option("--png", "png_path", type=_PATH, help="The picture of `plot`. Default: beside the JSON."),
    )

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _measured(
    plans: Callable[..., list[running.Plan]],
    preset: str,
    tables: Callable[[list[results.Row], Console], None] | None = None,
    *,
    families: tuple[str, ...],
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    threads: tuple[int, ...],
    providers: tuple[str, ...],
    without: tuple[str, ...],
    seed: int,
    min_time: float | None,
    json_path: Path,
    csv_path: Path | None,
    png_path: Path | None,
    device: torch.device = running.CPU,
) -> None:
    """Measure what `plans` makes of the words of the command line; print `tables` below those of the ops."""
    console = Console(width=None if sys.stdout.isatty() else LEAST_WIDTH)
    chosen = tuple(running.FAMILIES) if not families or "all" in families else tuple(dict.fromkeys(families))
    absent = {"compile": NO_COMPILE} if preset not in ("full", "gpu") and not providers else {}
    absent |= dict.fromkeys(without, LEFT_OUT)
    usual = [name for name in PROVIDERS if preset in GPU_PRESETS or name not in report.GPU_PEERS]
    asked = tuple(name for name in providers or usual if name not in absent)
    planned = plans(families=chosen, dtypes=dtypes, modes=modes or running.MODES, threads=threads, providers=asked)
    if not planned:
        raise click.UsageError(f"no row of {', '.join(chosen)} has a provider of {', '.join(asked) or 'none'}")
    environment = machine.environment(device)
    environment["peaks"] = machine.peaks(
        tuple(getattr(torch, name) for name in dict.fromkeys(plan.dtype for plan in planned)), device
    )
    files = session.Files(json_path, csv_path, png_path or json_path.with_suffix(".png"))
    least = MIN_TIME[preset] if min_time is None else min_time
    found = session.measure(planned, asked, absent, seed, least, environment, files, console, device)
    legend = report.LEGEND if device.type == "cpu" else report.GPU_LEGEND
    console.print(legend, style="dim", highlight=False)
    if tables is not None:
        tables(found, console)
    report.print_summary(found, console)
    console.print(f"seed {seed}; written: {files}", highlight=False, soft_wrap=True)
    ours = [row.results[results.OURS] for row in found if results.OURS in row.results]
    if any(result.status in (results.WRONG, results.FAILED) for result in ours):
        raise SystemExit(1)


@main.command()
@click.option("--preset", type=click.Choice([*PRESETS, *GPU_PRESETS]), help="Default: quick; on a GPU gpu.")
@click.option("--device", callback=_device, default="cpu", show_default=True, help="As cuda or cuda:1.")
@_measuring("results/run.json")
def run(preset: str | None, device: torch.device, threads: tuple[int, ...], **words: Any) -> None:
    """Check, then time the ops of FAMILIES (default: all), with the threads of torch's default.

    Every provider is first held to a float64 oracle; one that is wrong is not timed, and if it is ours the exit status
    is 1. Providers are timed in turn, and nothing is judged by its time. Tables are printed and files written op by op:
    an interrupted run leaves what it has.
    """
    preset = preset or ("quick" if device.type == "cpu" else "gpu")
    plans = functools.partial(running.plans, preset=preset)
    _measured(plans, preset, threads=threads or (torch.get_num_threads(),), device=device, **words)


@main.command()
@_measuring("results/curves.json")
def curves(threads: tuple[int, ...], **words: Any) -> None:
    """Show how the ops of FAMILIES (default: all) scale with tokens, sequence length, keys and threads.

    The sizes are those of `run --preset full` that lie on a curve, timed with the most threads, the largest with every
    count of --threads (default: 1, 2, 4 ... up to torch's). The cost of a token must not grow.
    """
    counts = threads or running.thread_counts(torch.get_num_threads())
    _measured(running.curve_plans, "quick", scaling.print_tables, threads=counts, **words)


@main.command()
@click.argument("rooms", nargs=-1, type=click.Choice(triton_kernels.ROOMS))
@_words_option("--card", "cards", triton_kernels.card_names(), "Default: all.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that compile.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Triton's. Default: a new one.")
@click.option("--json", "json_path", type=_PATH, help="Also write JSON.")
def kernels(
    rooms: tuple[str, ...], cards: tuple[str, ...], jobs: int, cache: Path | None, json_path: Path | None
) -> None:
    """Compile the Triton kernels of ROOMS (default: all) for cards that need not be here; show what came out.

    Registers and shared memory of every kernel and configuration, how many programs a multiprocessor holds, and the
    matrix instructions. Spills, too much shared memory and a matrix instruction that is missing are faults: the exit
    status is 1.
    """
    if lwft_kernels.backend.triton_error is not None:
        raise click.UsageError(lwft_kernels.backend.triton_error)
    console = Console(width=None if sys.stdout.isatty() else LEAST_WIDTH)
    records = []
    with console.status("compiling") as status:
        for record in triton_kernels.compiled(rooms or triton_kernels.ROOMS, cards, jobs, cache):
            records.append(record)
            status.update(f"{len(records)}: {record['room']}, {record['kernel']}, {record['card']}")
    triton_kernels.print_tables(records, console)
    faults = sum(len(record["faults"]) for record in records)
    console.print(f"{len(records)} kernels compiled, {faults} faults", style="bold", highlight=False)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(records, indent=1) + "\n")
    if faults:
        raise SystemExit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def env(as_json: bool) -> None:
    """Versions, processor, compiler, what is loaded, why something is not, measured peaks: for bug reports."""
    facts = {**machine.environment(), "peaks": machine.peaks((torch.float32, torch.bfloat16), running.CPU)}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False)
    peaks = facts.pop("peaks")
    for name, value in facts.items():
        table.add_row(name, str(value))
    for name, rate in peaks.items():
        table.add_row(f"measured {name}", f"{rate / 1e9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}")
    Console().print(table)


@main.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=_PATH, required=True)
def plot(result: Path, output: Path) -> None:
    """Draw RESULT, a JSON file of `run`: ratios to the best peer, and scaling curves where there are sizes enough."""
    try:
        whole = results.read(result)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    plotting.draw(whole, output)
    click.echo(f"written: {output}")
