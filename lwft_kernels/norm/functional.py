"""``add_layer_norm``: the residual sum and LayerNorm that end every BERT-style block, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lwft_kernels import backend, checks, dropout
from lwft_kernels.norm import autograd, reference

_OP = "add_layer_norm"
_LARGEST_TRITON_ROW = 8192  # a row lies in the registers of one program
_SMALL = backend.Small(forward=16 << 10, backward=96 << 10)  # elements of x


def add_layer_norm(
    x: Tensor,
    sublayer_out: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm(x + dropout(sublayer_out)) over the last dimension.

    "Add & Norm" of Vaswani et al. 2017 (section 3.1) with the dropout of its section 5.4; LayerNorm of Ba et al. 2016.

    Args:
        x: the residual stream, (..., d), float64, float32, bfloat16 or float16.
        sublayer_out: what the sublayer adds, the same shape; its dtype may differ (the sum is promoted).
        weight, bias: (d,), in the dtype of the sum or float32 beside 16-bit activations; None for 1 and 0.
        eps: added to the variance.
        dropout_p: probability of an element of `sublayer_out` to be zeroed. It is applied whenever it is above 0 (as in
            `scaled_dot_product_attention`): pass 0.0 in evaluation.

    Returns:
        (..., d) in the promoted dtype of `x` and `sublayer_out`; float32 under autocast on CUDA, as `layer_norm` gives.
        On the CPU a small call without dropout is left to `layer_norm`, which takes less time; `stats()` counts it.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; the message names it.
    """
    small = _by_torch(x, sublayer_out, weight, bias, eps, dropout_p)
    if small is not None:
        return small
    if backend.attempts(x) and dropout.is_probability(dropout_p) and type(eps) is float:
        seed = dropout.draw_seed(x.device) if dropout_p else None
        found: Tensor | None = autograd.try_add_layer_norm(x, sublayer_out, weight, bias, seed, eps, dropout_p)
        if found is not None:
            return found

    checks.floating(_OP, "x", x)
    checks.floating(_OP, "sublayer_out", sublayer_out)
    checks.at_least_dims(_OP, "x", x, 1, "(..., d)")
    checks.shape(_OP, "sublayer_out", sublayer_out, x.shape, "that of x")
    checks.same_device(_OP, "sublayer_out", sublayer_out, "x", x)
    eps = checks.positive(_OP, "eps", eps)
    dropout_p = checks.probability(_OP, "dropout_p", dropout_p)
    d = x.shape[-1]
    if d == 0:
        raise ValueError(f"{_OP}: the last dimension of x is empty; there is nothing to normalise over")
    if x.device.type == "cuda" and checks.autocast_dtype(x.device) is not None and x.dtype != torch.float64:
        x = x.float()
    total_dtype = torch.promote_types(x.dtype, sublayer_out.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        checks.floating(_OP, name, parameter)
        checks.shape(_OP, name, parameter, (d,), "(d,)")
        checks.same_device(_OP, name, parameter, "x", x)
        if parameter.dtype not in (total_dtype, torch.float32):
            raise TypeError(
                f"{_OP}: {name} is {parameter.dtype}, which does not go with a sum of {total_dtype}; use that dtype or "
                "float32"
            )
    if weight is not None and bias is not None:
        checks.same_dtype(_OP, "bias", bias, "weight", weight)

    seed = dropout.draw_seed(x.device) if dropout_p > 0.0 else None
    if not backend.use_kernels(_OP, x, triton_limit=lambda: _triton_limit(d)):
        return reference.add_layer_norm(x, sublayer_out, weight, bias, eps, dropout_p=dropout_p, seed=seed)
    out: Tensor = autograd.add_layer_norm(x, sublayer_out, weight, bias, seed, eps, dropout_p)
    return out


def _by_torch(
    x: Tensor, sublayer_out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> Tensor | None:
    """A small call by PyTorch's own operations; else None. Whether the parameters fit they see themselves."""
    try:
        if (
            type(dropout_p) is float
            and dropout_p == 0.0
            and backend.may_be_small()
            and 0 < (work := x.numel()) <= _SMALL.backward
            and x.is_cpu
            and x.dtype is sublayer_out.dtype
            and (shape := x.shape) == sublayer_out.shape
            and type(eps) is float
            and 0.0 < eps < math.inf
            and (work <= _SMALL.forward or backend.wants_gradient(x, sublayer_out, weight, bias))
        ):
            out = torch.layer_norm(x + sublayer_out, shape[-1:], weight, bias, eps)
            backend.small_calls[_OP] += 1
            return out
    except (RuntimeError, TypeError, AttributeError):
        pass  # the checks that follow say which argument it was
    return None


def _triton_limit(d: int) -> str | None:
    if d <= _LARGEST_TRITON_ROW:
        return None
    return f"Triton's kernel takes rows of at most {_LARGEST_TRITON_ROW} elements, not {d}"
