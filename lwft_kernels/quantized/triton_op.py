"""``lwft::quantized_linear_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lwft_kernels.quantized.functional import few_tokens
from lwft_kernels.quantized.triton_kernels import (
    dequantize_kernel,
    quantized_linear_backward_kernel,
    quantized_linear_forward_kernel,
)
from lwft_kernels.triton import tuning
from lwft_kernels.triton.cards import card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.reduction import reduced
from lwft_kernels.triton.rows import as_rows
from lwft_kernels.triton.tuning import Configuration, size_band

_ONE_TILE = 16  # of tokens: nothing is dequantised twice, there is nothing to choose
_MEASURED_TOKENS = 512  # up to these LWFT_AUTOTUNE=full tries both ways

# A thread dequantises some 64 weights a turn, in seven or more instructions each: four warps for each of the four
# schedulers keep those busy, and with three tiles of 4 KiB per program on their way the memory too.
_WARPS_PER_MULTIPROCESSOR = 16
_MOST_SPLITS = 16


class _Weight(NamedTuple):
    """A quantised weight as the op takes it, with what the kernels' launches derive from it."""

    codes: Tensor
    absmax: Tensor
    table: Tensor | None
    absmax_codes: Tensor | None
    absmax_table: Tensor | None
    absmax_offset: Tensor | None
    blocksize: int
    absmax_blocksize: int
    d_out: int
    d_in: int

    def pointers(self) -> tuple[Tensor, ...]:
        """The tensors in the kernels' order; one that is not there stands for another that is not read."""
        there = [self.codes if t is None else t.contiguous() for t in self[:6]]
        return tuple(there)

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return self.d_in // (1 if self.table is None else 2)

    def constants(self) -> dict[str, Any]:
        return {
            "FOUR_BITS": self.table is not None,
            "BLOCK": max(self.blocksize, 1),
            "NESTED": self.absmax_codes is not None,
            "NESTED_BLOCK": max(self.absmax_blocksize, 1),
        }

    def share(self, cols: int) -> int:
        """How many neighbours in a row share an absmax, in tiles of `cols` columns."""
        # rows need not be whole blocks: what divides both never has a boundary inside
        return cols if self.table is None else min(cols, math.gcd(self.blocksize, self.d_in))

    def format(self) -> str:
        return "int8" if self.table is None else "4 bits" if self.absmax_codes is None else "4 bits nested"


def quantized_linear_forward(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_table: Tensor | None,
    absmax_offset: Tensor | None,
    blocksize: int,
    absmax_blocksize: int,
    bias: Tensor | None,
    d_out: int,
) -> Tensor:
    rows = as_rows(x)
    weight = _Weight(
        codes, absmax, table, absmax_codes, absmax_table, absmax_offset, blocksize, absmax_blocksize, d_out, x.shape[-1]
    )
    shape = (*x.shape[:-1], d_out)
    return _chosen(
        "quantized_linear_forward",
        weight,
        rows,
        lambda: _forward(rows, weight, bias).view(shape),
        lambda: F.linear(rows, dequantized(weight, x.dtype), bias).view(shape),
    )


def quantized_linear_backward(
    grad_out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_table: Tensor | None,
    absmax_offset: Tensor | None,
    blocksize: int,
    absmax_blocksize: int,
    d_in: int,
) -> Tensor:
    grad = as_rows(grad_out)
    d_out = grad.shape[-1]
    weight = _Weight(
        codes, absmax, table, absmax_codes, absmax_table, absmax_offset, blocksize, absmax_blocksize, d_out, d_in
    )
    shape = (*grad_out.shape[:-1], d_in)
    return _chosen(
        "quantized_linear_backward",
        weight,
        grad,
        lambda: _backward(grad, weight).view(shape),
        lambda: torch.mm(grad, dequantized(weight, grad.dtype)).view(shape),
    )


def _chosen(
    name: str, weight: _Weight, rows: Tensor, fused: Callable[[], Tensor], dequantizing: Callable[[], Tensor]
) -> Tensor:
    """By one kernel, or by the dequantised weight and PyTorch's product: which one, is a question of the tokens."""
    tokens = rows.shape[0]
    if tokens <= _ONE_TILE:
        return fused()
    if tokens > _MEASURED_TOKENS:
        return dequantizing()
    runs = {"fused": fused, "dequantizing": dequantizing}
    order = ("fused", "dequantizing") if tokens <= few_tokens(rows.dtype) else ("dequantizing", "fused")
    band = (size_band(tokens), weight.d_out, weight.d_in, rows.dtype, weight.format())
    return runs[tuning.choose(name, card_of(rows.device), band, order, lambda method: runs[method]())]()


# ---- the kernels ----


def _forward(x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    """x (T, d_in): a program for some rows of W, which are summed over d_in."""
    tokens = x.shape[0]
    candidates = _forward_candidates(weight, x)
    cut = _cut(candidates, "ROWS", weight.d_out, "COLS", weight.d_in, weight, x)
    out = x.new_empty((cut.splits, tokens, weight.d_out), dtype=torch.float32 if cut.splits > 1 else x.dtype)
    if out.numel() > 0:
        launch(
            quantized_linear_forward_kernel,
            x, *weight.pointers(), x if bias is None else bias.contiguous(), out,
            tokens, weight.d_out, weight.d_in, x.stride(0), weight.stride, cut.length,
            **weight.constants(), BIAS=bias is not None,
            grid=_grid(tokens, "ROWS", weight.d_out, cut), candidates=candidates, band=_band(weight, x),
        )  # fmt: skip
    return _summed(out, x.dtype)


def _backward(grad: Tensor, weight: _Weight) -> Tensor:
    """grad (T, d_out): a program for some columns of W, which are summed over d_out."""
    tokens = grad.shape[0]
    candidates = _backward_candidates(weight, grad)
    cut = _cut(candidates, "COLS", weight.d_in, "ROWS", weight.d_out, weight, grad)
    dx = grad.new_empty((cut.splits, tokens, weight.d_in), dtype=torch.float32 if cut.splits > 1 else grad.dtype)
    if dx.numel() > 0:
        launch(
            quantized_linear_backward_kernel,
            grad, *weight.pointers(), dx,
            tokens, weight.d_out, weight.d_in, grad.stride(0), weight.stride, cut.length,
            **weight.constants(),
            grid=_grid(tokens, "COLS", weight.d_in, cut), candidates=candidates, band=_band(weight, grad),
        )  # fmt: skip
    return _summed(dx, grad.dtype)


def dequantized(weight: _Weight, dtype: torch.dtype) -> Tensor:
    """W (d_out, d_in)."""
    out = weight.codes.new_empty((weight.d_out, weight.d_in), dtype=dtype)
    rows, cols = 16, 256  # 32 weights a thread, and whole sectors of codes and of results
    if out.numel() > 0:
        launch(
            dequantize_kernel,
            *weight.pointers(), out,
            weight.d_out, weight.d_in, weight.stride,
            **weight.constants(),
            grid=lambda c: (triton.cdiv(weight.d_in, cols), triton.cdiv(weight.d_out, rows)),
            candidates=(Configuration({"ROWS": rows, "COLS": cols, "SHARE": weight.share(cols)}, num_warps=4),),
        )  # fmt: skip
    return out


class _Cut(NamedTuple):
    splits: int
    length: int  # of the dimension that is summed over, for each


def _cut(
    candidates: tuple[Configuration, ...],
    tile: str,
    outputs: int,
    step: str,
    summed: int,
    weight: _Weight,
    rows: Tensor,
) -> _Cut:
    """Into how many parts a sum over `summed` is cut, so that all multiprocessors have something to read.

    A program reads its share of W while at most so many others do; partial sums are written and read once more. Both
    are counted in bytes. The order of the sums depends on sizes and card alone.
    """
    first = candidates[0].blocks
    tiles = -(-outputs // first[tile])
    programs = tiles * triton.cdiv(rows.shape[0], first["TOKENS"])
    slots = card_of(rows.device).multiprocessors * _WARPS_PER_MULTIPROCESSOR // candidates[0].num_warps
    length = max(c.blocks[step] for c in candidates)
    steps = triton.cdiv(summed, length)

    def cost(splits: int) -> float:
        turns = -(-programs * splits // slots)
        partials = 0 if splits == 1 else 2 * splits * 4 * rows.shape[0] * outputs
        return float(turns * slots * weight.codes.nbytes / (tiles * splits) + partials)

    splits = min(range(1, min(_MOST_SPLITS, max(steps, 1)) + 1), key=cost)
    length *= triton.cdiv(steps, splits)
    return _Cut(max(triton.cdiv(summed, max(length, 1)), 1), length)


def _grid(tokens: int, tile: str, outputs: int, cut: _Cut) -> Callable[[Configuration], tuple[int, int, int]]:
    return lambda c: (triton.cdiv(tokens, c.blocks["TOKENS"]), triton.cdiv(outputs, c.blocks[tile]), cut.splits)


def _summed(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, T, outputs) as (T, outputs)."""
    splits, tokens, outputs = partials.shape
    return partials[0] if splits == 1 else reduced(partials.view(splits, -1), (tokens, outputs), dtype)


def _forward_candidates(weight: _Weight, x: Tensor) -> tuple[Configuration, ...]:
    tokens = _token_tile(x)
    stages = _stages(x)
    if x.dtype == torch.float32:
        return (_configuration(weight, 64, 64, tokens, 8, 2),)
    if weight.share(128) < 16:  # an absmax for every few weights takes more registers
        return (_configuration(weight, 64, 128 if tokens < 64 else 64, tokens, 8, stages),)
    first = _configuration(weight, 64, 128 if tokens < 64 else 64, tokens, 4, stages)
    if tokens == 16 or not card_of(x.device).large:
        return (first,)
    # of more tokens x weighs more, and is read for every so many rows of W
    return first, _configuration(weight, 128, 64, tokens, 4 if tokens < 64 else 8, stages)


def _backward_candidates(weight: _Weight, grad: Tensor) -> tuple[Configuration, ...]:
    tokens = _token_tile(grad)
    if grad.dtype == torch.float32:
        return (_configuration(weight, 64, 64, tokens, 8, 2),)
    # int8 tiles, transposed, are loaded ahead in registers: two turns are as many as fit
    stages = 2 if weight.table is None else _stages(grad)
    return (_configuration(weight, 64, 128, tokens, 4 if tokens < 64 and weight.share(128) >= 16 else 8, stages),)


def _token_tile(rows: Tensor) -> int:
    tokens = rows.shape[0]
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def _stages(rows: Tensor) -> int:
    card = card_of(rows.device)
    return 4 if card.large else 3 if card.maker == "cuda" else 2


def _configuration(weight: _Weight, rows: int, cols: int, tokens: int, warps: int, stages: int) -> Configuration:
    blocks = {"ROWS": rows, "COLS": cols, "TOKENS": tokens, "SHARE": weight.share(cols)}
    return Configuration(blocks, num_warps=warps, num_stages=stages)


def _band(weight: _Weight, rows: Tensor) -> tuple[object, ...]:
    return size_band(rows.shape[0]), size_band(weight.d_out), size_band(weight.d_in), rows.dtype, weight.format()
