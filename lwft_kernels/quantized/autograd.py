"""Shapes and gradient of ``lwft::quantized_linear_forward``: dx = dy W, dbias = sum of dy. W is frozen.

Nothing is kept for backward but the weight itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lwft_kernels.registration import register, run_backward

# positions of x and bias among the inputs
_X, _BIAS = 0, 9


def _forward_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_table: Tensor | None,
    absmax_offset: Tensor | None,
    blocksize: int,
    absmax_blocksize: int,
    bias: Tensor | None,
    d_out: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], d_out)


def _backward_fake(
    grad_out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_table: Tensor | None,
    absmax_offset: Tensor | None,
    blocksize: int,
    absmax_blocksize: int,
    d_in: int,
) -> Tensor:
    return grad_out.new_empty(*grad_out.shape[:-1], d_in)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs[:7]
    ctx.save_for_backward(*weight)
    ctx.blocksizes = inputs[7:9]
    ctx.d_in = x.shape[-1]


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if grad_out is not None and ctx.needs_input_grad[_X]:
        dx = run_backward("quantized_linear", grad_out, *ctx.saved_tensors, *ctx.blocksizes, ctx.d_in)
    if grad_out is not None and ctx.needs_input_grad[_BIAS]:
        dbias = grad_out.reshape(-1, grad_out.shape[-1]).sum(0)
    return (dx, *(None,) * (_BIAS - 1), dbias, None)


quantized_linear, _ = register(
    "quantized_linear",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="lwft_kernels.quantized.triton_op",
)
