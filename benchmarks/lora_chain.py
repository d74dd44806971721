"""The strongest LoRA layer that can be written without a kernel of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AddmmChain(torch.autograd.Function):
    """x W^T + bias + scale * dropout(x) A^T B^T, every sum inside a product of cuBLAS (beta = 1), backward by hand.

    As Unsloth, Axolotl and TransformerEngine's fused op do it; with dropout, which only Axolotl has, torch's own with
    the mask it stores. An adapter in float32 is cast to the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, d_in)
        weight: Tensor,  # (d_out, d_in)
        bias: Tensor,  # (d_out,)
        lora_a: Tensor,  # (r, d_in)
        lora_b: Tensor,  # (d_out, r)
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        middle = dropped @ a.T
        ctx.save_for_backward(dropped, weight, a, b, middle, mask)
        ctx.scale, ctx.dropout_p, ctx.dtypes = scale, dropout_p, (lora_a.dtype, lora_b.dtype)
        return torch.addmm(bias, x, weight.T).addmm_(middle, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """dB = s dy^T m, dm = s dy B, dA = dm^T x', dx = dy W + dm A, where dropout let it through."""
        dropped, weight, a, b, middle, mask = ctx.saved_tensors
        grad_middle = (grad_out @ b).mul_(ctx.scale)
        grad_b = (grad_out.T @ middle).mul_(ctx.scale)
        grad_a = grad_middle.T @ dropped
        grad_x = grad_out @ weight
        if mask is None:
            grad_x.addmm_(grad_middle, a)
        else:
            grad_x += torch.ops.aten.native_dropout_backward(grad_middle @ a, mask, 1 / (1 - ctx.dropout_p))
        return grad_x, None, None, grad_a.to(ctx.dtypes[0]), grad_b.to(ctx.dtypes[1]), None, None
