"""LayerNorm(x + dropout(sublayer_out)) in plain PyTorch: the specification of lwft_kernels.norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lwft_kernels.dropout import dropout


def add_layer_norm(
    x: Tensor,  # (..., d)
    sublayer_out: Tensor,  # (..., d)
    weight: Tensor | None,  # (d,)
    bias: Tensor | None,  # (d,)
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int64; needed when dropout_p > 0
) -> Tensor:  # (..., d)
    d = x.shape[-1]
    dropped = dropout(sublayer_out.reshape(-1, d), seed, dropout_p).view(x.shape)
    total = x + dropped
    if weight is not None and weight.dtype != total.dtype:  # float32 parameters beside 16-bit activations
        weight, bias = weight.to(total.dtype), None if bias is None else bias.to(total.dtype)
    return F.layer_norm(total, (d,), weight, bias, eps)
