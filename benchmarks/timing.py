"""Times several callables fairly: in turn, many rounds, medians.

Machines are noisy and drift; a ratio of medians of interleaved rounds survives that, two separate runs do not. The
order changes from round to round: what ran before leaves the caches full of its own data, and in a fixed order whoever
came after the copy was up to a fifth slower for it.

On a GPU single calls are timed by its own clock, each with a cache that holds none of its data.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SAMPLE_SECONDS = 0.003  # short calls are repeated within a sample until it lasts about so long
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
MOST_LEAD = 0.02  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over the rounds."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int


class Clock(Protocol):
    """How calls are timed."""

    def calls(self, seconds: float) -> int:
        """How many calls of `seconds` make a sample."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds of a call: the mean of so many."""


class HostClock:
    """The host's clock around calls in a row; `wait`, where they run on a GPU, until that is done."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait or (lambda: None)

    def calls(self, seconds: float) -> int:
        return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-9)))

    def sample(self, function: Callable[[], object], calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self._wait()
        return (time.perf_counter() - start) / calls


class Gpu(Protocol):
    """What `DeviceClock` needs of a GPU. Work is done in the order in which it was given."""

    def flush(self) -> None:
        """Give it work that fills its cache with other data."""

    def occupy(self, seconds: float) -> None:
        """Give it nothing to do for so long."""

    def event(self) -> Any:
        """Something with `record()`, to mark a point in its work, and `elapsed_time(later)` in milliseconds."""

    def wait(self) -> None:
        """Until all is done."""


class DeviceClock:
    """A GPU's own clock around single calls, of which it has all launches when it begins.

    The host needs longer to launch a short kernel than the GPU to run it. So it is kept occupied before a call for half
    as long again as the host was seen to need: there are no gaps, and what is timed is the work alone.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._host_seconds: dict[Callable[[], object], float] = {}  # by function: the least time its launches took

    def calls(self, seconds: float) -> int:
        return 1

    def sample(self, function: Callable[[], object], calls: int) -> float:
        times = []
        for _ in range(calls):
            begin, end = self._gpu.event(), self._gpu.event()
            known = self._host_seconds.get(function)
            self._gpu.flush()
            if known is not None:
                self._gpu.occupy(min(1.5 * known, MOST_LEAD))
            start = time.perf_counter()
            begin.record()
            function()
            end.record()
            # the least of all: a function that waits for the GPU is given no longer wait for having waited
            host = time.perf_counter() - start
            self._host_seconds[function] = host if known is None else min(host, known)
            self._gpu.wait()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return sum(times) / calls


def interleaved(
    functions: Mapping[str, Callable[[], object]], min_time: float, clock: Clock | None = None
) -> dict[str, Timing]:
    """Time every function for about `min_time` seconds in all, one sample each per round (A B C, C A B, ...)."""
    clock = clock or HostClock()
    calls = {}
    for name, function in functions.items():
        function()
        once = min(clock.sample(function, 1), clock.sample(function, 1))
        calls[name] = clock.calls(once)
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
                samples[name].append(clock.sample(functions[name], calls[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, len(values))
