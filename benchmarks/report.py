"""Results as tables: on the screen, and of a GPU in Markdown too. Only what prints needs rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.console import Console

from .results import FAILED, NOT_OFFERED, OURS, WRONG, Result, Row

# Those that only GPUs have, or whose users are there.
GPU_PEERS = ("flash", "efficient", "cudnn", "flex", "chain", "peft_autocast", "liger", "lorafusion", "bitsandbytes")
PEERS = ("eager", "sdpa", "addmm", "peft", *GPU_PEERS, "compile")
LEVEL = 0.03  # ratios as near to 1 as this are called neither a win nor a loss
MEBIBYTE = 2**20

LEGEND = (
    "Median time of one call ± half the distance of its quartiles. vs best peer: time of the fastest peer / ours, "
    "above 1 we are faster. of limit: the time of as many products by torch.mm (GEMM) or of a copy of as many bytes, "
    "the longer, timed in the same rounds, / ours; above 100% where ours multiplies faster than torch.mm. MiB: peak "
    "memory of one call of ours / of the best peer."
)

GPU_LEGEND = (
    "Median time of one call by the GPU's clock, its cache full of other data; where a row says so, of calls in a row "
    "by the host's clock. of limit: the least time this card could need, by torch.mm (GEMM) or by a copy of as many "
    "bytes, timed in the same rounds, / ours. vs eager, vs best peer: their time / ours, above 1 we are faster. MiB: "
    "peak memory of one call; kept: of it, what forward keeps for backward beside its output; both ours / of the best "
    "peer."
)


def time_of(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def short_dtype(name: str) -> str:
    return name.replace("bfloat", "bf").replace("float", "f")


def _cell(result: Result | None, mark: str = "") -> str:
    if result is None:
        return ""
    if result.status == WRONG:
        return "[bold red]WRONG[/]"
    if result.status == FAILED:
        return "[bold red]failed[/]"
    if result.median is None or result.first_quartile is None or result.third_quartile is None:
        return "-"
    spread = (result.third_quartile - result.first_quartile) / 2 / result.median
    return f"{time_of(result.median)}{mark} ±{spread:.0%}"


def coloured_ratio(row: Row) -> str:
    ratio = row.ratio()
    if ratio is None:
        return ""
    colour = "green" if ratio > 1 + LEVEL else "red" if ratio < 1 - LEVEL else "yellow"
    return f"[{colour}]{ratio:.2f}x {row.best_peer()}[/]"


def _memory(row: Row, field: str = "peak_memory") -> str:
    def mebibytes(name: str | None) -> str:
        size = getattr(row.results.get(name or ""), field, None)
        if size is None:
            return "-"
        value = size / MEBIBYTE
        return f"{value:.0f}" if value >= 0.95 else "<1"

    return f"{mebibytes(OURS)} / {mebibytes(row.best_peer())}"


def gpu_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of one op on a GPU: how near to the limit first, the times of all last."""
    peers = [name for name in PEERS if any(name in row.results for row in rows)]
    headings = ["case", "dtype", "mode", "of limit", "vs eager", "vs best peer", OURS, *peers, "MiB", "kept"]

    def plain(name: str, row: Row) -> str:
        result = row.results.get(name)
        if result is None:
            return ""
        if result.median is None:
            return "-" if result.status == NOT_OFFERED else result.status
        return time_of(result.median) + ("*" if name == OURS and row.declined else "")

    def line(row: Row) -> list[str]:
        share, ratio, ours, eager = row.share_of_limit(), row.ratio(), row.median(OURS), row.median("eager")
        return [
            row.case + (", calls in a row" if row.in_a_row else ""),
            short_dtype(row.dtype),
            row.mode,
            "" if share is None else f"{share:.0%} {row.limit()[1]}",
            "" if ours is None or eager is None else f"{eager / ours:.2f}x",
            "" if ratio is None else f"{ratio:.2f}x {row.best_peer()}",
            plain(OURS, row),
            *(plain(name, row) for name in peers),
            _memory(row),
            _memory(row, "kept_memory") if row.mode == "fwdbwd" else "",
        ]

    return headings, [line(row) for row in rows]


def markdown(rows: list[Row]) -> str:
    """The tables of a GPU, one per op, each with its notes."""
    parts = []
    for op in dict.fromkeys(row.op for row in rows):
        members = [row for row in rows if row.op == op]
        headings, lines = gpu_table(members)
        table = [headings, ["---"] * len(headings), *lines]
        written = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in table)
        parts.append("\n".join([f"### {op}\n", written, "", *(f"- {note}" for note in notes(members))]))
    return "\n\n".join(parts)


def notes(rows: list[Row]) -> list[str]:
    """What the cells cannot say, each once: why a provider is missing, wrong or fell to a slower path."""
    refused: dict[tuple[str, str], dict[str, None]] = {}
    found: list[str] = []
    for row in rows:
        where = f"{row.case}, {row.dtype}, {row.mode}"
        for name, result in row.results.items():
            if result.status == NOT_OFFERED:
                refused.setdefault((name, result.note), {})[row.case] = None
            elif result.status in (WRONG, FAILED):
                found.append(f"{name} {result.status}, {where}: {result.note}")
        times = row.times_beside()
        if times is not None:
            found.append(f"{where}, {row.threads} thr: ours takes {times:.2f} times as long as {row.beside}")
        found += [f"* ours declined, {where}, and plain PyTorch answered: {reason}" for reason in row.declined]
    cases = {row.case for row in rows}
    for (name, reason), without in refused.items():
        where = "all cases" if len(without) == len(cases) > 1 else "; ".join(without)
        found.append(f"{name}: {reason} ({where})")
    return list(dict.fromkeys(found))


def print_table(rows: list[Row], console: Console, device: torch.device) -> None:
    """One op's rows in the order of its cases, wins and losses alike."""
    from rich.markup import escape
    from rich.table import Table

    if device.type != "cpu":
        headings, lines = gpu_table(rows)
        plain = Table(*headings, title=rows[0].op, title_justify="left", title_style="bold")
        for line in lines:
            plain.add_row(*(escape(cell) for cell in line))
        console.print(plain)
        _print_notes(rows, console)
        return
    peers = [name for name in PEERS if any(name in row.results for row in rows)]
    table = Table(title=rows[0].op, title_justify="left", title_style="bold")
    for column in ("case", "dtype", "mode", "thr"):
        table.add_column(column)
    for column in (*peers, OURS, "vs best peer", "of limit", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.case != previous:
            table.add_section()
        previous = row.case
        share = row.share_of_limit()
        table.add_row(
            escape(row.case),
            short_dtype(row.dtype),
            row.mode,
            str(row.threads),
            *(_cell(row.results.get(name)) for name in peers),
            _cell(row.results.get(OURS), "*" if row.declined else ""),
            coloured_ratio(row),
            "" if share is None else f"{share:.0%} {row.limit()[1]}",
            _memory(row),
        )
    console.print(table)
    _print_notes(rows, console)


def _print_notes(rows: list[Row], console: Console) -> None:
    for note in notes(rows):
        console.print(f"  {note}", highlight=False, markup=False)


def print_summary(rows: list[Row], console: Console) -> None:
    """How often we are faster, level and slower, and every row in which we are slower."""
    ratios = [(ratio, row) for row in rows if (ratio := row.ratio()) is not None]
    slower = sorted(((ratio, row) for ratio, row in ratios if ratio < 1 - LEVEL), key=lambda pair: pair[0])
    faster = sum(ratio > 1 + LEVEL for ratio, _ in ratios)
    level = len(ratios) - faster - len(slower)
    console.print(
        f"{len(ratios)} rows beside a peer: {faster} above {1 + LEVEL:.2f}x, {level} level, "
        f"rows below {1 - LEVEL:.2f}x: {len(slower)}",
        style="bold",
        highlight=False,
    )
    for ratio, row in slower:
        where = f"{row.op}: {row.case}, {row.dtype}, {row.mode}, {row.threads} thr"
        console.print(f"  {ratio:.2f}x {row.best_peer()}  {where}", highlight=False, markup=False)
