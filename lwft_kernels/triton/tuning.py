"""Which configuration a kernel runs with.

A room lists a few candidates for a call, the first by a rule that is sane on any card. Without a word from the user the
first is taken, or what has been measured before on this very card and kept on disk. Nothing is ever timed unless
``LWFT_AUTOTUNE=full`` asks for it, so that no first call takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from lwft_kernels.triton.cards import Card

MODES = ("0", "1", "full")


@dataclass(frozen=True)
class Configuration:
    """How a kernel is cut into programs.

    Attributes:
        blocks: the compile-time sizes by their name in the kernel.
        num_warps: of 32 threads (64 on AMD), per program.
        num_stages: how many turns of a loop are loaded ahead.
    """

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}".strip()


Candidate = TypeVar("Candidate")


def mode() -> str:
    """``LWFT_AUTOTUNE``: "0" the rule alone, "1" (default) also what was measured before, "full" measure now."""
    value = os.environ.get("LWFT_AUTOTUNE", "1")
    if value not in MODES:
        raise ValueError(f"LWFT_AUTOTUNE must be one of {', '.join(MODES)}, got {value!r}")
    return value


def size_band(size: int) -> int:
    """Sizes that share a configuration: up to the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def choose(
    name: str, card: Card, band: tuple[Any, ...], candidates: Sequence[Candidate], run: Callable[[Candidate], object]
) -> Candidate:
    """One of `candidates`.

    Args:
        name: of the kernel, or of the op where whole implementations are the candidates.
        card: on which it will run.
        band: what the choice depends on beside the two.
        candidates: each with a `str` of its own, by which it is kept.
        run: runs one, as often as it is called; for measuring.
    """
    how = mode()
    if how == "0":
        return candidates[0]
    table = _table(card)
    if not table and how == "1":  # as for most: what follows takes longer than a launch
        return candidates[0]
    key = f"{name} {' '.join(str(part) for part in band)}"
    kept = table.get(key)
    for candidate in candidates:
        if str(candidate) == kept:
            return candidate
    # a graph that is being captured records launches, it does not time them
    if how != "full" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    best = fastest(candidates, run)
    table[key] = str(best)
    _write(card, key, str(best))
    return best


def fastest(candidates: Sequence[Candidate], run: Callable[[Candidate], object]) -> Candidate:
    """The candidate of the least median time; one that the card cannot run is passed over."""
    times: list[tuple[float, int]] = []
    refused: Exception | None = None
    for position, candidate in enumerate(candidates):
        try:
            seconds = triton.testing.do_bench(lambda c=candidate: run(c), warmup=10, rep=40, return_mode="median")
        except triton.runtime.errors.OutOfResources as error:
            refused = error
            continue
        times.append((seconds, position))
    if not times:
        raise RuntimeError("none of the configurations runs on this card") from refused
    return candidates[min(times)[1]]


def cache_folder() -> Path:
    """Where measured choices are kept: ``LWFT_CACHE_DIR``, else ``lwft_kernels`` in the user's cache folder."""
    named = os.environ.get("LWFT_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwft_kernels"


def _path(card: Card) -> Path:
    # another Triton compiles other code, and what was best need not be so any more
    name = re.sub(r"[^a-z0-9]+", "-", f"{card.name}-triton-{triton.__version__}".lower()).strip("-")
    return cache_folder() / f"{name}.json"


_tables: dict[tuple[Card, str | None, str | None], dict[str, str]] = {}


def _table(card: Card) -> dict[str, str]:
    # by what the path is made of: to make it at every call takes longer than a launch
    key = card, os.environ.get("LWFT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _read(_path(card))
    return table


def forget() -> None:
    """Read the tables of measured choices anew at the next call."""
    _tables.clear()


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no table")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used ({error}); delete it, and LWFT_AUTOTUNE=full measures anew", stacklevel=2)
        return {}
    return {str(key): str(value) for key, value in found.items()}


def _write(card: Card, key: str, value: str) -> None:
    """Add a choice to the file, to what other processes may have written meanwhile."""
    path = _path(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _read(path) if path.exists() else {}
        found[key] = value
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found, indent=1, sort_keys=True))
        partial.replace(path)  # whole or not at all
    except OSError as error:
        warnings.warn(f"the measured configuration cannot be kept: {error}", stacklevel=2)
