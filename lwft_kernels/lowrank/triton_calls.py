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
    tokens: int,
    d: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    adapters: int = 0,
    backward: bool = True,
) -> Call:
    def run() -> None:
        x, grad_out = (_empty(tokens, d, dtype=dtype) for _ in range(2))
        weight, bias = _empty(d, d, dtype=dtype), _empty(d, dtype=dtype)
        a, b, index, seed = _branch(tokens, d, rank, adapter_dtype, dropout_p, adapters)
        _, hidden = triton_op.lora_linear_forward(x, weight, bias, a, b, index, seed, 2.0, dropout_p)
        if backward:
            triton_op.lora_linear_backward(
                grad_out, x, weight, a, b, hidden, index, seed, 2.0, dropout_p, needs=0b11001
            )

    return Call("lora_linear " + _words(tokens, d, rank, dtype, adapter_dtype, dropout_p, adapters), run, _MATRIX)


def _lora_delta(
    tokens: int,
    d: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    adapters: int = 0,
) -> Call:
    def run() -> None:
        base_out, x, grad_out = (_empty(tokens, d, dtype=dtype) for _ in range(3))
        a, b, index, seed = _branch(tokens, d, rank, adapter_dtype, dropout_p, adapters)
        hidden = triton_op.lora_delta_forward_(base_out, x, a, b, index, seed, 2.0, dropout_p)
        triton_op.lora_delta_backward(grad_out, x, a, b, hidden, index, seed, 2.0, dropout_p, needs=0b111)

    return Call("lora_delta " + _words(tokens, d, rank, dtype, adapter_dtype, dropout_p, adapters), run, _MATRIX)


def _branch(
    tokens: int, d: int, rank: int, dtype: torch.dtype, dropout_p: float, adapters: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """lora_a, lora_b, adapter_index and seed."""
    stack = (adapters,) if adapters else ()
    return (
        _empty(*stack, rank, d, dtype=dtype),
        _empty(*stack, d, rank, dtype=dtype),
        _empty(tokens, dtype=torch.int64) if adapters else None,
        _empty(2, dtype=torch.int64) if dropout_p else None,
    )


def _low_rank_linear(tokens: int, d: int, rank: int, dtype: torch.dtype) -> Call:
    def run() -> None:
        x, grad_out = (_empty(tokens, d, dtype=dtype) for _ in range(2))
        down, up, bias = (_empty(*shape, dtype=dtype) for shape in ((rank, d), (d, rank), (d,)))
        _, hidden = triton_op.low_rank_linear_forward(x, down, up, bias)
        triton_op.low_rank_linear_backward(grad_out, x, down, up, hidden, needs=0b1111)

    matrix = _MATRIX if dtype != torch.float32 else frozenset[str]()
    return Call("low_rank_linear " + _words(tokens, d, rank, dtype, dtype), run, matrix)


def _words(
    tokens: int,
    d: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float = 0.0,
    adapters: int = 0,
) -> str:
    dtypes = " beside ".join(str(found).removeprefix("torch.") for found in dict.fromkeys((adapter_dtype, dtype)))
    words = f"{tokens} tokens d={d} r={rank} {dtypes}" + " dropout" * bool(dropout_p)
    return words + f" {adapters} adapters" * bool(adapters)


def calls() -> Iterator[Call]:
    # PEFT's default, large tiles: float32 adapters, dropout, the base frozen
    yield _lora_linear(8192, 4096, 16, torch.bfloat16, torch.float32, 0.1)
    yield _low_rank_linear(8192, 4096, 64, torch.bfloat16)
    # a batch of adapters: trained, and served a token at a time
    yield _lora_delta(8192, 4096, 16, torch.bfloat16, torch.bfloat16, 0.1, adapters=8)
    yield _lora_linear(1, 4096, 16, torch.float16, torch.float16, 0.0, adapters=8, backward=False)
    yield _low_rank_linear(8192, 1000, 256, torch.float32)
