"""The package's one random stream on a GPU: the same bits as csrc/common/philox.h and lwft_kernels/dropout.py.

64 neighbouring columns share 16 counters: column c takes word (c % 64) / 16 of counter (c / 64) * 16 + c % 16. So a
tile that is a multiple of 64 columns wide draws four columns from each call (`keep_tile`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS: tl.constexpr = tl.constexpr(64)
_LANES: tl.constexpr = tl.constexpr(16)


def threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    """What the kernels take for `dropout_p`: an element is kept iff its draw is at least the threshold, then scaled.

    The threshold travels as the int32 of the same bits: Triton gives an int above 2**31 another type than one below,
    and with it another kernel.
    """
    threshold = min(int(dropout_p * 2.0**32), 2**32 - 1)
    scale = 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)
    return threshold - 2**32 if threshold >= 2**31 else threshold, scale


def seed_or(seed: Tensor | None, other: Tensor) -> Tensor:
    """A pointer argument must be some tensor, also where there is no dropout and nobody reads it."""
    return other if seed is None else seed


@triton.jit
def philox_words(seed, row, counter):
    """The four 32-bit words of (row, counter): Philox 4x32-10, Salmon et al., SC 2011.

    Args:
        seed: pointer to the int64 pair (seed, offset).
        row: int64 tile.
        counter: int32 or int64 tile that broadcasts with `row`.
    """
    key, offset = tl.load(seed), tl.load(seed + 1)
    # not broadcast before they meet: two rounds long the products are those of a row or a column
    c0 = counter.to(tl.uint32)
    c1, c2 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    c3 = offset.to(tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # one 64-bit product is one instruction, its halves apart are two or more
        product0 = c0.to(tl.uint64) * tl.full((), 0xD2511F53, tl.uint64)
        product1 = c2.to(tl.uint64) * tl.full((), 0xCD9E8D57, tl.uint64)
        high0, high1 = (product0 >> 32).to(tl.uint32), (product1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1.to(tl.uint32), high0 ^ c3 ^ k1, product0.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_element(seed, rows, cols, threshold):
    """Whether the elements (rows x cols) are kept, for any columns: a call of Philox each.

    Args:
        rows, cols: int64 tiles that broadcast.
        threshold: as `threshold_and_scale` gives it.
    """
    w0, w1, w2, w3 = philox_words(seed, rows, cols // _COLUMNS * _LANES + cols % _LANES)
    word = cols % _COLUMNS // _LANES
    draw = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return draw >= _unsigned(threshold)


@triton.jit
def _unsigned(threshold):
    return tl.full((), threshold, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def keep_tile(seed, rows, first_col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether the elements of a (ROWS, COLS) tile are kept: a quarter of the calls of `keep_element`.

    Args:
        rows: int64 (ROWS,).
        first_col: a multiple of 64.
        threshold: as `threshold_and_scale` gives it, int32.
        COLS: a multiple of 64; below that, `keep_element`.

    Returns:
        int1 (ROWS, COLS).
    """
    return unpacked(packed_keep_tile(seed, rows, first_col, threshold, COLS), ROWS, COLS)


@triton.jit
def packed_keep_tile(seed, rows, first_col, threshold, COLS: tl.constexpr):
    """`keep_tile` as int8 (ROWS, COLS / 4): a byte per counter, bit w for its word w."""
    counters = first_col // 4 + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = philox_words(seed, rows[:, None], counters[None, :].to(tl.int64))
    limit = _unsigned(threshold)
    bits = (w0 >= limit).to(tl.int8) | (w1 >= limit).to(tl.int8) << 1
    return bits | (w2 >= limit).to(tl.int8) << 2 | (w3 >= limit).to(tl.int8) << 3


@triton.jit
def unpacked(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int8 (ROWS, COLS / 4) of `packed_keep_tile` as int1 (ROWS, COLS)."""
    # Bit w of counter 16 g + l is column 64 g + 16 w + l. Only the bytes travel between the threads.
    word = (1 << tl.arange(0, 4)).to(tl.int8)
    keep = (tl.reshape(bits, (ROWS, COLS // 64, 1, 16)) & word[None, None, :, None]) != 0
    return tl.reshape(keep, (ROWS, COLS))
