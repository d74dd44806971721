"""The second stage of every sum over tokens: partial sums of programs to one result, in a fixed order, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.tuning import Configuration

_CONFIGURATION = (Configuration({"COLS": 128, "PARTS": 32}, num_warps=4),)


@triton.jit
def sum_partials(partials, out, parts, width, COLS: tl.constexpr, PARTS: tl.constexpr):
    """out[j] = sum over i of partials[i, j], float32, rounded once."""
    cols = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for first in range(0, parts, PARTS):
        rows = first + tl.arange(0, PARTS)
        inside = (rows[:, None] < parts) & (cols[None, :] < width)
        total += tl.sum(tl.load(partials + rows[:, None].to(tl.int64) * width + cols[None, :], inside, other=0.0), 0)
    tl.store(out + cols, total.to(out.dtype.element_ty), cols < width)


def reduced(partials: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sum of (parts, width) float32 partial sums over the parts, as a tensor of `shape` and `dtype`."""
    parts, width = partials.shape
    out = partials.new_empty(shape, dtype=dtype)
    if parts == 0:
        return out.zero_()
    launch(
        sum_partials,
        partials,
        out,
        parts,
        width,
        grid=lambda c: (triton.cdiv(width, c.blocks["COLS"]),),
        candidates=_CONFIGURATION,
    )
    return out
