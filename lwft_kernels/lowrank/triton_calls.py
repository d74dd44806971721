"""The calls of the low-rank ops that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lwft_kernels.lowrank import triton_op
from lwft_kernels.triton.ahead_of_time import Call

_MATRIX = frozenset({"middle_kernel", "expand_kernel", "linear_kernel", "gradients_kernel"})


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lora_linear(
    tokens: int, d: int, rank: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float, adapters: int = 0
) -> Call:
    def run() -> None:
        x, grad_out = (_empty(tokens, d, dtype=dtype) for _ in range(2))
        weight, bias = _empty(d, d, dtype=dtype), _empty(d, dtype=dtype)
        stack = (adapters,) if adapters else ()
        a, b = _empty(*stack, rank, d, dtype=adapter_dtype), _empty(*stack, d, rank, dtype=adapter_dtype)
        index = _empty(tokens, dtype=torch.int64) if adapters else None
        seed = _empty(2, dtype=torch.int64) if dropout_p else None
        _, hidden = triton_op.lora_linear_forward(x, weight, bias, a, b, index, seed, 2.0, dropout_p)
        triton_op.lora_linear_backward(
            grad_out, x, weight, a, b, hidden, index, seed, 2.0, dropout_p, needs=0b11001
        )

    name = f"lora_linear {tokens} tokens d={d} r={rank} {_name(dtype)}, adapters {_name(adapter_dtype)}"
    name += f" x {adapters}" * bool(adapters) + " dropout" * bool(dropout_p)
    return Call(name, run, matrix=_MATRIX)


def _low_rank_linear(tokens: int, d: int, rank: int, dtype: torch.dtype) -> Call:
    def run() -> None:
        x, grad_out = (_empty(tokens, d, dtype=dtype) for _ in range(2))
        down, up, bias = (_empty(*shape, dtype=dtype) for shape in ((rank, d), (d, rank), (d,)))
        _, hidden = triton_op.low_rank_linear_forward(x, down, up, bias)
        triton_op.low_rank_linear_backward(grad_out, x, down, up, hidden, needs=0b1111)

    matrix = _MATRIX if dtype != torch.float32 else frozenset[str]()
    return Call(f"low_rank_linear {tokens} tokens d={d} r={rank} {_name(dtype)}", run, matrix=matrix)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def calls() -> Iterator[Call]:
    # what is trained: the large tiles, adapters of either dtype
    yield _lora_linear(8192, 4096, 16, torch.bfloat16, torch.bfloat16, 0.1)
    yield _lora_linear(8192, 4096, 16, torch.bfloat16, torch.float32, 0.1)
    yield _lora_linear(1, 4096, 16, torch.float16, torch.float16, 0.0, adapters=8)
    yield _low_rank_linear(8192, 1000, 256, torch.float32)
