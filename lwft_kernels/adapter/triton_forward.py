"""The adapter's forward in Triton.

With n = (x - mean) rstd, w and b the LayerNorm's weight and bias, Wd, bd and Wu, bu those of the two layers:

    z   = (n w + b) Wd^T + bd,
    out = residual + dropout(scale (act(z) Wu^T + bu)).

x goes into the first product as it lies in memory: with W = w Wd, s = sum over d of W and q = b Wd^T + bd, none of
which depends on a token,

    z = rstd (x W^T - mean s) + q.

s is the sum of W as rounded, so the rounding of W meets x - mean and not x, and products of 16-bit numbers are exact in
float32: only a mean of thousands of standard deviations would show. A float32 x has digits to lose, so there x - c is
multiplied, with c the mean of the row's first elements, and mean - c subtracted. The variance is taken about that c in
any case: |mean - c| <= sqrt(d / COLS) standard deviations, so nothing cancels, in one pass over x.

For the residual x passes through the chip once more, last columns first: the L2 cache still holds those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.adapter.triton_kernels import activate
from lwft_kernels.triton.philox import keep_tile


@triton.jit
def fold_norm_kernel(
    norm_weight,  # (d,): w
    norm_bias,  # (d,): b
    down_weight,  # (m, d): Wd
    down_bias,  # (m,): bd
    folded,  # (m, d) of the activations' dtype: W
    projected,  # (2, m) float32: s and q
    d, m,
    NORM_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """W = w Wd, s = sum over d of W, q = b Wd^T + bd; program k takes row k of Wd."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.zeros((COLS,), tl.float32)
    q = tl.zeros((COLS,), tl.float32)
    for start in range(0, d, COLS):
        cols = start + tl.arange(0, COLS)
        inside = cols < d
        weight = tl.load(down_weight + row * d + cols, inside, other=0.0).to(tl.float32)
        value = (weight * tl.load(norm_weight + cols, inside, other=0.0).to(tl.float32)).to(folded.dtype.element_ty)
        tl.store(folded + row * d + cols, value, inside)
        s += value.to(tl.float32)
        if NORM_BIAS:
            q += weight * tl.load(norm_bias + cols, inside, other=0.0).to(tl.float32)
    total = tl.sum(q, 0)
    if DOWN_BIAS:
        total += tl.load(down_bias + row).to(tl.float32)
    tl.store(projected + row, tl.sum(s, 0))
    tl.store(projected + m + row, total)


@triton.jit
def _pivot(x, rows, rows_inside, d, x_stride, COLS: tl.constexpr):
    """c of the formula above; 0 for rows past the end."""
    cols = tl.arange(0, COLS)
    inside = rows_inside[:, None] & (cols < d)[None, :]
    first = tl.load(x + rows[:, None] * x_stride + cols[None, :], inside, other=0.0).to(tl.float32)
    return tl.sum(first, 1) / tl.minimum(d, COLS)


@triton.jit
def _down(
    x, down_weight, rows, rows_inside, pivot, begin, end, d, m, x_stride,
    NORM: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Over the columns [begin, end): x W^T (ROWS, M), and of each row the sums of x - c and of its square.

    Of a float32 x with NORM, (x - c) W^T.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    bottleneck = tl.arange(0, M)
    product = tl.zeros((ROWS, M), tl.float32)
    # eight sums a row and more, so that no thread has to ask its neighbours before the end
    total = tl.zeros((ROWS, COLS // 8), tl.float32)
    squares = tl.zeros((ROWS, COLS // 8), tl.float32)
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        cols_inside = tl.full((COLS,), 1, tl.int1) if EVEN else cols < d
        inside = rows_inside[:, None] & cols_inside[None, :]
        weight = tl.load(
            down_weight + bottleneck[:, None] * d + cols[None, :], (bottleneck < m)[:, None] & cols_inside[None, :],
            other=0.0, eviction_policy="evict_last",
        ).to(dtype)  # fmt: skip
        value = tl.load(x + rows[:, None] * x_stride + cols[None, :], inside, other=0.0)
        if NORM:
            deviation = value.to(tl.float32) - pivot[:, None]
            if not EVEN:
                deviation = tl.where(inside, deviation, 0.0)
            eights = tl.reshape(deviation, (ROWS, COLS // 8, 8))
            total += tl.sum(eights, 2)
            squares += tl.sum(eights * eights, 2)
            if dtype == tl.float32:
                value = deviation
        product = tl.dot(value, tl.trans(weight), product, input_precision="ieee")
    return product, tl.sum(total, 1), tl.sum(squares, 1)


@triton.jit(do_not_specialize=["threshold"])
def adapter_forward_kernel(
    x,  # (T, d)
    down_weight,  # (m, d): Wd, or with NORM the W of fold_norm_kernel
    down_bias,  # (m,); not read with NORM
    projected,  # (2, m) float32: s and q, with NORM
    up_weight,  # (d, m)
    up_bias,  # (d,)
    residual,  # (T, d)
    seed,  # (2,) int64
    out,  # (T, d)
    hidden,  # (T, m): z
    mean,  # (T,) float32
    rstd,  # (T,) float32
    products,  # (SPLITS, T, m) float32; this and the next only where DOWN and UP are two launches
    sums,  # (SPLITS, 2, T) float32
    tokens, d, m, x_stride, residual_stride, width, eps, scale, threshold, keep_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DOWN_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    DOWN: tl.constexpr, UP: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Program (i, s) takes the i-th ROWS tokens and the s-th `width` columns.

    DOWN and UP are one launch where all columns of a token are one program's. Where that would leave most of the card
    idle, a launch of DOWN leaves the sums over each split and one of UP adds them up.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    begin = split * width
    end = tl.minimum(begin + width, d)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < tokens
    bottleneck = tl.arange(0, M)
    kept = bottleneck < m
    cells = rows[:, None] * m + bottleneck[None, :]
    cells_inside = rows_inside[:, None] & kept[None, :]
    pivot = tl.zeros((ROWS,), tl.float32)
    if NORM:
        pivot = _pivot(x, rows, rows_inside, d, x_stride, COLS)

    if DOWN:
        z, total, squares = _down(
            x, down_weight, rows, rows_inside, pivot, begin, end, d, m, x_stride, NORM, EVEN, ROWS, COLS, M
        )
        if not UP:
            part = split.to(tl.int64)
            tl.store(products + part * tokens * m + cells, z, cells_inside)
            if NORM:
                tl.store(sums + 2 * part * tokens + rows, total, rows_inside)
                tl.store(sums + (2 * part + 1) * tokens + rows, squares, rows_inside)

    if UP:
        if not DOWN:
            z = tl.zeros((ROWS, M), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            squares = tl.zeros((ROWS,), tl.float32)
            for turn in range(SPLITS):
                part = tl.full((), 0, tl.int64) + turn
                z += tl.load(products + part * tokens * m + cells, cells_inside, other=0.0)
                if NORM:
                    total += tl.load(sums + 2 * part * tokens + rows, rows_inside, other=0.0)
                    squares += tl.load(sums + (2 * part + 1) * tokens + rows, rows_inside, other=0.0)

        first = rows_inside & (tl.full((ROWS,), 0, tl.int32) + split == 0)
        if NORM:
            shift = total / d
            inverse = tl.rsqrt(tl.maximum(squares / d - shift * shift, 0.0) + eps)
            tl.store(mean + rows, pivot + shift, first)
            tl.store(rstd + rows, inverse, first)
            subtracted = shift if dtype == tl.float32 else pivot + shift
            s = tl.load(projected + bottleneck, kept, other=0.0)
            q = tl.load(projected + m + bottleneck, kept, other=0.0)
            z = inverse[:, None] * (z - subtracted[:, None] * s[None, :]) + q[None, :]
        elif DOWN_BIAS:
            z += tl.load(down_bias + bottleneck, kept, other=0.0).to(tl.float32)[None, :]
        tl.store(hidden + cells, z.to(hidden.dtype.element_ty), cells_inside & first[:, None])

        value, _ = activate(z, ACTIVATION)
        value = value.to(dtype)
        if DROPOUT:
            scale = scale * keep_scale
        last = begin + (end - begin - 1) // COLS * COLS
        for turn in range(begin, end, COLS):
            start = last - (turn - begin)
            cols = start + tl.arange(0, COLS)
            cols_inside = tl.full((COLS,), 1, tl.int1) if EVEN else cols < d
            inside = rows_inside[:, None] & cols_inside[None, :]
            if RESIDUAL:  # first, so that it is under way during all that follows
                direct = tl.load(
                    residual + rows[:, None] * residual_stride + cols[None, :], inside, other=0.0,
                    eviction_policy="evict_first",
                )  # fmt: skip
            weight = tl.load(
                up_weight + cols[:, None] * m + bottleneck[None, :],
                cols_inside[:, None] & kept[None, :], other=0.0, eviction_policy="evict_last",
            ).to(dtype)  # fmt: skip
            branch = tl.dot(value, tl.trans(weight), input_precision="ieee") * scale
            if UP_BIAS:
                branch += tl.load(up_bias + cols, cols_inside, other=0.0).to(tl.float32)[None, :] * scale
            if DROPOUT:
                branch = tl.where(keep_tile(seed, rows, start, threshold, ROWS, COLS), branch, 0.0)
            if RESIDUAL:
                branch += direct.to(tl.float32)
            tl.store(out + rows[:, None] * d + cols[None, :], branch.to(dtype), inside, eviction_policy="evict_first")
