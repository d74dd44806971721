"""Checks a provider before it is timed: its output and gradients against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lwft_kernels

from .case import Arguments, Case, Family, Run, leaves, normal

# Ours, for the output and every gradient: err <= 2 err(plain PyTorch in the same dtype) + 1e-6, the rule of the tests.
RATIO, FLOOR = 2.0, 1e-6

# Peers answer for their own accuracy. One that is further off computes something else, and comparing with it would be
# this benchmark's mistake. (PyTorch's own LayerNorm is 5% off in the bfloat16 gradient of its weight.)
PEER_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}

Values = dict[str, Tensor]  # "out", and a gradient by the name of its argument


@dataclass(frozen=True)
class Verdict:
    """The largest error of output and gradients beside its own limit; None where it is no number.

    `complaint` is None when all are within their limits.
    """

    error: float | None
    allowed: float | None
    complaint: str | None


def _in_float64(arguments: Arguments) -> Arguments:
    widened: dict[int, Tensor] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            if id(value) not in widened:
                widened[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
            return widened[id(value)]
        return value

    return {name: widen(value) for name, value in arguments.items()}


def evaluate(run: Callable[[], Tensor], arguments: Arguments, backward: bool, dtype: torch.dtype) -> Values:
    """Output and gradients along one random direction, which is rounded to `dtype` so that all take the same."""
    torch.manual_seed(0)
    if not backward:
        with torch.no_grad():
            return {"out": run()}
    out = run()
    direction = normal(torch.Generator(out.device).manual_seed(1), dtype, *out.shape).to(out.dtype)
    wanted = leaves(arguments)
    gradients = torch.autograd.grad(out, list(wanted.values()), direction)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in the Euclidean norm; infinite where value is not finite or of another shape."""
    if value.shape != exact.shape:
        return math.inf
    distance, size = float((value.double() - exact).norm()), float(exact.norm())
    if not math.isfinite(distance):
        return math.inf
    return distance / size if size > 0 else distance


class _Exact:
    """The reference on one set of arguments, in float64 and in their own dtype."""

    def __init__(self, family: Family, arguments: Arguments, backward: bool, dtype: torch.dtype) -> None:
        widened = _in_float64(arguments)
        with lwft_kernels.use_backend("reference"):
            self.values = evaluate(lambda: family.ours(**widened), widened, backward, dtype)
            plain = evaluate(lambda: family.ours(**arguments), arguments, backward, dtype)
        self.output = plain["out"]
        # on few elements PyTorch may be exact by luck, so its error counts as at least that of rounding the oracle
        self.allowed = {
            name: RATIO * max(relative_error(plain[name], exact), relative_error(exact.to(plain[name].dtype), exact))
            + FLOOR
            for name, exact in self.values.items()
        }


class Checker:
    """Holds the providers of one case in one dtype against the oracle, which is computed once for all of them."""

    def __init__(self, family: Family, case: Case, arguments: Arguments, dtype: torch.dtype, backward: bool) -> None:
        self._family, self._case, self._arguments, self._dtype = family, case, arguments, dtype
        self._random = bool(arguments.get("dropout_p"))
        self._exact = _Exact(family, arguments, backward, dtype)
        # Peers draw other masks than ours: their arithmetic is checked without dropout.
        self._without_dropout = {name: value for name, value in arguments.items() if name != "dropout_p"}
        self._exact_without_dropout = (
            _Exact(family, self._without_dropout, backward, dtype) if self._random else self._exact
        )

    @property
    def output(self) -> Tensor:
        """What a call of the op returns in the dtype of the arguments, by the reference."""
        return self._exact.output

    def ours(self, run: Run, backward: bool) -> Verdict:
        """The same seed gives the same dropout mask as the reference, so the result is compared with dropout on."""
        values = evaluate(run, self._arguments, backward, self._dtype)
        return _judge(values, self._exact.values, self._exact.allowed)

    def peer(self, name: str, run: Run, backward: bool) -> Verdict:
        """A peer: that it drops where it should, and its arithmetic."""
        if self._random:
            with torch.no_grad():
                first, second = run(), run()
            if torch.equal(first, second):
                return Verdict(None, None, "two calls drop the same elements, or none")
            run = self._family.providers[name](self._case, self._without_dropout)
        values = evaluate(run, self._without_dropout, backward, self._dtype)
        limit = PEER_LIMIT[self._dtype]
        return _judge(values, self._exact_without_dropout.values, dict.fromkeys(values, limit))


def _judge(values: Values, exact: Values, allowed: Mapping[str, float]) -> Verdict:
    errors = {name: relative_error(value, exact[name]) for name, value in values.items()}
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    what = "out" if worst == "out" else f"gradient of {worst}"
    complaint = f"{what}: error {errors[worst]:.1e}, allowed {allowed[worst]:.1e}"
    within = errors[worst] <= allowed[worst]
    error = errors[worst] if math.isfinite(errors[worst]) else None  # JSON has no infinity
    return Verdict(error, allowed[worst], None if within else complaint)
