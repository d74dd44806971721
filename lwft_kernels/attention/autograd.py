"""Shapes and gradient of ``lwft::attention_forward``.

With R = scale * Q K^T, S the scores after softcap, bias and masks, P = softmax(S) = exp(S - lse), Z the
dropout multipliers and O = (P * Z) V (FlashAttention-2, Dao 2023, section 3.1 and algorithm 2; here with
dropout, and lse differentiable too):

    dV = (P * Z)^T dO,
    dS = P * (Z * (dO V^T) - rowsum(dO * O) + dlse),   dbias = dS summed to its shape,
    dR = dS * (1 - tanh(R / softcap)^2),   dQ = scale * dR K,   dK = scale * dR^T Q;

the prefix has dK and dV of its own. S and Z are computed again in tiles: nothing of size (S, L) is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwft_kernels.registration import gradients, register, run_backward, wanted

# positions of q, k, v, bias, prefix_k, prefix_v among the inputs
_DIFFERENTIABLE = (0, 1, 2, 3, 5, 6)
_INPUTS = 14


def empty_by_token(like: Tensor) -> Tensor:
    """An empty (B, H, S, D) whose memory is (B, S, H, D), so that the heads are merged without a copy."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_by_token(q), q.new_empty(q.shape[:3], dtype=statistics)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def by_token(bit: int, like: Tensor) -> Tensor:
        return empty_by_token(like) if needs >> bit & 1 else like.new_empty((0,))

    def contiguous(bit: int, like: Tensor | None) -> Tensor:
        return q.new_empty((0,)) if like is None or not needs >> bit & 1 else like.new_empty(like.shape)

    return (
        by_token(0, q),
        by_token(1, k),
        by_token(2, v),
        contiguous(3, bias),
        contiguous(4, prefix_k),
        contiguous(5, prefix_v),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, seed, scale, causal, window, softcap, dropout_p = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.rule = (scale, causal, window, softcap, dropout_p)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * _INPUTS
    saved = ctx.saved_tensors
    if grad_out is None:  # a loss of lse alone
        grad_out = torch.zeros_like(saved[8])
    needs = wanted(ctx.needs_input_grad, _DIFFERENTIABLE)
    results = run_backward("attention", grad_out, grad_lse, *saved, *ctx.rule, needs)
    dq, dk, dv, dbias, dprefix_k, dprefix_v = gradients(results, needs)
    return dq, dk, dv, dbias, None, dprefix_k, dprefix_v, *(None,) * (_INPUTS - 7)


attention, try_attention = register(
    "attention",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="lwft_kernels.attention.triton_op",
    differentiable_outputs=2,
)
