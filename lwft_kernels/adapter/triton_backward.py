"""The adapter's backward in Triton: three kernels, and the sums over their programs in triton/reduction.py.

With the names of triton_forward.py, h = act(z) and g the gradient of out where dropout kept it, and with the constants
(scale, 1 / (1 - p)) moved to the small results:

    dz = scale (g Wu) * act'(z)                     bottleneck_product_kernel, bottleneck_gradient_kernel
    dx = rstd (dz W - mean(dz W) - n mean(n dz W)),
    D = n^T dz,  dWd^T = D w + b dbd,  dw = sum over m of Wd^T D,  db = dbd Wd,
    dWu = scale g^T h,  dbu = scale (sum over tokens of g)                                      columns_kernel

The two means are over d, yet dz and z alone give them, since n W^T = z - q: they are dz s / d and dz (z - q) / d. So
the last kernel may cut d into slices. A program of it reads its slice of grad_out and x once, writes that of dx, keeps W
in shared memory and the sums over its tokens in registers. grad_out is read from memory twice in all, x once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.adapter.triton_activation import activate
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
            g = tl.where(unpacked(bits, ROWS, COLS), g, 0.0)
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
    ddown_bias,  # (programs, m) float32: partial sums
    tokens, d, m, scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DZ: tl.constexpr, H: tl.constexpr, DDOWN_BIAS: tl.constexpr,
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
        if DDOWN_BIAS:
            tl.store(ddown_bias + program * m + bottleneck, tl.sum(gradient, 0), kept)
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
    norm_weight,  # (d,): w
    norm_bias,  # (d,): b
    down_weight,  # (m, d): Wd
    folded,  # (m, d): W
    mean,  # (T,) float32
    rstd,  # (T,) float32
    means,  # (2, T) float32: of bottleneck_gradient_kernel
    dz,  # (T, m)
    h,  # (T, m)
    ddown_bias,  # (T / TOKENS, m) float32: of bottleneck_gradient_kernel, which took TOKENS tokens a program
    kept_elements,  # (T, kept_stride) int8: of bottleneck_product_kernel
    dx,  # (T, d)
    ddown_weight,  # (parts, m, d) float32: partial sums, as all below
    dup_weight,  # (parts, d, m)
    dup_bias,  # (parts, d)
    dnorm_weight,  # (parts, d)
    dnorm_bias,  # (parts, d)
    tokens, d, m, grad_stride, x_stride, kept_stride, length, scale,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, DROPOUT: tl.constexpr, RESIDUAL_IS_X: tl.constexpr,
    DX: tl.constexpr, DDOWN: tl.constexpr, DUP: tl.constexpr, DUP_BIAS: tl.constexpr, DNORM: tl.constexpr,
    DNORM_BIAS: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr,
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
        if DUP or DUP_BIAS or (DX and RESIDUAL_IS_X):
            grad = tl.load(
                grad_out + rows[:, None] * grad_stride + cols[None, :], inside, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        if DDOWN or DNORM or (DX and NORM):
            n = tl.load(x + rows[:, None] * x_stride + cols[None, :], inside, other=0.0, eviction_policy="evict_first")
            if NORM:
                factor = tl.load(rstd + rows, rows_inside, other=0.0)
                center = tl.load(mean + rows, rows_inside, other=0.0)
                deviation = n.to(tl.float32) - center[:, None]
                n = (deviation * factor[:, None]).to(dtype)
        if DX or DDOWN or DNORM:
            gradient = tl.load(dz + cells, cells_inside, other=0.0)
        if DDOWN or DNORM:
            down_sum = tl.dot(tl.trans(n), gradient, down_sum, input_precision="ieee")
        if DUP or DUP_BIAS:
            g = grad
            if DROPOUT:
                counters = first_col // 4 + tl.arange(0, COLS // 4)
                bits = tl.load(
                    kept_elements + rows[:, None] * kept_stride + counters[None, :],
                    rows_inside[:, None] & (counters < kept_stride)[None, :], other=0,
                )  # fmt: skip
                g = tl.where(unpacked(bits, ROWS, COLS), grad, 0.0)
            if DUP:
                value = tl.load(h + cells, cells_inside, other=0.0)
                up_sum = tl.dot(tl.trans(g), value, up_sum, input_precision="ieee")
            if DUP_BIAS:
                ones = tl.full((ROWS, 16), 1.0, dtype)
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
    by_up = cols[:, None] * m + bottleneck[None, :]  # in 32 bits: a weight of 2**31 elements is not an adapter's
    up_inside = cols_inside[:, None] & kept[None, :]
    if DUP:
        tl.store(dup_weight + part * m * d + by_up, up_sum * scale, up_inside)
    if DUP_BIAS:  # 16 times the same
        tl.store(dup_bias + part * d + cols, tl.sum(up_bias_sum, 1) * (scale / 16), cols_inside)
    by_down = bottleneck[None, :] * d + cols[:, None]
    if DNORM or DNORM_BIAS:
        plain = tl.load(down_weight + by_down, up_inside, other=0.0).to(tl.float32)
    if DNORM:
        tl.store(dnorm_weight + part * d + cols, tl.sum(plain * down_sum, 1), cols_inside)
    if (DDOWN and NORM_BIAS) or DNORM_BIAS:
        dbd = tl.zeros((M,), tl.float32)
        for start in range(begin, end, TOKENS):
            dbd += tl.load(ddown_bias + (tl.full((), 0, tl.int64) + start) // TOKENS * m + bottleneck, kept, other=0.0)
    if DNORM_BIAS:
        tl.store(dnorm_bias + part * d + cols, tl.sum(plain * dbd[None, :], 1), cols_inside)
    if DDOWN:
        if NORM:
            w = tl.load(norm_weight + cols, cols_inside, other=0.0).to(tl.float32)
            down_sum = down_sum * w[:, None]
            if NORM_BIAS:
                b = tl.load(norm_bias + cols, cols_inside, other=0.0).to(tl.float32)
                down_sum += b[:, None] * dbd[None, :]
        tl.store(ddown_weight + part * m * d + by_down, down_sum, up_inside)
