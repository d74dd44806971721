"""Tables and picture of `lwft-bench finetune`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEBIBYTE = 2**20


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Speed and accuracy of the two variants, then what was replaced and how often it was reached."""
    options, runs = result["options"], result["runs"]
    baseline, ours = runs["baseline"], runs["accelerated"]
    tokens = options["batch"] * options["seq_len"]

    table = Table(
        title=f"{options['method']} fine-tune of {options['model']}, float32, "
        f"batch {options['batch']} x {options['seq_len']} tokens, {options['threads']} threads, "
        f"{options['steps']} steps"
    )
    for column in ("", "baseline", "accelerated", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    times = [_quartiles(run["step_seconds"][1:] or run["step_seconds"]) for run in (baseline, ours)]
    table.add_row(
        "step, median (quartiles)", *(f"{m * 1e3:.0f} ms ({a * 1e3:.0f}-{b * 1e3:.0f})" for a, m, b in times),
        f"{result['speedup']:.2f}x",
    )  # fmt: skip
    speeds = [tokens / median for _, median, _ in times]
    table.add_row("tokens/s", *(f"{s:,.0f}" for s in speeds), f"{speeds[1] / speeds[0]:.2f}x")
    peaks = [run["peak_memory"] for run in (baseline, ours)]
    if all(peaks):
        table.add_row(
            "peak memory of a step",
            *(f"{p / MEBIBYTE:,.0f} MiB" for p in peaks),
            f"{peaks[1] / peaks[0]:.2f}x",
        )
    table.add_row("loss, first", *(f"{run['losses'][0]:.4f}" for run in (baseline, ours)), "")
    table.add_row("loss, last 5", *(f"{statistics.mean(r['losses'][-5:]):.4f}" for r in (baseline, ours)), "")
    table.add_row("accuracy before", *(f"{run['accuracy_before']:.1%}" for run in (baseline, ours)), "")
    table.add_row("accuracy after", *(f"{run['accuracy_after']:.1%}" for run in (baseline, ours)), "")
    console.print(table)
    console.print(
        f"Loss curves with dropout off differ by {result['loss_difference_without_dropout']:.1e} at most (relative, "
        f"{options['check_steps']} steps). Accuracy on {result['held_out_texts']} held-out texts of "
        f"{len(result['labels'])} packages; {result['trained_parameters']:,} parameters trained."
    )
    console.print(result["report"], highlight=False, soft_wrap=True)
    for op, count in result["stats"].items():
        console.print(f"{op}: {count['fast']} calls fast", highlight=False)
        for reason, number in count["declined"].items():
            console.print(f"  {number} declined: {reason}", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in result["versions"].items()), highlight=False)


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    if len(seconds) < 2:
        return (seconds[0],) * 3
    first, median, third = statistics.quantiles(seconds, n=4)
    return first, median, third


def draw(result: dict[str, Any], path: Path) -> None:
    """Both loss curves and both speeds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    options, runs = result["options"], result["runs"]
    colours = {"baseline": "#777777", "accelerated": "#1f77b4"}
    figure, (losses, steps) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained")
    for name, run in runs.items():
        losses.plot(run["losses"], color=colours[name], label=f"{name}, dropout on")
        losses.plot(
            result["losses_without_dropout"][name],
            color=colours[name],
            linestyle="--",
            label=f"{name}, dropout off",
        )
    losses.set(xlabel="step", ylabel="training loss", title=f"{options['method']}: loss")
    losses.set_ylim(bottom=0)
    losses.legend()
    data = [[1e3 * s for s in run["step_seconds"][1:] or run["step_seconds"]] for run in runs.values()]
    boxes = steps.boxplot(data, tick_labels=list(runs), patch_artist=True, showfliers=False, widths=0.5)
    for box, name in zip(boxes["boxes"], runs, strict=True):
        box.set_facecolor(colours[name])
    steps.set(ylabel="time of a step, ms", title=f"{result['speedup']:.2f}x as fast")
    steps.set_ylim(bottom=0)
    figure.suptitle(
        f"MiniLM, batch {options['batch']} x {options['seq_len']} tokens, {options['threads']} CPU threads, float32"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
