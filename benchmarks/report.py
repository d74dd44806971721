"""Results as tables on the screen, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "lwft"
PEERS_ORDER = ("eager", "sdpa", "addmm", "peft", "compile")


def ratio(row: dict[str, Any]) -> tuple[float, str] | None:
    """Time of the best peer / our time, and who that is; None where one of them is missing."""
    times = {name: p["median"] for name, p in row["providers"].items() if p.get("median")}
    peers = {name: t for name, t in times.items() if name != OURS}
    if OURS not in times or not peers:
        return None
    best = min(peers, key=lambda name: peers[name])
    return peers[best] / times[OURS], best


def limit(row: dict[str, Any]) -> tuple[float, str] | None:
    """The share of the measured machine limit that our call reaches, and which limit is the nearer one."""
    mine = row["providers"].get(OURS, {}).get("median")
    if not mine:
        return None
    shares = {
        "GEMM": row["flops"] / mine / row["peaks"]["gemm"],
        "copy": row["bytes"] / mine / row["peaks"]["copy"],
    }
    nearer = max(shares, key=lambda name: shares[name])
    return shares[nearer], nearer


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def _cell(provider: dict[str, Any] | None) -> str:
    if provider is None:
        return ""
    if "wrong" in provider:
        return "[bold red]WRONG[/]"
    if "reason" in provider:
        return "-"
    spread = (provider["third_quartile"] - provider["first_quartile"]) / 2 / provider["median"]
    return f"{_time(provider['median'])} ±{spread:.0%}"


def _colour(value: float) -> str:
    return "green" if value >= 1.03 else "red" if value < 0.97 else "yellow"


def print_table(op: str, rows: list[dict[str, Any]], console: Console) -> None:
    """One table per op, the cases in their order; wins and losses alike."""
    names = [n for n in PEERS_ORDER if any(n in row["providers"] for row in rows)]
    table = Table(title=op, title_justify="left")
    for column in ("case", "dtype", "mode", "thr"):
        table.add_column(column)
    for column in (*names, OURS, "vs best peer", "of limit"):
        table.add_column(column, justify="right", no_wrap=True)
    notes: list[str] = []
    for row in rows:
        found, share = ratio(row), limit(row)
        table.add_row(
            row["case"],
            row["dtype"].replace("float", "f"),
            row["mode"],
            str(row["threads"]),
            *(_cell(row["providers"].get(name)) for name in (*names, OURS)),
            "" if found is None else f"[{_colour(found[0])}]{found[0]:.2f}x {found[1]}[/]",
            "" if share is None else f"{share[0]:.0%} {share[1]}",
        )
        for name, provider in row["providers"].items():
            for kind in ("wrong", "reason"):
                if kind in provider:
                    notes.append(f"{name}, {row['case']}: {provider[kind]}")
        notes += [f"ours declined {row['case']}: {reason}" for reason in row["declined"]]
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(f"  {note}", highlight=False)


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))


def write_csv(result: dict[str, Any], path: Path) -> None:
    """One line per provider."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "op",
                "case",
                "dtype",
                "mode",
                "threads",
                "provider",
                "median_s",
                "first_quartile_s",
                "third_quartile_s",
                "note",
            ]
        )
        for row in result["rows"]:
            for name, p in row["providers"].items():
                times = [p.get(key) for key in ("median", "first_quartile", "third_quartile")]
                note = p.get("wrong") or p.get("reason") or ""
                writer.writerow(
                    [row["op"], row["case"], row["dtype"], row["mode"], row["threads"], name, *times, note]
                )
