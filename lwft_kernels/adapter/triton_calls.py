"""The calls of adapter that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lwft_kernels.adapter.functional import ACTIVATIONS
from lwft_kernels.adapter.triton_op import adapter_backward, adapter_forward
from lwft_kernels.triton.ahead_of_time import Call


def _call(
    tokens: int, d: int, m: int, dtype: torch.dtype, activation: str, *, parameters: torch.dtype | None = None,
    norm: bool = True, dropout_p: float = 0.1,
) -> Call:  # fmt: skip
    def run() -> None:
        def empty(*shape: int, of: torch.dtype = parameters or dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        x = empty(tokens, d, of=dtype)
        norm_weight, norm_bias = (empty(d), empty(d)) if norm else (None, None)
        seed = empty(2, of=torch.int64) if dropout_p else None
        position = ACTIVATIONS.index(activation)
        down_weight, down_bias, up_weight = empty(m, d), empty(m), empty(d, m)
        _, hidden, mean, rstd = adapter_forward(
            x, down_weight, down_bias, up_weight, empty(d), norm_weight, norm_bias, None, seed,
            position, 1e-5, 1.0, dropout_p, True,
        )  # fmt: skip
        adapter_backward(
            empty(tokens, d, of=dtype), x, down_weight, down_bias, up_weight, norm_weight, norm_bias,
            hidden, mean, rstd, seed, position, 1.0, dropout_p, True, 0b1111111 if norm else 0b11111,
        )  # fmt: skip

    name = f"{str(dtype).removeprefix('torch.')} T={tokens} d={d} m={m} {activation}"
    name += " LayerNorm" * norm + " dropout" * bool(dropout_p) + f" {parameters} parameters" * bool(parameters)
    matrix = (
        frozenset({"adapter_forward_kernel", "bottleneck_product_kernel", "columns_kernel"})
        if dtype != torch.float32
        else frozenset()
    )
    return Call(name, run, matrix)


def calls() -> Iterator[Call]:
    yield _call(8192, 4096, 64, torch.bfloat16, "gelu")
    yield _call(128, 768, 256, torch.float16, "silu", parameters=torch.float32, dropout_p=0.0)
    yield _call(512, 768, 64, torch.float32, "tanh")
