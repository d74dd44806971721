"""One oracle and one error measure for the whole suite: DESIGN, section 4, "Numbers".

The oracle is the plain PyTorch reference in float64. A result is good when it is at most twice as far from the oracle
as plain PyTorch in the tested dtype is; nobody picks a tolerance. On a handful of elements PyTorch may be exact by
luck, so its error counts as at least that of the oracle itself rounded to the dtype, which nobody can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# err(ours) <= RATIO * err(eager) + FLOOR
RATIO, FLOOR = 2.0, 1e-6

Arguments = Mapping[str, Any]
Op = Callable[..., Any]


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """|value - oracle| / |oracle| in the Euclidean norm; the plain norm of value where the oracle is zero."""
    if value.numel() == 0 and oracle.numel() == 0:
        return 0.0
    value, oracle = value.detach().double(), oracle.detach().double()
    if not torch.isfinite(value).all():
        # infinities that belong there (the lse of an empty row) must stand in the same places
        same = torch.equal(torch.isfinite(value), torch.isfinite(oracle)) and torch.equal(
            value[~torch.isfinite(value)], oracle[~torch.isfinite(oracle)]
        )
        if not same:
            return float("inf")
        finite = torch.isfinite(oracle)
        value, oracle = value[finite], oracle[finite]
    scale = oracle.norm().item()
    distance = (value - oracle).norm().item()
    return distance / scale if scale > 0 else distance


def prepared(arguments: Arguments, dtype: torch.dtype, keep: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A copy of the arguments with floating tensors in `dtype` (but those named in `keep`), gradients wanted as there.

    Strides are kept: a transposed view stays a transposed view.
    """
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            target = value.dtype if name in keep else dtype
            copy = value.detach().to(target)
            copy = copy.clone() if copy.data_ptr() == value.data_ptr() else copy
            result[name] = copy.requires_grad_(value.requires_grad)
        else:
            result[name] = value
    return result


def outputs_and_gradients(
    op: Op,
    arguments: Arguments,
    grad_seed: int = 0,
    backward: bool = True,
    direction_dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """All outputs of op(**arguments) and, for one random direction, the gradients of the arguments that want one.

    The direction is rounded to `direction_dtype`, so that runs in different dtypes differentiate along the same one.
    """
    out = op(**arguments)
    outs = list(out) if isinstance(out, tuple) else [out]
    result = {f"out{i}": value for i, value in enumerate(outs)}
    leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    if backward and leaves:
        generator = torch.Generator().manual_seed(grad_seed)
        scalar = torch.zeros((), dtype=torch.float64, device=outs[0].device)
        for value in outs:
            if value.requires_grad:
                direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                direction = direction.to(direction_dtype).to(value)
                scalar = scalar + torch.where(torch.isfinite(value), value, 0).mul(direction).sum().double()
        grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            result[f"d{name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return result


def assert_accurate(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], oracle: Mapping[str, Tensor], note: str = ""
) -> None:
    """err(ours) <= 2 err(eager) + 1e-6 for every output and gradient."""
    assert ours.keys() == oracle.keys() == eager.keys(), (ours.keys(), oracle.keys())
    failures = []
    for name in oracle:
        assert ours[name].shape == oracle[name].shape, f"{name}: {ours[name].shape} is not {oracle[name].shape}"
        mine = relative_error(ours[name], oracle[name])
        rounding = relative_error(oracle[name].to(ours[name].dtype), oracle[name])
        theirs = max(relative_error(eager[name], oracle[name]), rounding)
        if not mine <= RATIO * theirs + FLOOR:
            failures.append(f"{name}: error {mine:.3g}, PyTorch eager {theirs:.3g}")
    assert not failures, f"{note} less accurate than allowed: " + "; ".join(failures)


def check_op(
    ours: Op,
    reference: Op,
    arguments: Arguments,
    dtype: torch.dtype,
    *,
    keep: frozenset[str] = frozenset(),
    backward: bool = True,
    note: str = "",
) -> None:
    """Hold `ours` and the reference in `dtype` against the reference in float64, forward and backward.

    The inputs are rounded to `dtype` first, so that all three see the same numbers.
    """
    rounded = prepared(arguments, dtype, keep)
    options: dict[str, Any] = {"backward": backward, "direction_dtype": dtype}
    oracle = outputs_and_gradients(reference, prepared(rounded, torch.float64), **options)
    eager = outputs_and_gradients(reference, prepared(rounded, dtype, keep), **options)
    mine = outputs_and_gradients(ours, prepared(rounded, dtype, keep), **options)
    assert_accurate(mine, eager, oracle, note)
