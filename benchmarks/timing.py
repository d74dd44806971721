"""Times several callables fairly: in turn, many rounds, medians.

Machines are noisy and drift; a ratio of medians of interleaved rounds survives that, two separate runs do not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SAMPLE_SECONDS = 0.003  # short calls are repeated within a sample until it lasts about so long
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over the rounds."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int


def _sample(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleaved(functions: Mapping[str, Callable[[], object]], min_time: float) -> dict[str, Timing]:
    """Time every function for about `min_time` seconds in all, one sample each per round (A B C, A B C, ...)."""
    calls = {}
    for name, function in functions.items():
        function()
        once = min(_sample(function, 1), _sample(function, 1))
        calls[name] = max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + min_time * len(functions)
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > deadline:
                break
            for name, function in functions.items():
                samples[name].append(_sample(function, calls[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, len(values))
