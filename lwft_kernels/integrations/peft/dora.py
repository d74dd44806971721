"""DoRA (Liu et al. 2024, eq. 5): a LoRA layer whose rows are scaled to learned magnitudes.

With W' = W + s B A and m = magnitude / |W'|, by rows: base bias + m * (x W'^T). As PEFT does it, the norm is held
constant in backward (section 4.3), and where the adapter has dropout it falls on what m - 1 multiplies as well.
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

_TILE = 65536  # elements of W' that exist at a time: small enough for any second-level cache


def why_not(module: Any, name: str, plain_base: bool) -> str | None:
    """Why the variant of adapter `name` cannot be served, or None."""
    variant = type(module.lora_variant[name])
    if variant is not DoraLinearVariant:
        return f"the LoRA variant {variant.__name__}"
    magnitude = module.lora_magnitude_vector[name]
    if type(magnitude) is not peft_dora.DoraLinearLayer or not is_plain(magnitude.weight) or has_hooks(magnitude):
        return "the DoRA layer is hooked, sharded or of another class"
    if not plain_base:
        return "DoRA on a base that is not a plain linear layer"
    if module.lora_B[name].bias is not None:
        return "DoRA with lora_bias"
    if magnitude.weight.device != module.base_layer.weight.device:
        return "magnitude and base are on different devices"
    if peft_dora.ENABLE_DORA_CACHING and not module.training:
        return "DoRA caching is on"  # PEFT then has nothing left to compute that could be saved
    return None


def takes_base(module: Any, name: str) -> bool:
    """Whether `forward` wants the base computed together with the branch: not where dropout parts the two."""
    return not (module.training and isinstance(module.lora_dropout[name], nn.Dropout))


def forward(module: Any, name: str, x: Tensor, result: Tensor | None) -> Tensor:
    """`result` with the DoRA adapter `name` applied.

    Args:
        x: (..., d_in).
        result: (..., d_out), what the base and earlier adapters gave, overwritten; None to compute the base here.
    """
    base, scale = module.base_layer, module.scaling[name]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    weight, bias = (base.weight.t() if type(base) is Conv1D else base.weight), base.bias
    magnitude = module.lora_magnitude_vector[name].weight
    norm = weight_norm(weight.detach(), a.detach(), b.detach(), scale)
    m = (magnitude / norm).to(magnitude.dtype)
    if not takes_base(module, name):
        assert result is not None
        dropped = module.lora_dropout[name](x)
        out = result + (m - 1) * F.linear(dropped, weight)
        return LF.lora_delta_(out, dropped, a, m[:, None] * b, scale=scale).to(result.dtype)
    if result is None:
        product = LF.lora_linear(x, weight, None, a, b, scale=scale)
    else:
        product = LF.lora_delta_(result if bias is None else result - bias, x, a, b, scale=scale)
    if bias is None:
        return (product * m).to(product.dtype)
    if product.dtype == m.dtype == bias.dtype:
        return torch.addcmul(bias, product, m)
    return (product * m + bias).to(product.dtype)


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
