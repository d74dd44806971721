"""Times several callables fairly: in turn, many rounds, medians.

Machines are noisy and drift; a ratio of medians of interleaved rounds survives that, two separate runs do not. The
order changes from round to round: what ran before leaves the caches full of its own data, and in a fixed order whoever
came after the copy was up to a fifth slower for it.
"""

from __future__ import annotations

import gc
import random
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
    """Time every function for about `min_time` seconds in all, one sample each per round (A B C, C A B, ...)."""
    calls = {}
    for name, function in functions.items():
        function()
        once = min(_sample(function, 1), _sample(function, 1))
        calls[name] = max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffler = list(functions), random.Random(0)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + min_time * len(functions)
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > deadline:
                break
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(_sample(functions[name], calls[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, len(values))
