"""DoRA (Liu et al. 2024, eq. 5): a LoRA layer whose rows are scaled to learned magnitudes.

With W' = W + s B A and m = magnitude / |W'|, by rows: base bias + m * (x W'^T). As PEFT does it, the norm is held
constant in backward (section 4.3), and the adapter's dropout falls on the x of base + (m - 1) x W^T + m s x A^T B^T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lwft_kernels import functional as LF
from lwft_kernels.integrations.class_swap import has_hooks, is_plain
from lwft_kernels.integrations.frozen_linear import LINEAR

refused: str | None = None  # why PEFT's DoRA is not the one known here: set by `lora.plan`
_TILE = 65536  # elements of W' that exist at a time: small enough for any second-level cache


def why_not(module: Any, name: str) -> str | None:
    """Why the variant of adapter `name` cannot be served, or None."""
    variant = type(module.lora_variant[name])
    if variant is not DoraLinearVariant:
        return f"the LoRA variant {variant.__name__}"
    if refused is not None:
        return refused
    magnitude = module.lora_magnitude_vector[name]
    if type(magnitude) is not peft_dora.DoraLinearLayer or not is_plain(magnitude.weight) or has_hooks(magnitude):
        return "the DoRA layer is hooked, sharded or of another class"
    base = module.base_layer
    if type(base) not in (*LINEAR, Conv1D) or not is_plain(base.weight):
        return f"DoRA on a {type(base).__name__} with weights that are not a plain matrix"
    if module.lora_B[name].bias is not None:
        return "DoRA with lora_bias"
    if magnitude.weight.device != base.weight.device:
        return "magnitude and base are on different devices"
    if peft_dora.ENABLE_DORA_CACHING and not module.training:
        return "DoRA caching is on"  # PEFT then has nothing left to compute that could be saved
    return None


def forward(module: Any, name: str, x: Tensor, result: Tensor) -> Tensor:
    """`result` with the DoRA adapter `name` applied.

    Args:
        x: (..., d_in).
        result: (..., d_out), what the base and earlier adapters gave.
    """
    base, drop, scale = module.base_layer, module.lora_dropout[name], module.scaling[name]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    magnitude = module.lora_magnitude_vector[name].weight
    norm = weight_norm(weight.detach(), a.detach(), b.detach(), scale)
    m = (magnitude / norm).to(magnitude.dtype)
    # The branch is multiplied by m through its B, so that its gradient is not rounded to the dtype of the result.
    if module.training and isinstance(drop, nn.Dropout) and drop.training and drop.p:
        # not x / (1 - p), which 16 bits would round
        x = x * torch.empty_like(x).bernoulli_(1 - drop.p)
        gain = 1 / (1 - drop.p) if drop.p < 1 else 0.0
        scale = scale * gain
        wide = x.dtype != a.dtype and not torch.is_autocast_enabled(x.device.type)
        product: Tensor = _WideProduct.apply(x, weight, a.dtype) if wide else F.linear(x, weight)
        out = result + (m - 1) * gain * product
    elif base.bias is None:
        out = result * m
    elif result.dtype == m.dtype == base.bias.dtype:
        out = torch.addcmul(base.bias * (1 - m), result, m)
    else:
        out = result * m + base.bias * (1 - m)
    return LF.lora_delta_(out, x, a, m[:, None] * b, scale=scale).to(result.dtype)


class _WideProduct(torch.autograd.Function):
    """x weight^T in a wider dtype than theirs, of which backward keeps no copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        dx = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        return dx, dweight, None


def weight_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The row norms of weight + scale * b a, (d_out,), of which only a tile exists at a time.

    Nothing of it is kept for the next step. |W|^2 could be, and would save a fifth of it, but PEFT writes to base
    weights through `.data` (unmerging, the OLoRA and PiSSA initialisations), which no version counter sees.
    """
    if torch.compiler.is_compiling():
        norm: Tensor = _weight_norm_op(weight, a, b, scale)
        return norm
    return _weight_norm(weight, a, b, scale)


def _weight_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype) * scale
    rows = max(1, _TILE // weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        return torch.cat(
            [
                torch.linalg.vector_norm(torch.addmm(weight[i : i + rows].to(dtype), b[i : i + rows], a), dim=1)
                for i in range(0, weight.shape[0], rows)
            ]
        )


# One node in a compiled graph, not one per tile.
@torch.library.custom_op("lwft::dora_weight_norm", mutates_args=())
def _weight_norm_op(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return _weight_norm(weight, a, b, scale)


@_weight_norm_op.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return weight.new_empty(weight.shape[0], dtype=dtype)
