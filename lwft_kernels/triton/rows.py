"""Tensors as the kernels take them: rows of unit stride, (T, d), with one stride between them."""

from __future__ import annotations

from torch import Tensor


def as_rows(value: Tensor) -> Tensor:
    """(..., d) as (T, d) whose last stride is 1: a view where there is one, else a copy."""
    rows = value.reshape(-1, value.shape[-1])
    return rows if rows.shape[-1] == 1 or rows.stride(-1) == 1 else rows.contiguous()


def wanted(needs: int, bit: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of `shape` for a gradient that is wanted, else one of no elements."""
    return like.new_empty(shape if needs >> bit & 1 else (0,))
