"""Checks a provider before it is timed: its outputs and gradients against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lwft_kernels

from .case import Arguments, Family, Run

RATIO, FLOOR = 2.0, 1e-6  # ours: err <= 2 err(eager) + 1e-6, the rule of the test suite
PEER_LIMIT = (
    0.05  # a peer that is further off computes something else, which would be this benchmark's mistake
)


def leaves(arguments: Arguments) -> list[Tensor]:
    """The tensors that want a gradient, each once (an adapter's residual is its x)."""
    found = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    return list({id(value): value for value in found}.values())


def _in_float64(arguments: Arguments) -> Arguments:
    widened: dict[int, Tensor] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            if id(value) not in widened:
                widened[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
            return widened[id(value)]
        return value

    return {name: widen(value) for name, value in arguments.items()}


def _outputs(run: Callable[[], Any], arguments: Arguments, backward: bool) -> list[Tensor]:
    torch.manual_seed(0)
    out = run()
    if not backward:
        return [out.detach()]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(arguments), direction)]


def _error(values: list[Tensor], oracle: list[Tensor]) -> float:
    """The largest relative error in the Euclidean norm."""
    worst = 0.0
    for value, exact in zip(values, oracle, strict=True):
        distance, size = (value.double() - exact).norm().item(), exact.norm().item()
        worst = max(worst, distance / size if size > 0 else distance)
        if math.isnan(distance):
            return math.inf
    return worst


class Checker:
    """Holds the providers of one case, dtype and mode against the oracle."""

    def __init__(self, family: Family, arguments: Arguments, backward: bool) -> None:
        self.arguments, self.backward = arguments, backward
        self.random = bool(arguments.get("dropout_p"))
        exact = _in_float64(arguments)
        with lwft_kernels.use_backend("reference"):
            self.oracle = _outputs(lambda: family.ours(**exact), exact, backward)
            in_dtype = _outputs(lambda: family.ours(**arguments), arguments, backward)
        rounded = [exact_value.to(in_dtype[0].dtype) for exact_value in self.oracle]
        self.eager_error = max(_error(in_dtype, self.oracle), _error(rounded, self.oracle))

    def complaint(self, run: Run, *, ours: bool) -> str | None:
        """Why the provider is wrong, or None. A peer's dropout draws other numbers, so it is only required to run."""
        values = _outputs(run, self.arguments, self.backward)
        if self.random and not ours:
            return None
        error = _error(values, self.oracle)
        limit = RATIO * self.eager_error + FLOOR if ours else PEER_LIMIT
        return None if error <= limit else f"error {error:.1e}, allowed {limit:.1e}"
