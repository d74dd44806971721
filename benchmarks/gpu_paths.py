"""The rows of `lwft_kernels/gpu_paths.json` that a run on a card speaks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lwft_kernels import gpu_paths

from .results import OURS, Report, Row


def table(environment: Mapping[str, Any], benches: Mapping[str, Report]) -> dict[str, Any]:
    """Where the CUDA C++ kernels were right and faster than Triton's, tuned or not, in every row of the place.

    Several cases may lie at one place, with other options or ranks: one that is lost, wrong, declined or not timed
    on either side leaves the place to Triton.
    """
    cuda = benches.get("cuda_bench")
    won: dict[gpu_paths.Place, bool] = {}
    for row in cuda.rows if cuda is not None else ():
        theirs = [
            median
            for name in ("bench", "tuned")
            for other in (benches[name].rows if name in benches else ())
            if _same(row, other) and (median := other.median(OURS)) is not None
        ]
        ours = row.median(OURS)
        faster = bool(theirs) and ours is not None and not row.declined and ours < min(theirs)
        where = _place(environment["GPU"], row)
        won[where] = won.get(where, True) and faster
    measured = [where._asdict() for where, faster in sorted(won.items()) if faster]
    note = f"{environment['GPU']}, {environment['date'][:10]}, commit {environment['commit']}"
    return {"note": note if won else "Not measured.", "measured": measured}


def _same(row: Row, other: Row) -> bool:
    return (row.op, row.case, row.dtype, row.mode) == (other.op, other.case, other.dtype, other.mode)


def _place(card: str, row: Row) -> gpu_paths.Place:
    """Of the op's first tensor: (T, d) tokens, or q (B, H, S, D)."""
    sizes = row.sizes
    if "D" in sizes:
        return gpu_paths.place(card, row.op, row.dtype, sizes["D"], sizes["B"] * sizes["H"] * sizes["S"])
    return gpu_paths.place(card, row.op, row.dtype, sizes.get("d_in", sizes.get("d")), sizes["T"])
