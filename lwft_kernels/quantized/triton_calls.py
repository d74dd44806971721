"""The calls of quantized_linear that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lwft_kernels.quantized.triton_op import quantized_linear_backward, quantized_linear_forward
from lwft_kernels.triton.ahead_of_time import Call

_MATRIX = frozenset({"quantized_linear_forward_kernel", "quantized_linear_backward_kernel"})


def _call(
    format: str, dtype: torch.dtype, tokens: int, d_out: int = 4096, d_in: int = 4096, bias: bool = False
) -> Call:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        blocks = -(-d_out * d_in // 64)
        table, absmax = empty(16, dtype=torch.float32), empty(blocks, dtype=torch.float32)
        codes = empty(d_out * d_in // 2, 1, dtype=torch.uint8)
        weight: tuple[Any, ...] = codes, absmax, table, None, None, None, 64, 0
        if format == "int8":
            weight = empty(d_out, d_in, dtype=torch.int8), absmax[:d_out], *(None,) * 4, 0, 0
        if format == "nested":
            nested = empty(blocks, dtype=torch.uint8), empty(256, dtype=torch.float32), empty(dtype=torch.float32)
            weight = codes, absmax[: -(-blocks // 256)], table, *nested, 64, 256
        # called through a name without types: mypy does not know how many `*weight` are
        forward: Any = quantized_linear_forward
        backward: Any = quantized_linear_backward
        forward(empty(tokens, d_in), *weight, empty(d_out) if bias else None, d_out)
        backward(empty(tokens, d_out), *weight, d_in)

    name = f"{format} {str(dtype).removeprefix('torch.')} T={tokens} {d_out} x {d_in}"
    return Call(name, run, matrix=frozenset() if dtype == torch.float32 else _MATRIX)


def calls() -> Iterator[Call]:
    yield _call("nested", torch.bfloat16, 1)
    yield _call("nested", torch.bfloat16, 64)
    yield _call("nested", torch.bfloat16, 2048)
    yield _call("nf4", torch.float16, 24, bias=True)
    yield _call("nf4", torch.bfloat16, 16, 1000, 1096)  # blocks that cross rows
    yield _call("nf4", torch.float32, 16)
    yield _call("int8", torch.float16, 64)
