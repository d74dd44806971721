"""The product with a quantised weight in plain PyTorch: the specification of lwft_kernels.quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels.quantized.weight import QuantizedWeight


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W (d_out, d_in), computed in float32 (for float64 in float64) and rounded once."""
    exact = torch.promote_types(dtype, torch.float32)
    if weight.table is None:
        return (weight.codes.to(exact) * (weight.absmax.to(exact) / 127)[:, None]).to(dtype)
    elements = weight.shape[0] * weight.shape[1]
    codes = weight.codes.reshape(-1)
    codes = torch.stack((codes >> 4, codes & 15), -1).reshape(-1)[:elements]
    absmax = _absmax(weight, exact).repeat_interleave(weight.blocksize)[:elements]
    return (weight.table.to(exact)[codes.int()] * absmax).to(dtype).view(weight.shape)


def _absmax(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(blocks,)"""
    absmax = weight.absmax.reshape(-1).to(dtype)
    if weight.absmax_codes is None:
        return absmax
    assert weight.absmax_table is not None and weight.absmax_offset is not None
    codes = weight.absmax_codes.reshape(-1).int()
    outer = absmax.repeat_interleave(weight.absmax_blocksize)[: codes.numel()]
    return weight.absmax_table.to(dtype)[codes] * outer + weight.absmax_offset.to(dtype)


def quantized_linear(
    x: Tensor,  # (..., d_in)
    weight: QuantizedWeight,  # (d_out, d_in)
    bias: Tensor | None,  # (d_out,)
) -> Tensor:  # (..., d_out), dtype of x
    return F.linear(x, dequantize(weight, x.dtype), bias)
