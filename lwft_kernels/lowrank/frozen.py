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
# Where a product of our own begins to win over the vendor's, whose autograd is C++: multiplications of a call.
LEAST_WORK = 1 << 22
_MOST_KINDS = 1 << 14  # of calls, so that sequences of every length do not fill the memory
# By dtype of x, rows, d_in and d_out.
_is_own: dict[tuple[torch.dtype, int, int, int], bool] = {}


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
    declined: str | None = None
    if backend.attempts(x):
        try:
            d_out, d_in = weight.shape
            kind = (x.dtype, x.numel() // d_in, d_in, d_out)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError):
            return _by_torch(x, weight, bias)
        own = _is_own.get(kind)
        if own is None:
            own = _ask(kind)
        if own or backend.current_backend() == "native":
            declined = _why_not(x, weight, bias)
            if declined is None:
                found: Tensor | None = autograd.try_frozen_linear(x, weight, bias)
                if found is not None:
                    return found
            else:
                backend.use_kernels(_OP, x, declined)
        elif has_own_product(x.dtype):
            backend.small_calls[_OP] += 1
    elif torch._C._is_any_autocast_enabled() and type(x) is Tensor and x.is_cpu and has_own_product(x.dtype):
        backend.record_decline(_OP, "autocast, whose products are torch's")
    return _by_torch(x, weight, bias)


def has_own_product(dtype: torch.dtype) -> bool:
    """Whether this processor has a product of ours at all that is faster than the vendor's in `dtype`."""
    return is_own(dtype, 1024, 1024, 1024)


def is_own(dtype: torch.dtype, rows: int, d_in: int, d_out: int) -> bool:
    """Whether a call of that size is computed by a product of ours: the larger and faster ones are."""
    kind = (dtype, rows, d_in, d_out)
    own = _is_own.get(kind)
    return _ask(kind) if own is None else own


def _ask(kind: tuple[torch.dtype, int, int, int]) -> bool:
    dtype, rows, d_in, d_out = kind
    own = False
    if rows * d_in * d_out >= LEAST_WORK and dtype in checks.FLOATING and backend.library_error is None:
        x, weight = torch.empty((rows, d_in), dtype=dtype), torch.empty((d_out, d_in), dtype=dtype)
        own = bool(torch.ops.lwft.frozen_linear_is_own(x, weight))
    if len(_is_own) >= _MOST_KINDS:
        _is_own.clear()
    _is_own[kind] = own
    return own


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
        and (backend.current_backend() == "native" or x.numel() * weight.shape[0] >= LEAST_WORK)
        and _constant_has_own_product(x.dtype)
    )


def _backend_allows() -> bool:
    return backend.current_backend() in ("auto", "native") and backend.library_error is None


def _constant_has_own_product(dtype: torch.dtype) -> bool:
    return backend.current_backend() == "native" or has_own_product(dtype)


# torch.compile calls it while it traces, and takes the answer for a constant (as in integrations.reached)
_constant_has_own_product._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _frozen(weight: Tensor, bias: Tensor | None) -> bool:
    return not torch.is_grad_enabled() or not (weight.requires_grad or (bias is not None and bias.requires_grad))


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel does not compute this call, whose size is right, or None."""
    if not _frozen(weight, bias):
        return "the weight or the bias wants a gradient"
    if type(weight) not in _PLAIN or type(x) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return "an argument is of a subclass of Tensor"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
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
