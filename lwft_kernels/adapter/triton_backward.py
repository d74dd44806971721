"""The adapter's backward in Triton: four kernels, each named for what it computes.

With the names of triton_forward.py, h = act(z) and g the gradient of out where dropout kept it, and with the constants
(scale, 1 / (1 - p)) moved to the small results:

    dz = scale (g Wu) * act'(z)                           bottleneck_product_kernel, bottleneck_gradient_kernel
    dx = rstd (dz W - mean(dz W) - n mean(n dz W)),       columns_kernel
    D = n^T dz,  dWu = scale g^T h,  dbu = scale (sum over tokens of g)
    dWd^T = D w + b dbd,  dbd = sum over tokens of dz,    weights_kernel
    dw = sum over m of Wd^T D,  db = dbd Wd

The two means are over d, yet dz and z alone give them, since n W^T = z - q: they are dz s / d and dz (z - q) / d. So
columns_kernel may cut d into slices. A program of it reads its slice of grad_out and x once, writes that of dx, keeps W
in shared memory and the sums over its tokens in registers. grad_out is read from memory twice in all, x once. Sums over
tokens are sums of parts, one per program, which the last kernel adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.adapter.triton_kernels import activate
from lwft_kernels.triton.philox import packed_keep_tile, unpacked


@triton.jit(do_not_specialize=["threshold"])
def bottleneck_product_kernel(
    grad_out,  # (T, d)
    up_weight,  # (d, m)
    seed,  # (2,) int64
    products,  # (SPLITS, T, m) float32
    kept_elements,  # (T, kept_stride) int8: what dropout keeps, packed; to draw it twice would take longer
    tokens, d, m, grad_stride, kept_stride, width, threshold,
    DROPOUT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """g Wu; program (i, s) takes the i-th ROWS tokens and the s-th `width` columns."""
    split = tl.program_id(1)
    begin = split * width
    end = tl.minimum(begin + width, d)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < tokens
    bottleneck = tl.arange(0, M)
    kept = bottleneck < m
    product = tl.zeros((ROWS, M), tl.float32)
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        cols_inside = tl.full((COLS,), 1, tl.int1) if EVEN else cols < d
        inside = rows_inside[:, None] & cols_inside[None, :]
        g = tl.load(grad_out + rows[:, None] * grad_stride + cols[None, :], inside, other=0.0)
        weight = tl.load(
            up_weight + cols[:, None] * m + bottleneck[None, :], cols_inside[:, None] & kept[None, :],
            other=0.0, eviction_policy="evict_last",
        ).to(g.dtype)  # fmt: skip
        if DROPOUT:
            bits = packed_keep_tile(seed, rows, start, threshold, COLS)
            counters = start // 4 + tl.arange(0, COLS // 4)
            bytes_inside = rows_inside[:, None] & (counters < kept_stride)[None, :]
            tl.store(kept_elements + rows[:, None] * kept_stride + counters[None, :], bits, bytes_inside)
            g = tl.where(unpacked(bits, ROWS, COLS), g.to(tl.float32), 0.0).to(g.dtype)
        product = tl.dot(g, weight, product, input_precision="ieee")
    cells = (split.to(tl.int64) * tokens + rows[:, None]) * m + bottleneck[None, :]
    tl.store(products + cells, product, rows_inside[:, None] & kept[None, :])


@triton.jit
def bottleneck_gradient_kernel(
    products,  # (SPLITS, T, m) float32
    hidden,  # (T, m): z
    rstd,  # (T,) float32, with NORM
    projected,  # (2, m) float32: s and q, with NORM
    dz,  # (T, m)
    h,  # (T, m)
    means,  # (2, T) float32: the means of the formula above, times rstd
    dz_sums,  # (programs, m) float32: sums over the tokens of a program
    tokens, d, m, scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DZ: tl.constexpr, H: tl.constexpr, DZ_SUMS: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """All that backward takes from a token as a whole."""
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < tokens
    bottleneck = tl.arange(0, M)
    kept = bottleneck < m
    cells = rows[:, None] * m + bottleneck[None, :]
    inside = rows_inside[:, None] & kept[None, :]
    z = tl.load(hidden + cells, inside, other=0.0).to(tl.float32)
    value, slope = activate(z, ACTIVATION)
    if H:
        tl.store(h + cells, value.to(h.dtype.element_ty), inside)
    if DZ:
        gradient = tl.zeros((ROWS, M), tl.float32)
        for turn in range(SPLITS):
            part = tl.full((), 0, tl.int64) + turn
            gradient += tl.load(products + part * tokens * m + cells, inside, other=0.0)
        gradient = gradient * slope * scale
        if DZ_SUMS:
            tl.store(dz_sums + program * m + bottleneck, tl.sum(gradient, 0), kept)
        rounded = gradient.to(dz.dtype.element_ty)
        tl.store(dz + cells, rounded, inside)
        if NORM:
            gradient = rounded.to(tl.float32)
            s = tl.load(projected + bottleneck, kept, other=0.0)
            q = tl.load(projected + m + bottleneck, kept, other=0.0)
            factor = tl.load(rstd + rows, rows_inside, other=0.0) / d
            tl.store(means + rows, factor * tl.sum(gradient * s[None, :], 1), rows_inside)
            tl.store(means + tokens + rows, factor * tl.sum(gradient * (z - q[None, :]), 1), rows_inside)


@triton.jit
def columns_kernel(
    grad_out,  # (T, d)
    x,  # (T, d)
    folded,  # (m, d): W
    mean,  # (T,) float32
    rstd,  # (T,) float32
    means,  # (2, T) float32: of bottleneck_gradient_kernel
    dz,  # (T, m)
    h,  # (T, m)
    kept_elements,  # (T, kept_stride) int8: of bottleneck_product_kernel
    dx,  # (T, d)
    down_sums,  # (parts, d, m) float32: D, of the tokens of a part, as below
    up_sums,  # (parts, d, m) float32: E
    up_bias_sums,  # (parts, d) float32
    tokens, d, m, grad_stride, x_stride, kept_stride, length, scale,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, RESIDUAL_IS_X: tl.constexpr,
    DX: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Program (j, i) takes the j-th COLS columns and the i-th `length` tokens."""
    dtype: tl.constexpr = x.dtype.element_ty
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, tokens)
    first_col = tl.program_id(0) * COLS
    cols = first_col + tl.arange(0, COLS)
    cols_inside = tl.full((COLS,), 1, tl.int1) if EVEN else cols < d
    bottleneck = tl.arange(0, M)
    kept = bottleneck < m
    if DX:
        weight = tl.load(
            folded + bottleneck[:, None] * d + cols[None, :], kept[:, None] & cols_inside[None, :], other=0.0
        ).to(dtype)  # fmt: skip
    up_sum = tl.zeros((COLS, M), tl.float32)
    up_bias_sum = tl.zeros((COLS, 16), tl.float32)
    down_sum = tl.zeros((COLS, M), tl.float32)
    for start in range(begin, end, ROWS):
        rows = tl.full((), 0, tl.int64) + start + tl.arange(0, ROWS)
        rows_inside = rows < end
        inside = rows_inside[:, None] & cols_inside[None, :]
        cells = rows[:, None] * m + bottleneck[None, :]
        cells_inside = rows_inside[:, None] & kept[None, :]
        if UP or UP_BIAS or (DX and RESIDUAL_IS_X):
            grad = tl.load(
                grad_out + rows[:, None] * grad_stride + cols[None, :], inside, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        if DOWN or (DX and NORM):
            n = tl.load(x + rows[:, None] * x_stride + cols[None, :], inside, other=0.0, eviction_policy="evict_first")
            if NORM:
                factor = tl.load(rstd + rows, rows_inside, other=0.0)
                center = tl.load(mean + rows, rows_inside, other=0.0)
                deviation = n.to(tl.float32) - center[:, None]
                n = (deviation * factor[:, None]).to(dtype)
        if DX or DOWN:
            gradient = tl.load(dz + cells, cells_inside, other=0.0)
        if DOWN:
            down_sum = tl.dot(tl.trans(n), gradient, down_sum, input_precision="ieee")
        if UP or UP_BIAS:
            g = grad
            if DROPOUT:
                counters = first_col // 4 + tl.arange(0, COLS // 4)
                bits = tl.load(
                    kept_elements + rows[:, None] * kept_stride + counters[None, :],
                    rows_inside[:, None] & (counters < kept_stride)[None, :], other=0,
                )  # fmt: skip
                g = tl.where(unpacked(bits, ROWS, COLS), grad.to(tl.float32), 0.0).to(dtype)
            if UP:
                value = tl.load(h + cells, cells_inside, other=0.0)
                up_sum = tl.dot(tl.trans(g), value, up_sum, input_precision="ieee")
            if UP_BIAS:
                ones = tl.full((ROWS, 16), 1.0, tl.float32).to(dtype)
                up_bias_sum = tl.dot(tl.trans(g), ones, up_bias_sum, input_precision="ieee")
        if DX:
            result = tl.dot(gradient, weight, input_precision="ieee")
            if NORM:
                mean_g = tl.load(means + rows, rows_inside, other=0.0)
                mean_gn = tl.load(means + tokens + rows, rows_inside, other=0.0)
                result = (result - deviation * mean_gn[:, None]) * factor[:, None] - mean_g[:, None]
            if RESIDUAL_IS_X:
                result += grad.to(tl.float32)
            tl.store(dx + rows[:, None] * d + cols[None, :], result.to(dtype), inside, eviction_policy="evict_first")

    part = tl.program_id(1).to(tl.int64)
    cells = part * d * m + cols[:, None] * m + bottleneck[None, :]
    cells_inside = cols_inside[:, None] & kept[None, :]
    if DOWN:
        tl.store(down_sums + cells, down_sum, cells_inside)
    if UP:
        tl.store(up_sums + cells, up_sum * scale, cells_inside)
    if UP_BIAS:  # 16 times the same
        tl.store(up_bias_sums + part * d + cols, tl.sum(up_bias_sum, 1) * (scale / 16), cols_inside)


@triton.jit
def weights_kernel(
    down_sums,  # (parts, d, m) float32
    up_sums,  # (parts, d, m) float32
    up_bias_sums,  # (parts, d) float32
    dz_sums,  # (blocks, m) float32: of bottleneck_gradient_kernel
    norm_weight,  # (d,): w
    norm_bias,  # (d,): b
    down_weight,  # (m, d): Wd
    ddown_weight,  # (m, d)
    ddown_bias,  # (m,)
    dup_weight,  # (d, m)
    dup_bias,  # (d,)
    dnorm_weight,  # (d,)
    dnorm_bias,  # (d,)
    parts, blocks, d, m,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr,
    DDOWN: tl.constexpr, DDOWN_BIAS: tl.constexpr, DUP: tl.constexpr, DUP_BIAS: tl.constexpr, DNORM: tl.constexpr,
    DNORM_BIAS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients from the sums over parts of the tokens; program j takes COLS columns."""
    dtype: tl.constexpr = ddown_weight.dtype.element_ty
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    cols_inside = cols < d
    bottleneck = tl.arange(0, M)
    kept = bottleneck < m
    cells = cols[:, None] * m + bottleneck[None, :]
    by_down = bottleneck[None, :] * d + cols[:, None]
    inside = cols_inside[:, None] & kept[None, :]
    down = tl.zeros((COLS, M), tl.float32)
    up = tl.zeros((COLS, M), tl.float32)
    up_bias = tl.zeros((COLS,), tl.float32)
    for turn in range(parts):
        part = tl.full((), 0, tl.int64) + turn
        if DDOWN or DNORM:
            down += tl.load(down_sums + part * d * m + cells, inside, other=0.0)
        if DUP:
            up += tl.load(up_sums + part * d * m + cells, inside, other=0.0)
        if DUP_BIAS:
            up_bias += tl.load(up_bias_sums + part * d + cols, cols_inside, other=0.0)
    if DUP:
        tl.store(dup_weight + cells, up.to(dtype), inside)
    if DUP_BIAS:
        tl.store(dup_bias + cols, up_bias.to(dtype), cols_inside)
    if DDOWN_BIAS or DNORM_BIAS or (DDOWN and NORM_BIAS):
        sums = tl.zeros((16, M), tl.float32)
        for first in range(0, blocks, 16):
            rows = first + tl.arange(0, 16)
            sums += tl.load(
                dz_sums + rows[:, None] * m + bottleneck[None, :], (rows < blocks)[:, None] & kept[None, :], other=0.0
            )
        dbd = tl.sum(sums, 0)
    if DDOWN_BIAS:  # the same from every program
        tl.store(ddown_bias + bottleneck, dbd.to(dtype), kept)
    if DNORM or DNORM_BIAS:
        weight = tl.load(down_weight + by_down, inside, other=0.0).to(tl.float32)
    if DNORM:
        tl.store(dnorm_weight + cols, tl.sum(weight * down, 1).to(dtype), cols_inside)
    if DNORM_BIAS:
        tl.store(dnorm_bias + cols, tl.sum(weight * dbd[None, :], 1).to(dtype), cols_inside)
    if DDOWN:
        if NORM:
            down = down * tl.load(norm_weight + cols, cols_inside, other=0.0).to(tl.float32)[:, None]
        if NORM_BIAS:
            down += tl.load(norm_bias + cols, cols_inside, other=0.0).to(tl.float32)[:, None] * dbd[None, :]
        tl.store(ddown_weight + by_down, down.to(dtype), inside)
