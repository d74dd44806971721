"""Shapes and gradient of ``lwft::add_layer_norm_forward``.

With s = x + dropout(u), n = (s - mean) * rstd and g = grad_out * weight (Ba et al. 2016, differentiated):

    ds = rstd * (g - mean(g) - n * mean(g * n)),   dx = ds,   du = dropout mask * ds,
    dweight = sum over tokens of grad_out * n,     dbias = sum over tokens of grad_out.

n is computed again from x and u: nothing of the size of x is kept beside the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwft_kernels.registration import gradients, register, run_backward, wanted

# positions of x, sublayer_out, weight, bias among the inputs
_DIFFERENTIABLE = (0, 1, 2, 3)


def _forward_fake(
    x: Tensor,
    sublayer_out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, sublayer_out.dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    out = x.new_empty(x.shape, dtype=dtype)
    return out, x.new_empty(x.shape[:-1], dtype=statistics), x.new_empty(x.shape[:-1], dtype=statistics)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    sublayer_out: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameter = x if weight is None else weight

    def result(bit: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape if needs >> bit & 1 else (0,))

    d = x.shape[-1]
    return (
        result(0, tuple(x.shape), x),
        result(1, tuple(x.shape), sublayer_out),
        result(2, (d,), parameter),
        result(3, (d,), parameter),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, sublayer_out, weight, _, seed, _, dropout_p = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, sublayer_out, weight, mean, rstd, seed)
    ctx.dropout_p = dropout_p


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    x, sublayer_out, weight, mean, rstd, seed = ctx.saved_tensors
    needs = wanted(ctx.needs_input_grad, _DIFFERENTIABLE)
    # without dropout du is dx: written once and returned twice, as the gradient of a plain sum is
    share = needs & 0b11 == 0b11 and ctx.dropout_p == 0.0 and x.dtype == sublayer_out.dtype
    asked = needs & ~0b10 if share else needs
    results = run_backward("add_layer_norm", grad_out, x, sublayer_out, weight, mean, rstd, seed, ctx.dropout_p, asked)
    found = gradients(results, asked)
    if share:
        found[1] = found[0]
    return (*found, None, None, None)


add_layer_norm, try_add_layer_norm = register(
    "add_layer_norm",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="lwft_kernels.norm.triton_op",
)
