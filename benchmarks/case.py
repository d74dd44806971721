"""What a benchmark case is: named sizes, arguments made from a seed, and who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Run = Callable[[], Tensor]


class NotOffered(Exception):
    """A provider cannot compute a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: what is special about it, with its sizes.
        sizes: the sizes by their letter, and the options that are not off.
        preset: the smallest preset it belongs to: "smoke", "quick" or "full".
        flops: floating-point operations of one forward call (a multiply and an add are two).
        values: elements that one forward call must at least read and write.
        dtypes: the dtypes it is timed in unless the command line names some.
        curve: the name of the scaling curve it is a point of, and the size that varies.
    """

    name: str
    sizes: Mapping[str, Any]
    preset: str
    flops: float
    values: float
    dtypes: tuple[str, ...] = ("float32",)
    curve: tuple[str, str] | None = None


@dataclass(frozen=True)
class Family:
    """The cases of one op and its providers.

    Attributes:
        op: name of the op.
        cases: all presets together.
        arguments: (case, dtype, generator) -> arguments of the op; leaves that train require a gradient.
        providers: by name, (case, arguments) -> a call without arguments; raises `NotOffered`. "eager" comes first.
        ours: the op itself; under the reference backend it is the specification.
        backward_flops: operations of backward in units of forward.
    """

    op: str
    cases: tuple[Case, ...]
    arguments: Callable[[Case, torch.dtype, torch.Generator], Arguments]
    providers: Mapping[str, Callable[[Case, Arguments], Run]]
    ours: Callable[..., Any]
    backward_flops: float = 2.0


PRESETS = ("smoke", "quick", "full")


def in_preset(case: Case, preset: str) -> bool:
    """Whether `case` belongs to `preset`; "quick" holds no smoke cases, which are too small to mean anything."""
    if preset == "smoke" or case.preset == "smoke":
        return case.preset == preset
    return PRESETS.index(case.preset) <= PRESETS.index(preset)


def normal(
    generator: torch.Generator, dtype: torch.dtype, *shape: int, grad: bool = False, scale: float = 1.0
) -> Tensor:
    """A leaf of N(0, scale**2), drawn in float32 so that every dtype sees the same numbers, rounded."""
    return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_(grad)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile with its caches cleared, so that one case's shapes do not make the next one dynamic."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
