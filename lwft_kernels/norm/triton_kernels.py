"""LayerNorm(x + dropout(sublayer_out)) in Triton: a row of the matrix per turn, all of it in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.triton.philox import keep_tile


@triton.jit
def _total(
    x, sublayer_out, seed, row, cols, inside, x_stride, sublayer_stride, threshold, keep_scale,
    DROPOUT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x + dropout(sublayer_out) of one row, in float32, and the mask of what is kept."""
    added = tl.load(sublayer_out + row * sublayer_stride + cols, inside, other=0.0).to(tl.float32)
    keep = inside
    if DROPOUT:
        rows = tl.full((1,), 0, tl.int64) + row
        keep = tl.reshape(keep_tile(seed, rows, 0, threshold, 1, COLS), (COLS,))
        added = tl.where(keep, added * keep_scale, 0.0)
    return tl.load(x + row * x_stride + cols, inside, other=0.0).to(tl.float32) + added, keep


@triton.jit(do_not_specialize=["threshold"])
def add_layer_norm_forward_kernel(
    x,  # (T, d)
    sublayer_out,  # (T, d)
    weight,  # (d,)
    bias,  # (d,)
    seed,  # (2,) int64
    out,  # (T, d)
    mean,  # (T,) float32
    rstd,  # (T,) float32
    tokens, d, x_stride, sublayer_stride, eps, threshold, keep_scale,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < d
    total, _ = _total(
        x, sublayer_out, seed, row, cols, inside, x_stride, sublayer_stride, threshold, keep_scale,
        DROPOUT, COLS,
    )  # fmt: skip
    # Two passes over registers: the variance of deviations, not a difference of large sums.
    center = tl.sum(total, 0) / d
    deviation = tl.where(inside, total - center, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, 0) / d + eps)
    result = deviation * scale
    if WEIGHT:
        result = result * tl.load(weight + cols, inside, other=0.0).to(tl.float32)
    if BIAS:
        result = result + tl.load(bias + cols, inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + cols, result.to(out.dtype.element_ty), inside)
    tl.store(mean + row, center)
    tl.store(rstd + row, scale)


@triton.jit(do_not_specialize=["threshold"])
def add_layer_norm_backward_kernel(
    grad_out,  # (T, d)
    x,  # (T, d)
    sublayer_out,  # (T, d)
    weight,  # (d,)
    mean,  # (T,) float32
    rstd,  # (T,) float32
    seed,  # (2,) int64
    dx,  # (T, d)
    dsublayer_out,  # (T, d)
    dweight,  # (programs, d) float32: partial sums
    dbias,  # (programs, d) float32: partial sums
    tokens, d, grad_stride, x_stride, sublayer_stride, threshold, keep_scale,
    WEIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    DX: tl.constexpr, DSUBLAYER: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """n = (s - mean) rstd, g = grad_out weight: ds = rstd (g - mean(g) - n mean(g n)), dx = ds, du = mask ds."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, COLS)
    inside = cols < d
    weight_sum = tl.zeros((COLS,), tl.float32)
    bias_sum = tl.zeros((COLS,), tl.float32)
    # The rows of a program depend on the number of programs alone, so the sums have one order.
    for turn in range(program, tokens, programs):
        row = tl.full((), 0, tl.int64) + turn  # 64 bits, also where the interpreter counts with plain ints
        grad = tl.load(grad_out + row * grad_stride + cols, inside, other=0.0).to(tl.float32)
        if DX or DSUBLAYER or DWEIGHT:
            total, keep = _total(
                x, sublayer_out, seed, row, cols, inside, x_stride, sublayer_stride, threshold, keep_scale,
                DROPOUT, COLS,
            )  # fmt: skip
            scale = tl.load(rstd + row)
            normed = tl.where(inside, (total - tl.load(mean + row)) * scale, 0.0)
            if DWEIGHT:
                weight_sum += grad * normed
        if DBIAS:
            bias_sum += grad
        if DX or DSUBLAYER:
            scaled = grad
            if WEIGHT:
                # read again for each row, from the cache: kept, it would take the registers that the sums need
                scaled = grad * tl.load(weight + cols, inside, other=0.0).to(tl.float32)
            dsum = scale * (scaled - tl.sum(scaled, 0) / d - normed * (tl.sum(scaled * normed, 0) / d))
            if DX:
                tl.store(dx + row * d + cols, dsum.to(dx.dtype.element_ty), inside)
            if DSUBLAYER:
                if DROPOUT:
                    dsum = tl.where(keep, dsum * keep_scale, 0.0)
                tl.store(dsublayer_out + row * d + cols, dsum.to(dsublayer_out.dtype.element_ty), inside)
    if DWEIGHT:
        tl.store(dweight + program.to(tl.int64) * d + cols, weight_sum, inside)
    if DBIAS:
        tl.store(dbias + program.to(tl.int64) * d + cols, bias_sum, inside)
