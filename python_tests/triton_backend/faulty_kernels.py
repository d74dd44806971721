"""Kernels with planted faults, compiled ahead of time in a process of their own: prints their faults as JSON.

The compiler calls none of them an error.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from lwft_kernels.triton import ahead_of_time, cards
from lwft_kernels.triton.ahead_of_time import Call
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.tuning import Configuration


@triton.jit
def product(a, b, out, k, N: tl.constexpr, K: tl.constexpr, MATRIX: tl.constexpr):
    i, j, inner = tl.arange(0, N), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((N, N), tl.float32)
    for first in range(0, k, K):
        left = tl.load(a + i[:, None] * k + (first + inner)[None, :])
        if MATRIX:
            total = tl.dot(left, tl.load(b + (first + inner)[:, None] * N + j[None, :]), total)
        else:
            total += tl.sum(left.to(tl.float32), 1)[:, None]
    tl.store(out + i[:, None] * N + j[None, :], total)


def call(name: str, n: int, k: int, warps: int, stages: int, matrix: bool) -> Call:
    def run() -> None:
        a, b = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
        out = torch.empty(n, n, device="meta")
        configuration = Configuration({"N": n, "K": k}, num_warps=warps, num_stages=stages)
        launch(product, a, b, out, 4096, MATRIX=matrix, grid=lambda _: (1,), candidates=(configuration,))

    return Call(name, run, matrix=frozenset({"product"}))


CALLS = (
    call("sound", 64, 64, 4, 2, True),
    call("too much shared memory", 128, 256, 8, 4, True),
    call("spills", 256, 32, 4, 2, True),
    call("no matrix instruction", 64, 64, 4, 2, False),
)

ahead_of_time.calls = lambda rooms: (("planted", call) for call in CALLS)  # type: ignore[assignment]
found = ahead_of_time.compile_all((), [card for card in cards.CLASSES if card.architecture in (86, 90)])
print(json.dumps([[one.call, one.card, one.faults, one.registers] for one in found]))
