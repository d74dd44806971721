"""Shapes and gradient of ``lwft::adapter_forward``.

With n = LayerNorm(x), z = n Wd^T + bd (kept as `hidden`), h = act(z) and out = residual + mask * scale *
(h Wu^T + bu), where the mask is the dropout's (Houlsby et al. 2019, figure 2):

    g  = mask * scale * grad_out,   dWu = g^T h,    dbu = sum over tokens of g,
    dz = (g Wu) * act'(z),          dWd = dz^T n,   dbd = sum over tokens of dz,
    dn = dz Wd,                     dx  = LayerNorm's gradient of dn, plus grad_out where the residual is x.

h, n and the mask are computed again: nothing of size (T, d) is kept beside the inputs. With w the LayerNorm's weight,
its gradient takes the mean over d of dn w n from z - bd, whose part without the LayerNorm's bias is n w Wd^T; hence bd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwft_kernels.registration import gradients, register, run_backward, wanted

# positions of x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias among the inputs
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 6)
_RESIDUAL, _INPUTS = 7, 14


def _forward_fake(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    eps: float,
    scale: float,
    dropout_p: float,
    residual_is_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    leading = x.shape[:-1]
    normed = (0,) if norm_weight is None else leading
    return (
        x.new_empty(x.shape),
        down_weight.new_empty((*leading, down_weight.shape[0])),
        x.new_empty(normed, dtype=statistics),
        x.new_empty(normed, dtype=statistics),
    )


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    activation: int,
    scale: float,
    dropout_p: float,
    residual_is_x: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, d = down_weight.shape
    shapes = (x.shape, (m, d), (m,), (d, m), (d,), (d,), (d,))
    return tuple(  # type: ignore[return-value]
        (x if bit == 0 else down_weight).new_empty(shape if needs >> bit & 1 else (0,))
        for bit, shape in enumerate(shapes)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, down_weight, down_bias, up_weight, _, norm_weight, norm_bias, _, seed, activation, _, scale, p, is_x = inputs
    _, hidden, mean, rstd = output
    ctx.save_for_backward(x, down_weight, down_bias, up_weight, norm_weight, norm_bias, hidden, mean, rstd, seed)
    ctx.constants = activation, scale, p, is_x


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * _INPUTS
    if grad_out is None:
        return tuple(result)
    needs = wanted(ctx.needs_input_grad, _DIFFERENTIABLE)
    if needs:
        results = run_backward("adapter", grad_out, *ctx.saved_tensors, *ctx.constants, needs)
        result[: len(_DIFFERENTIABLE)] = gradients(results, needs)
    if ctx.needs_input_grad[_RESIDUAL]:
        result[_RESIDUAL] = grad_out
    return tuple(result)


adapter, try_adapter = register(
    "adapter",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="lwft_kernels.adapter.triton_op",
)
