"""Shapes and gradients of ``lwft::low_rank_linear_forward``, ``lora_linear_forward``, ``lora_delta_forward`` and
``frozen_linear_forward``.

With xd = dropout(x), h = xd A^T (the `hidden` kept from forward) and dh = scale * dy B (Hu et al. 2021, eq.
3, differentiated):

    dA = dh^T xd,  dB = scale * dy^T h,  dx = dropout mask * (dh A) + dy W,  dW = dy^T x,  dbias = sum of dy.

xd and dh are computed again from x and dy: beside the inputs, only h, of size (..., r), is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwft_kernels import backend
from lwft_kernels.registration import define, gradients, register, register_triton, run_backward, run_triton, wanted


def _results(needs: int, *likes: tuple[Tensor, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """What a backward op returns: (like, shape) per gradient, empty where it is not wanted."""
    return tuple(like.new_empty(shape if needs >> bit & 1 else (0,)) for bit, (like, shape) in enumerate(likes))


def _hidden(x: Tensor, down: Tensor) -> Tensor:
    """(..., r), not rounded to 16 bits."""
    return down.new_empty(*x.shape[:-1], down.shape[-2], dtype=torch.promote_types(down.dtype, torch.float32))


# ---- low_rank_linear(x, down_weight, up_weight, bias) ----


def _low_rank_forward_fake(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], up_weight.shape[0]), _hidden(x, down_weight)


def _low_rank_backward_fake(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, hidden: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(  # type: ignore[return-value]
        needs,
        (x, tuple(x.shape)),
        (down_weight, tuple(down_weight.shape)),
        (up_weight, tuple(up_weight.shape)),
        (up_weight, (up_weight.shape[0],)),
    )


def _low_rank_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, down_weight, up_weight, _ = inputs
    ctx.save_for_backward(x, down_weight, up_weight, output[1])


def _low_rank_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    x, down_weight, up_weight, hidden = ctx.saved_tensors
    needs = wanted(ctx.needs_input_grad, (0, 1, 2, 3))
    results = run_backward("low_rank_linear", grad_out, x, down_weight, up_weight, hidden, needs)
    return tuple(gradients(results, needs))


low_rank_linear, try_low_rank_linear = register(
    "low_rank_linear",
    forward_fake=_low_rank_forward_fake,
    backward_fake=_low_rank_backward_fake,
    setup_context=_low_rank_setup_context,
    backward=_low_rank_backward,
    triton="lwft_kernels.lowrank.triton_op",
)


# ---- lora_linear(x, weight, bias, lora_a, lora_b, adapter_index, seed, scale, dropout_p) ----


def _lora_linear_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], lora_b.shape[-2]), _hidden(x, lora_a)


def _lora_linear_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # not like `weight`, which may be bytes (a packed one has no gradient)
    d_out = lora_b.shape[-2]
    return _results(  # type: ignore[return-value]
        needs,
        (x, tuple(x.shape)),
        (x, (d_out, x.shape[-1])),
        (x, (d_out,)),
        (lora_a, tuple(lora_a.shape)),
        (lora_b, tuple(lora_b.shape)),
    )


def _lora_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, lora_a, lora_b, adapter_index, seed, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], adapter_index, seed)


def _lora_linear_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    # not `wanted` and `gradients`: this is called for every layer of every step, and small layers feel it
    for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad[:5]
    needs = for_x | for_weight << 1 | for_bias << 2 | for_a << 3 | for_b << 4
    dx, dweight, dbias, da, db = run_backward(
        "lora_linear", grad_out, *ctx.saved_tensors, ctx.scale, ctx.dropout_p, needs
    )
    return (
        dx if for_x else None,
        dweight if for_weight else None,
        dbias if for_bias else None,
        da if for_a else None,
        db if for_b else None,
        None,
        None,
        None,
        None,
    )


lora_linear, try_lora_linear = register(
    "lora_linear",
    forward_fake=_lora_linear_forward_fake,
    backward_fake=_lora_linear_backward_fake,
    setup_context=_lora_linear_setup_context,
    backward=_lora_linear_backward,
    triton="lwft_kernels.lowrank.triton_op",
)


# ---- lora_delta(base_out, x, lora_a, lora_b, adapter_index, seed, scale, dropout_p) ----


def _lora_delta_forward_fake(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return base_out.new_empty(tuple(base_out.shape)), _hidden(x, lora_a)


def _lora_delta_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(  # type: ignore[return-value]
        needs, (x, tuple(x.shape)), (lora_a, tuple(lora_a.shape)), (lora_b, tuple(lora_b.shape))
    )


def _lora_delta_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, lora_a, lora_b, adapter_index, seed, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(x, lora_a, lora_b, output[1], adapter_index, seed)


def _lora_delta_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    needs = wanted(ctx.needs_input_grad, (1, 2, 3))
    results = run_backward("lora_delta", grad_out, *ctx.saved_tensors, ctx.scale, ctx.dropout_p, needs)
    return (grad_out, *gradients(results, needs), None, None, None, None)


lora_delta, _ = register(
    "lora_delta",
    forward_fake=_lora_delta_forward_fake,
    backward_fake=_lora_delta_backward_fake,
    setup_context=_lora_delta_setup_context,
    backward=_lora_delta_backward,
    triton="lwft_kernels.lowrank.triton_op",
)


def _lora_delta_in_place_fake(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    return _hidden(x, lora_a)


define("lora_delta_forward_", _lora_delta_in_place_fake, mutates=("base_out",))
register_triton("lora_delta_forward_", "lwft_kernels.lowrank.triton_op")
torch.library.register_fake("lwft::lora_delta_forward_", _lora_delta_in_place_fake)
if backend.library_error is None:
    torch.library.register_fake("lwft::unpack_weight_", lambda weight, packed: None)


def _write_rows(base_out: Tensor, *rest: Any) -> Tensor:
    if backend.by_triton("lora_delta", base_out):
        by_triton: Tensor = run_triton("lora_delta_forward_", base_out, *rest)
        return by_triton
    with torch._C._AutoDispatchBelowAutograd():
        hidden: Tensor = torch.ops.lwft.lora_delta_forward_.default(base_out, *rest)
    return hidden


class _LoraDeltaInPlace(torch.autograd.Function):
    """`lora_delta` that writes into base_out, for eager: torch.compile takes the functional op and a copy."""

    @staticmethod
    def forward(ctx: Any, base_out: Tensor, *rest: Any) -> Tensor:
        hidden = _write_rows(base_out, *rest)
        ctx.mark_dirty(base_out)
        ctx.set_materialize_grads(False)
        _lora_delta_setup_context(ctx, (base_out, *rest), (base_out, hidden))
        return base_out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _lora_delta_backward(ctx, *grads)


def lora_delta_(base_out: Tensor, *rest: Any) -> Tensor:
    """As `lora_delta`, into base_out (..., d_out), whose leading dimensions collapse without a copy."""
    if not torch.is_grad_enabled():
        _write_rows(base_out, *rest)
        if not base_out.is_inference():
            torch.autograd.graph.increment_version(base_out)
        return base_out
    # the C function, as in registration.register: functorch's tensors do not come here
    out: Tensor = super(torch.autograd.Function, _LoraDeltaInPlace).apply(base_out, *rest)
    return out


# ---- frozen_linear(x, weight, bias) ----


def _frozen_forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _frozen_backward_fake(grad_out: Tensor, weight: Tensor) -> Tensor:
    return grad_out.new_empty(*grad_out.shape[:-1], weight.shape[1])


def _frozen_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError("lwft::frozen_linear_forward has no gradient for weight and bias: they must be frozen")
    ctx.save_for_backward(inputs[1])


def _frozen_backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad_out is None:
        return None, None, None
    (weight,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return grad_out @ weight, None, None
    return run_backward("frozen_linear", grad_out, weight), None, None


frozen_linear, try_frozen_linear = register(
    "frozen_linear",
    forward_fake=_frozen_forward_fake,
    backward_fake=_frozen_backward_fake,
    setup_context=_frozen_setup_context,
    backward=_frozen_backward,
    triton="lwft_kernels.lowrank.triton_op",
)
