"""The bottleneck adapter in plain PyTorch: the specification of lwft_kernels.adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels.dropout import dropout

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def adapter(
    x: Tensor,  # (..., d)
    down_weight: Tensor,  # (m, d)
    down_bias: Tensor | None,  # (m,)
    up_weight: Tensor,  # (d, m)
    up_bias: Tensor | None,  # (d,)
    *,
    activation: str = "relu",
    norm_weight: Tensor | None = None,  # (d,); None = no LayerNorm
    norm_bias: Tensor | None = None,  # (d,)
    eps: float = 1e-5,
    scale: float = 1.0,
    residual: Tensor | None = None,  # (..., d)
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int64; needed when dropout_p > 0
) -> Tensor:  # (..., d)
    def parameter(value: Tensor | None) -> Tensor | None:  # float32 beside 16-bit activations
        return None if value is None else value.to(x.dtype)

    d = x.shape[-1]
    normed = x
    if norm_weight is not None:
        normed = F.layer_norm(x, (d,), parameter(norm_weight), parameter(norm_bias), eps)
    hidden = F.linear(normed, down_weight.to(x.dtype), parameter(down_bias))
    branch = F.linear(ACTIVATION_FUNCTIONS[activation](hidden), up_weight.to(x.dtype), parameter(up_bias))
    branch = dropout((scale * branch).reshape(-1, d), seed, dropout_p).view(x.shape)
    return branch if residual is None else residual + branch
