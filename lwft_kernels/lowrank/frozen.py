"""``frozen_linear``: `torch.nn.functional.linear` with a weight that is not trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lwft_kernels import backend, checks
from lwft_kernels.lowrank import autograd

_OP = "frozen_linear"
_PLAIN = (Tensor, torch.nn.Parameter)
_LEAST_WORK = 1 << 22  # multiplications of a call that is worth a Function of Python's, where torch's autograd is C++
_MOST_KINDS = 1 << 14  # of calls, so that sequences of every length do not fill the memory
# By dtype of x, rows, d_in and d_out: whether a product of ours is faster; None where none is at any size.
_is_own: dict[tuple[torch.dtype, int, int, int], bool | None] = {}


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, of a frozen layer: `torch.nn.functional.linear`, which computes whatever cannot be faster.

    The kernel is for processors with matrix registers for bfloat16 (Intel AMX): there a product of float32 numbers,
    each in three bfloat16 parts, is faster than the vendor's and as accurate; and for 16 bits where the vendor's
    product is a plain loop. Backward computes the gradient of `x` alone, and keeps nothing but `weight` for it. Small
    calls, other devices, autocast, and a `weight` or `bias` that wants a gradient go to torch's own function.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), in the dtype of `x`.
        bias: (d_out,), in the dtype of `x`, or None.

    Returns:
        (..., d_out) in the dtype of `x`, or of autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it. What torch alone
            refuses (a subclass of Tensor, say), it refuses in its own words.
    """
    if torch.compiler.is_compiling():
        if _traced_is_own(x, weight, bias):
            traced: Tensor = autograd.frozen_linear(x, weight, bias)
            return traced
        return linear(x, weight, bias)
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace, for which sizes are tensors
        return linear(x, weight, bias)
    try:
        d_out, d_in = weight.shape
        own = is_own(x.dtype, x.numel() // d_in, d_in, d_out)
    except (AttributeError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
        return _by_torch(x, weight, bias)
    if own or backend.current_backend() == "native" or (own is False and not backend.leave_small_calls):
        if backend.attempts(x):
            declined = _why_not(x, weight, bias)
            if declined is None:
                found: Tensor | None = autograd.try_frozen_linear(x, weight, bias)
                if found is not None:
                    return found
            else:
                backend.use_kernels(_OP, x, declined)
        elif own and x.is_cpu and torch._C._is_any_autocast_enabled():
            backend.record_decline(_OP, "autocast, whose products are torch's")
    elif own is False and x.is_cpu:
        backend.small_calls[_OP] += 1
    return _by_torch(x, weight, bias)


def is_own(dtype: torch.dtype, rows: int, d_in: int, d_out: int) -> bool | None:
    """Whether a call of that size on the CPU is computed by a product of ours, as the larger ones are; None where this
    processor has none in `dtype` that is faster than the vendor's, at any size."""
    kind = (dtype, rows, d_in, d_out)
    try:
        return _is_own[kind]
    except KeyError:
        return _ask(kind)


def _ask(kind: tuple[torch.dtype, int, int, int]) -> bool | None:
    own: bool | None = None
    if kind[0] in checks.FLOATING and backend.library_error is None:
        own = _library_says(*kind) or (False if _library_says(kind[0], 1024, 1024, 1024) else None)
    if len(_is_own) >= _MOST_KINDS:
        _is_own.clear()
    _is_own[kind] = own
    return own


def _library_says(dtype: torch.dtype, rows: int, d_in: int, d_out: int) -> bool:
    if rows * d_in * d_out < _LEAST_WORK:
        return False
    x, weight = torch.empty((rows, d_in), dtype=dtype), torch.empty((d_out, d_in), dtype=dtype)
    return bool(torch.ops.lwft.frozen_linear_is_own(x, weight))


def _traced_is_own(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """As for an eager call. Which product a size takes, the op decides when it runs: sizes may be symbolic here."""
    return (
        _backend_allows()
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.device.type == "cpu"
        and weight.dim() == 2
        and x.dim() >= 1
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and _frozen(weight, bias)
        and (
            backend.current_backend() == "native"
            or (x.numel() * weight.shape[0] >= _LEAST_WORK and _has_own_product(x.dtype))
        )
    )


def _backend_allows() -> bool:
    return backend.current_backend() in ("auto", "native") and backend.library_error is None


def _has_own_product(dtype: torch.dtype) -> bool:
    return is_own(dtype, 1024, 1024, 1024) is True


# torch.compile calls it while it traces, and takes the answer for a constant (as in integrations.reached)
_has_own_product._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _frozen(weight: Tensor, bias: Tensor | None) -> bool:
    return not torch.is_grad_enabled() or not (weight.requires_grad or (bias is not None and bias.requires_grad))


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel does not compute this call, whose size is right, or None."""
    if not _frozen(weight, bias):
        return "the weight or the bias wants a gradient"
    if type(weight) not in _PLAIN or type(x) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return "an argument is of a subclass of Tensor"
    return None


def _by_torch(x: Any, weight: Any, bias: Any) -> Tensor:
    try:
        return linear(x, weight, bias)
    except (TypeError, RuntimeError):
        _check(x, weight, bias)
        raise


def _check(x: Any, weight: Any, bias: Any) -> None:
    """Raise for what is wrong with the arguments, if it is known here."""
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not (name == "bias" and value is None):
            checks.tensor(_OP, name, value)
            if type(value) not in _PLAIN or value.layout != torch.strided or value.is_nested:
                return
    checks.at_least_dims(_OP, "x", x, 1, "(..., d_in)")
    checks.at_least_dims(_OP, "weight", weight, 2, "(d_out, d_in)")
    checks.shape(_OP, "weight", weight, (None, x.shape[-1]), "(d_out, d_in)")
    checks.same_device(_OP, "weight", weight, "x", x)
    checks.same_dtype(_OP, "weight", weight, "x", x)
    if bias is not None:
        checks.shape(_OP, "bias", bias, (weight.shape[0],), "(d_out,)")
        checks.same_device(_OP, "bias", bias, "x", x)
        checks.same_dtype(_OP, "bias", bias, "x", x)
