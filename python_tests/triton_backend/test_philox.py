"""Triton's copy of the random stream gives the bits of lwft_kernels.dropout, in both of its forms."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lwft_kernels.dropout import draws
from lwft_kernels.triton import philox
from lwft_kernels.triton.philox import keep_element, keep_tile

SEEDS = [(0, 0), (3, 5), (2**62 - 1, 2**61 + 12345), (2**32, 2**33)]


@triton.jit(do_not_specialize=["threshold"])
def keep_kernel(
    seed, out, rows, cols, first_row, first_col, threshold,
    BY_TILE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    row = tl.full((), first_row, tl.int64) + i
    if BY_TILE:
        kept = keep_tile(seed, row, first_col, threshold, ROWS, COLS)
    else:
        kept = keep_element(seed, row[:, None], (first_col + j).to(tl.int64)[None, :], threshold)
    tl.store(out + i[:, None] * cols + j[None, :], kept.to(tl.int8), (i[:, None] < rows) & (j[None, :] < cols))


def keep(form, seed, first_row, first_col, rows, cols, p):
    out = torch.full((rows, cols), 7, dtype=torch.int8, device=seed.device)
    threshold, _ = philox.threshold_and_scale(p)
    sizes = {"ROWS": triton.next_power_of_2(rows), "COLS": max(64, triton.next_power_of_2(cols))}
    keep_kernel[(1,)](seed, out, rows, cols, first_row, first_col, threshold, BY_TILE=form == "tile", **sizes)
    return out.bool()


def expected_draws(seed, first_row, first_col, rows, cols):
    rows, cols = (torch.arange(n, device=seed.device) for n in (rows, cols))
    return draws(seed, rows + first_row, cols + first_col)


@pytest.mark.parametrize("form", ["element", "tile"])
@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("first_row,first_col,rows,cols", [(0, 0, 5, 133), (2**32 - 2, 64, 4, 64), (2**40, 4096, 1, 7)])
def test_the_bits_are_those_of_the_reference(triton_device, form, seed, first_row, first_col, rows, cols):
    place = (torch.tensor(seed, device=triton_device), first_row, first_col, rows, cols)
    assert torch.equal(keep(form, *place, 0.3), expected_draws(*place) >= int(0.3 * 2**32))


@pytest.mark.parametrize("p", [2.0**-32, 0.5, 0.75, 1.0])
def test_thresholds_past_the_middle_of_the_range(triton_device, p):
    """The threshold travels as an int32 and is compared as a uint32."""
    place = (torch.tensor([11, 4], device=triton_device), 0, 0, 3, 64)
    assert torch.equal(keep("tile", *place, p), expected_draws(*place) >= min(int(p * 2**32), 2**32 - 1))
