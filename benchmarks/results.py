"""What was found: a row per case, dtype, mode and thread count; in files, one record per row and provider."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "lwft"
SCHEMA = 2  # of the JSON file

# What became of a provider.
TIMED, WRONG, FAILED, NOT_OFFERED = "timed", "wrong", "failed", "not offered"


@dataclass(frozen=True)
class Result:
    """One provider in one row; times in seconds, memory in bytes, None where not measured.

    `kept_memory` is what forward keeps for backward.
    """

    status: str
    note: str = ""
    median: float | None = None
    first_quartile: float | None = None
    third_quartile: float | None = None
    rounds: int | None = None
    peak_memory: int | None = None
    kept_memory: int | None = None
    error: float | None = None
    allowed_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        flops, bytes: the work of one call, as `work.count` counts it.
        gemm_rate, copy_rate: flop/s of torch.mm in this dtype and bytes/s of a copy of so many bytes, timed in the
            same rounds as the providers.
        backend: who answered for ours: "native", "triton" or "reference"; "-" where nothing of ours ran.
        declined: the reasons why our fast path was not taken, empty when it was.
        in_a_row: whether calls were timed in a row, as `Case.in_a_row` says.
        beside, beside_seconds: what was timed in the same rounds beside the peers, as `Case.beside` says.
    """

    op: str
    case: str
    sizes: Mapping[str, Any]
    curve: tuple[str, str] | None
    dtype: str
    mode: str
    threads: int
    flops: float
    bytes: float
    gemm_rate: float
    copy_rate: float
    backend: str
    declined: tuple[str, ...]
    in_a_row: bool = False
    beside: str | None = None
    beside_seconds: float | None = None
    results: Mapping[str, Result] = field(default_factory=dict)

    def median(self, provider: str) -> float | None:
        result = self.results.get(provider)
        return None if result is None else result.median

    def best_peer(self) -> str | None:
        """The fastest provider that is not ours."""
        timed = {name: r.median for name, r in self.results.items() if name != OURS and r.median is not None}
        return min(timed, key=lambda name: timed[name], default=None)

    def ratio(self) -> float | None:
        """Time of the best peer / our time: above 1 we are faster."""
        best, ours = self.best_peer(), self.median(OURS)
        theirs = None if best is None else self.median(best)
        return None if ours is None or theirs is None else theirs / ours

    def limit(self) -> tuple[float, str]:
        """Seconds of the same work by torch.mm or by a copy, whichever is longer, and which (the roofline)."""
        seconds = {"GEMM": self.flops / self.gemm_rate, "copy": self.bytes / self.copy_rate}
        limiting = max(seconds, key=lambda name: seconds[name])
        return seconds[limiting], limiting

    def share_of_limit(self, provider: str = OURS) -> float | None:
        """Limit / measured time. Above 1 where a provider beats torch.mm or torch's copy."""
        median = self.median(provider)
        return None if median is None else self.limit()[0] / median

    def times_beside(self) -> float | None:
        """Our time / that of the call beside."""
        ours = self.median(OURS)
        return None if ours is None or self.beside_seconds is None else ours / self.beside_seconds


_ROW_FIELDS = tuple(name for name in Row.__dataclass_fields__ if name != "results")
_RESULT_FIELDS = tuple(Result.__dataclass_fields__)


def records(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """One flat record per row and provider. What can be computed from the rest is there too, for other readers."""
    for row in rows:
        shared = {name: getattr(row, name) for name in _ROW_FIELDS}
        for provider, result in row.results.items():
            yield {
                **shared,
                "provider": provider,
                **asdict(result),
                "limited_by": row.limit()[1],
                "share_of_limit": row.share_of_limit(provider),
                "best_peer": row.best_peer() if provider == OURS else None,
                "ratio_to_best_peer": row.ratio() if provider == OURS else None,
            }


def rows_of(found: list[dict[str, Any]]) -> list[Row]:
    """The rows that `records` made `found` of."""

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("op", "case", "dtype", "mode", "threads"))

    rows = []
    for _, group in itertools.groupby(found, key):
        members = list(group)
        shared = {name: members[0][name] for name in _ROW_FIELDS if name in members[0]}
        shared["curve"] = None if shared["curve"] is None else tuple(shared["curve"])
        shared["declined"] = tuple(shared["declined"])
        results = {m["provider"]: Result(**{name: m[name] for name in _RESULT_FIELDS if name in m}) for m in members}
        rows.append(Row(**shared, results=results))
    return rows


@dataclass(frozen=True)
class Report:
    """All of one run, as the JSON file holds it; at least one row, and fewer than `planned` while it lasts."""

    command: str
    seed: int
    environment: Mapping[str, Any]
    rows: list[Row]
    planned: int

    def partial(self) -> str | None:
        """How much is there, None when all is."""
        return f"PARTIAL, {len(self.rows)} of {self.planned} rows" if len(self.rows) < self.planned else None

    def write_json(self, path: Path) -> None:
        content = {
            "schema": SCHEMA,
            "command": self.command,
            "seed": self.seed,
            "environment": dict(self.environment),
            "planned_rows": self.planned,
            "partial": self.partial(),
            "measurements": list(records(self.rows)),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def write_csv(self, path: Path) -> None:
        """The records, with commit and processor in every line, so that files of many runs can be put together."""
        origin = {name: self.environment.get(name) for name in ("date", "commit", "processor", "torch")}
        origin["partial"] = self.partial()
        lines = [
            {
                **record,
                "sizes": " ".join(f"{name}={value}" for name, value in record["sizes"].items()),
                "declined": "; ".join(record["declined"]),
                **origin,
            }
            for record in records(self.rows)
        ]
        with path.open("w", newline="") as file:
            columns = [name for name in lines[0] if name != "curve"]  # the sizes tell it
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)


def read(path: Path) -> Report:
    """A report from its JSON file.

    Raises:
        ValueError: the file is something else, or of another version of this program.
    """
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
        if schema == SCHEMA:
            found = rows_of(content["measurements"])
            return Report(content["command"], content["seed"], content["environment"], found, content["planned_rows"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is not a JSON file of `lwft-bench run`") from None
    raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}: run it again")
