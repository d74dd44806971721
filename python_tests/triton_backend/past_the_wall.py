"""A kernel that writes `argv[1]` elements past the end of a guarded tensor. The test of the walls runs it."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from guarded import guarded


@triton.jit
def fill(out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, 1.0, i < n)


fill[(1,)](guarded(torch.zeros(5)), 5 + int(sys.argv[1]), N=8)
