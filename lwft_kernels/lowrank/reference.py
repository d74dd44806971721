"""The low-rank products in plain PyTorch: the specification of lwft_kernels.lowrank.

T tokens, rank r, n adapters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels.dropout import dropout


def low_rank_linear(
    x: Tensor,  # (T, d_in)
    down_weight: Tensor,  # (r, d_in)
    up_weight: Tensor,  # (d_out, r)
    bias: Tensor | None,  # (d_out,)
) -> Tensor:  # (T, d_out), dtype of x
    return F.linear(F.linear(x.to(down_weight.dtype), down_weight), up_weight, bias).to(x.dtype)


def lora_delta(
    x: Tensor,  # (T, d_in)
    lora_a: Tensor,  # (r, d_in), or (n, r, d_in) with an adapter_index
    lora_b: Tensor,  # (d_out, r), or (n, d_out, r)
    adapter_index: Tensor | None = None,  # (T,) int64: the adapter of each token, -1 for none
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int64; needed when dropout_p > 0
) -> Tensor:  # (T, d_out), dtype of lora_a
    dropped = dropout(x, seed, dropout_p).to(lora_a.dtype)
    if adapter_index is None:
        return scale * F.linear(F.linear(dropped, lora_a), lora_b)
    out = dropped.new_zeros(x.shape[0], lora_b.shape[1])
    for adapter, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        theirs = (adapter_index == adapter)[:, None]
        out = torch.where(theirs, scale * F.linear(F.linear(dropped, a), b), out)
    return out


def lora_linear(
    x: Tensor,  # (T, d_in)
    weight: Tensor,  # (d_out, d_in)
    bias: Tensor | None,  # (d_out,)
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # (T, d_out), dtype of x
    delta = lora_delta(x, lora_a, lora_b, adapter_index, scale=scale, dropout_p=dropout_p, seed=seed)
    return (F.linear(x, weight, bias) + delta).to(x.dtype)
