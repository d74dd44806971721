"""The calls of attention that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lwft_kernels.attention.triton_op import attention_backward, attention_forward
from lwft_kernels.triton.ahead_of_time import Call

_MATRIX = frozenset(
    {
        "attention_forward_kernel",
        "attention_statistics_kernel",
        "attention_queries_kernel",
        "attention_keys_kernel",
        "attention_bias_kernel",
    }
)


def _call(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    queries: int = 1024,
    keys: int = 1024,
    group: int = 1,
    prefix: int = 0,
    bias: bool = False,
    mask: bool = False,
    lengths: bool = False,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    backward: bool = True,
) -> Call:
    """(B, H, S, D) = (4, 16, queries, head_dim)"""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        q = empty(4, queries, 16, head_dim).transpose(1, 2)
        k, v = (empty(4, keys, 16 // group, head_dim).transpose(1, 2) for _ in range(2))
        inputs: list[Any] = [
            q, k, v,
            empty(1, 16, queries, keys) if bias else None,
            empty(4, 1, 1, keys, dtype=torch.bool) if mask else None,
            *(empty(1, 16 // group, prefix, head_dim) if prefix else None for _ in range(2)),
            empty(4, dtype=torch.int64) if lengths else None,
        ]  # fmt: skip
        seed = empty(2, dtype=torch.int64) if dropout_p else None
        rule = (0.125, causal, window, softcap, dropout_p)
        out, lse = attention_forward(*inputs, seed, *rule)
        if backward:
            attention_backward(torch.empty_like(out), None, *inputs, out, lse, seed, *rule, 0b111111)

    return Call(name, run, _MATRIX if dtype != torch.float32 else frozenset())


def calls() -> Iterator[Call]:
    yield _call("causal", torch.bfloat16, 128, causal=True)
    yield _call("prefix", torch.bfloat16, 128, causal=True, prefix=32)
    yield _call("everything", torch.bfloat16, 64, bias=True, mask=True, lengths=True, causal=True, window=256,
                softcap=50.0, prefix=32, dropout_p=0.1)  # fmt: skip
    yield _call("bias", torch.float16, 64, bias=True, dropout_p=0.1)
    yield _call("large heads", torch.bfloat16, 256, causal=True, group=4)
    yield _call("float32", torch.float32, 80, causal=True, group=4)
    yield _call("decoding", torch.bfloat16, 128, queries=1, keys=32768, group=4, causal=True, backward=False)
