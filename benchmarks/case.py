"""What a benchmark case is: named sizes, arguments made from a seed, and who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]
Run = Callable[[], Tensor]

# The smallest preset that holds a case. "smoke" is for tests: its sizes are too small to mean anything.
PRESETS = ("smoke", "quick", "full")
# Those of a GPU hold nothing of each other. "gpu-smoke" has the cases of "gpu" in sizes for tests.
GPU_PRESETS = ("gpu", "gpu-smoke")
TINY = 64  # elements of a call that is nothing but overhead


class NotOffered(Exception):
    """A provider cannot compute a case; the message says why."""


class Beside(NamedTuple):
    """A call that computes something else, timed in the same rounds: what ours is told against beside its peers.

    `arguments` are those whose leaves its backward differentiates.
    """

    name: str
    run: Run
    arguments: Arguments


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        name: what is special about it, with its sizes.
        sizes: the sizes by their letter, and the options that are not off.
        preset: the smallest preset it belongs to.
        dtypes: the dtypes it is timed in unless the command line names some.
        curve: the name of the scaling curve it is a point of, and the size that varies.
        trains: whether it has a backward; decoding and serving have none.
        beside: makes the call that our time is told against beside the peers.
        in_a_row: on a GPU, calls are timed in a row by the host's clock, as by a program that does little else: for
            sizes whose launches take longer than their work. Others are timed one by one by the GPU's own clock.
    """

    name: str
    sizes: Mapping[str, Any]
    preset: str
    dtypes: tuple[str, ...] = ("float32",)
    curve: tuple[str, str] | None = None
    trains: bool = True
    beside: Callable[[Arguments], Beside] | None = None
    in_a_row: bool = False


@dataclass(frozen=True)
class Family:
    """The cases of one op and its providers.

    Attributes:
        op: name of the op.
        cases: all presets together.
        arguments: (case, dtype, generator) -> arguments of the op, on the generator's device; leaves that train
            require a gradient.
        flops: (case, arguments, backward) -> floating-point operations of the shortest known way to compute it; a
            multiply and an add are two.
        providers: by name, (case, arguments) -> a call without arguments; raises `NotOffered`. "eager" comes first.
        ours: the op itself; under the reference backend it is the specification.
    """

    op: str
    cases: tuple[Case, ...]
    arguments: Callable[[Case, torch.dtype, torch.Generator], Arguments]
    flops: Callable[[Case, Arguments, bool], float]
    providers: Mapping[str, Callable[[Case, Arguments], Run]]
    ours: Callable[..., Any]


def in_preset(case: Case, preset: str) -> bool:
    """Whether `case` belongs to `preset`: "full" holds "quick", no other holds another."""
    alone = ("smoke", *GPU_PRESETS)
    if preset in alone or case.preset in alone:
        return case.preset == preset
    return PRESETS.index(case.preset) <= PRESETS.index(preset)


def leaves(arguments: Arguments) -> dict[str, Tensor]:
    """The tensors that want a gradient, each once, by its first name (an adapter's residual is its x)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def overhead(elements: int) -> Callable[[Arguments], Beside] | None:
    """The `beside` of a case of so many elements: where a call is nothing but overhead, that of one eager op."""
    return _one_eager_op if elements == TINY else None


def _one_eager_op(a: Arguments) -> Beside:
    x: Tensor = next(iter(a.values()))
    return Beside("one eager op, x * 2", lambda: x * 2.0, {"x": x})


def normal(
    generator: torch.Generator, dtype: torch.dtype, *shape: int, grad: bool = False, scale: float = 1.0
) -> Tensor:
    """A leaf of N(0, scale**2), drawn in float32 so that every dtype sees the same numbers, rounded."""
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return (drawn * scale).to(dtype).requires_grad_(grad)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the shapes of one case; the caches are cleared before the next one."""
    return torch.compile(function, dynamic=False)
