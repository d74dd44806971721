"""The calls of add_layer_norm that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lwft_kernels.norm.triton_op import add_layer_norm_backward, add_layer_norm_forward
from lwft_kernels.triton.ahead_of_time import Call


def _call(dtype: torch.dtype, d: int, dropout_p: float) -> Call:
    def run() -> None:
        x, sublayer_out, grad_out = (torch.empty(64, d, dtype=dtype, device="meta") for _ in range(3))
        weight, bias = (torch.empty(d, dtype=dtype, device="meta") for _ in range(2))
        seed = torch.empty(2, dtype=torch.int64, device="meta") if dropout_p else None
        _, mean, rstd = add_layer_norm_forward(x, sublayer_out, weight, bias, seed, 1e-5, dropout_p)
        add_layer_norm_backward(grad_out, x, sublayer_out, weight, mean, rstd, seed, dropout_p, 0b1111)

    return Call(f"{str(dtype).removeprefix('torch.')} d={d}" + (" dropout" if dropout_p else ""), run)


def calls() -> Iterator[Call]:
    yield _call(torch.bfloat16, 4096, 0.1)
    yield _call(torch.float32, 768, 0.1)
    yield _call(torch.float16, 8192, 0.1)
