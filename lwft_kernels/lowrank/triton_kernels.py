"""The low-rank products in Triton. Every kernel sees a factor F as (adapters, rank, width) with any strides.

With m the (T, rank) middle, in float32, the products of both directions are four:

    middle     m = scale * dropout(x) F^T            h = dropout(x) A^T,  ds = scale * dy B     (F = A, B^T)
    expand     y = base + bias + scale * mask (m F)  the branch alone
    linear     y = that + x W                        a matrix product whose accumulator begins as the branch
    gradients  dF = scale * m^T dropout(x)           dA,  dB^T and beside it ds, from one pass

Stacked adapters: a tile of tokens is taken once for each adapter that occurs in it, and reads only that one's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.triton.philox import keep_tile

# ---- products ----


@triton.jit
def _parts(value):
    """A float32 tile as the sum of three bfloat16 ones: 8 bits of its 24 each."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _exact_product(a, b, total):
    """total + a b, where b is float32 as accurate as float32.

    16 bits beside float32: products of bfloat16 parts on the matrix units; the 16-bit operand has one, or two if it is
    float16. The matrix units round their sums towards zero, so each turn's sum, small, is added to the total outside.
    """
    if a.dtype == b.dtype:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        high, middle, low = _parts(b)
        if a.dtype == tl.bfloat16:
            found = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
        else:
            a_high, a_low, _ = _parts(a.to(tl.float32))
            found = tl.dot(a_high, middle, tl.dot(a_high, low, tl.dot(a_low, middle)))
            found = tl.dot(a_high, high, tl.dot(a_low, high, found))
        total += found
    return total


@triton.jit
def _low_rank_product(middle, factor, total, result: tl.constexpr):
    """total + middle factor, where it ends in a result of the dtype `result`; `middle` is float32."""
    if factor.dtype != tl.float32:
        total = tl.dot(middle.to(factor.dtype), factor, total)
    elif result == tl.float32:
        total = tl.dot(middle, factor, total, input_precision="ieee")
    else:
        # 16 bits of each are more than a 16-bit result keeps
        m_high, m_low, _ = _parts(middle)
        f_high, f_low, _ = _parts(factor)
        total = tl.dot(m_high, f_high, tl.dot(m_high, f_low, tl.dot(m_low, f_high, total)))
    return total


@triton.jit
def _as_operand(tile, dtype: tl.constexpr):
    """In the dtype of the adapter, as PyTorch converts it; float32 adapters take any tile as it is."""
    return tile if dtype == tl.float32 else tile.to(dtype)


@triton.jit
def _next_adapter(index, after, adapters):
    """The least adapter of `index` above `after`; `adapters` where there is none."""
    return tl.min(tl.where((index > after) & (index < adapters), index, adapters), 0)


@triton.jit
def _keep_large_tile(seed, rows, first_col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`keep_tile` in two halves, one after the other: beside the sums of a large tile, registers lack for the whole."""
    if COLS < 256:
        keep = keep_tile(seed, rows, first_col, threshold, ROWS, COLS)
    else:
        left = keep_tile(seed, rows, first_col, threshold, ROWS, COLS // 2)
        right = keep_tile(seed, rows, first_col + COLS // 2, threshold, ROWS, COLS // 2)
        halves = tl.join(left.to(tl.int8), right.to(tl.int8))
        keep = tl.reshape(tl.permute(halves, (0, 2, 1)), (ROWS, COLS)) != 0
    return keep


@triton.jit
def _without_wrong(total, index, adapters):
    """NaN in the rows of an index that names no adapter: to raise an error, the CPU would have to wait for the GPU."""
    wrong = (index < -1) | (index >= adapters)
    return tl.where(wrong[:, None], float("nan"), total)


# ---- middle ----


@triton.jit
def _middle_tile(
    x, factor, seed, rows, inside, ranks, first, last, width, rank, x_stride, rank_stride, col_stride, threshold,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """mask(x) F^T over the columns [first, last)."""
    DTYPE: tl.constexpr = factor.dtype.element_ty
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first_col in range(first, last, COLS):
        cols = first_col + tl.arange(0, COLS)
        tile = tl.load(
            x + rows[:, None] * x_stride + cols[None, :], inside[:, None] & (cols < width)[None, :], other=0.0
        )
        part = tl.load(
            factor + ranks[None, :] * rank_stride + cols[:, None] * col_stride,
            (cols < width)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        tile = _as_operand(tile, DTYPE)
        if DROPOUT:
            tile = tl.where(keep_tile(seed, rows, first_col, threshold, ROWS, COLS), tile, 0.0)
        total = _exact_product(tile, part, total)
    return total


@triton.jit(do_not_specialize=["threshold"])
def middle_kernel(
    x,  # (T, width)
    factor,  # (adapters, rank, width)
    adapter_index,  # (T,) int64
    seed,  # (2,) int64
    middle,  # (slices, T, rank) float32: partial sums, each of `columns` columns
    tokens, width, rank, adapters, columns, x_stride, adapter_stride, rank_stride, col_stride, threshold, scale,
    STACKED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    first = tl.program_id(1) * columns
    last = tl.minimum(first + columns, width)
    inside = rows < tokens
    if STACKED:
        index = tl.load(adapter_index + rows, inside, other=-1)
        total = tl.zeros((ROWS, RANK), tl.float32)
        adapter = _next_adapter(index, -1, adapters)
        while adapter < adapters:
            theirs = index == adapter
            found = _middle_tile(
                x, factor + adapter * adapter_stride, seed, rows, theirs, ranks, first, last, width, rank,
                x_stride, rank_stride, col_stride, threshold, DROPOUT, ROWS, COLS, RANK,
            )  # fmt: skip
            total = tl.where(theirs[:, None], found, total)
            adapter = _next_adapter(index, adapter, adapters)
        total = _without_wrong(total, index, adapters)
    else:
        total = _middle_tile(
            x, factor, seed, rows, inside, ranks, first, last, width, rank,
            x_stride, rank_stride, col_stride, threshold, DROPOUT, ROWS, COLS, RANK,
        )  # fmt: skip
    target = middle + (tl.program_id(1).to(tl.int64) * tokens + rows[:, None]) * rank + ranks[None, :]
    tl.store(target, total * scale, inside[:, None] & (ranks < rank)[None, :])


# ---- expand ----


@triton.jit
def _expanded(
    middle, factor, rows, inside, cols, width, rank, rank_stride, col_stride,
    result: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """m F of the rows `inside`."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    # not pipelined: mostly a single turn, and what is loaded ahead would take shared memory from the loop to come
    for first_rank in tl.range(0, rank, RANK, num_stages=1):
        ranks = first_rank + tl.arange(0, RANK)
        tile = tl.load(
            middle + rows[:, None] * rank + ranks[None, :], inside[:, None] & (ranks < rank)[None, :], other=0.0
        )
        part = tl.load(
            factor + ranks[:, None] * rank_stride + cols[None, :] * col_stride,
            (ranks < rank)[:, None] & (cols < width)[None, :],
            other=0.0,
        )
        total = _low_rank_product(tile, part, total, result)
    return total


@triton.jit
def _branch(
    middle, factor, adapter_index, seed, rows, cols, first_col, tokens, width, rank, adapters,
    adapter_stride, rank_stride, col_stride, threshold, scale,
    result: tl.constexpr, STACKED: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """scale * mask (m F), each row with the factor of its adapter."""
    inside = rows < tokens
    if STACKED:
        index = tl.load(adapter_index + rows, inside, other=-1)
        total = tl.zeros((ROWS, COLS), tl.float32)
        adapter = _next_adapter(index, -1, adapters)
        while adapter < adapters:
            theirs = index == adapter
            found = _expanded(
                middle, factor + adapter * adapter_stride, rows, theirs, cols, width, rank, rank_stride, col_stride,
                result, ROWS, COLS, RANK,
            )  # fmt: skip
            total = tl.where(theirs[:, None], found, total)
            adapter = _next_adapter(index, adapter, adapters)
        total = _without_wrong(total, index, adapters)
    else:
        total = _expanded(
            middle, factor, rows, inside, cols, width, rank, rank_stride, col_stride, result, ROWS, COLS, RANK
        )
    total = total * scale
    if DROPOUT:
        total = tl.where(_keep_large_tile(seed, rows, first_col, threshold, ROWS, COLS), total, 0.0)
    return total


@triton.jit(do_not_specialize=["threshold"])
def expand_kernel(
    middle,  # (T, rank) float32
    factor,  # (adapters, rank, width)
    base,  # (T, width)
    bias,  # (width,)
    adapter_index,  # (T,) int64
    seed,  # (2,) int64
    out,  # (T, width); may be `base`
    tokens, width, rank, adapters, base_stride, out_stride, adapter_stride, rank_stride, col_stride, threshold, scale,
    BASE: tl.constexpr, BIAS: tl.constexpr, STACKED: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    cols = first_col + tl.arange(0, COLS)
    total = _branch(
        middle, factor, adapter_index, seed, rows, cols, first_col, tokens, width, rank, adapters,
        adapter_stride, rank_stride, col_stride, threshold, scale,
        out.dtype.element_ty, STACKED, DROPOUT, ROWS, COLS, RANK,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + cols, cols < width, other=0.0).to(tl.float32)[None, :]
    inside = (rows < tokens)[:, None] & (cols < width)[None, :]
    if BASE:
        total += tl.load(base + rows[:, None] * base_stride + cols[None, :], inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + cols[None, :], total.to(out.dtype.element_ty), inside)


# ---- linear ----


@triton.jit(do_not_specialize=["threshold"])
def linear_kernel(
    x,  # (T, depth)
    weight,  # (depth, width), any strides
    middle,  # (T, rank) float32
    factor,  # (adapters, rank, width)
    bias,  # (width,)
    adapter_index,  # (T,) int64
    seed,  # (2,) int64
    out,  # (T, width) contiguous
    tokens, width, depth, rank, adapters, x_stride, weight_depth_stride, weight_col_stride,
    adapter_stride, rank_stride, col_stride, threshold, scale,
    BIAS: tl.constexpr, STACKED: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # GROUP blocks of rows go through the columns together: what runs at one time shares x and W in the L2 cache.
    col_blocks = tl.cdiv(width, COLS)
    group = tl.program_id(0) // (GROUP * col_blocks)
    first_block = group * GROUP
    blocks = tl.minimum(tl.cdiv(tokens, ROWS) - first_block, GROUP)
    within = tl.program_id(0) % (GROUP * col_blocks)
    rows = (first_block + within % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_col = within // blocks * COLS
    cols = first_col + tl.arange(0, COLS)
    total = _branch(
        middle, factor, adapter_index, seed, rows, cols, first_col, tokens, width, rank, adapters,
        adapter_stride, rank_stride, col_stride, threshold, scale,
        out.dtype.element_ty, STACKED, DROPOUT, ROWS, COLS, RANK,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + cols, cols < width, other=0.0).to(tl.float32)[None, :]

    # Past the last row the loop reads the last row again, so that no masks of rows lie in registers.
    steps = tl.arange(0, DEPTH)
    x_tile = x + tl.minimum(rows, tokens - 1)[:, None] * x_stride + steps[None, :]
    # a column of W may lie 2**31 elements away: a vocabulary of 128256 tokens by 16384
    weight_tile = (
        weight + steps[:, None].to(tl.int64) * weight_depth_stride + cols[None, :].to(tl.int64) * weight_col_stride
    )
    for first in range(0, depth, DEPTH):
        left = depth - first
        a = tl.load(x_tile, (steps < left)[None, :], other=0.0)
        b = tl.load(weight_tile, (steps < left)[:, None] & (cols < width)[None, :], other=0.0)
        total = tl.dot(a, b, total)
        x_tile += DEPTH
        weight_tile += DEPTH * weight_depth_stride
    inside = (rows < tokens)[:, None] & (cols < width)[None, :]
    tl.store(out + rows[:, None] * width + cols[None, :], total.to(out.dtype.element_ty), inside)


# ---- gradients ----


@triton.jit(do_not_specialize=["threshold"])
def gradients_kernel(
    wide,  # (T, width): x or grad_out
    middle,  # (T, rank) float32: ds or h
    factor,  # (adapters, rank, width)
    adapter_index,  # (T,) int64
    seed,  # (2,) int64
    gradient,  # (parts, adapters, rank, width): partial sums, each over `chunk` tokens
    other_middle,  # (slices, T, rank) float32: scale * wide F^T, partial sums, each of COLS columns
    column_sum,  # (parts, width) float32: partial sums of `wide`
    tokens, width, rank, adapters, chunk, rank_blocks, wide_stride,
    adapter_stride, rank_stride, col_stride,
    part_size, gradient_adapter_stride, gradient_rank_stride, gradient_col_stride, threshold, scale,
    MIDDLE: tl.constexpr, SUM: tl.constexpr, STACKED: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A program owns COLS columns of dF, which stay in its registers while it goes through its tokens."""
    DTYPE: tl.constexpr = factor.dtype.element_ty
    first_col = tl.program_id(0) * COLS
    part = tl.program_id(1)
    adapter = (tl.program_id(2) // rank_blocks).to(tl.int64)
    rank_block = tl.program_id(2) % rank_blocks
    cols = first_col + tl.arange(0, COLS)
    ranks = rank_block * RANK + tl.arange(0, RANK)
    col_inside, rank_inside = cols < width, ranks < rank
    if MIDDLE:
        own = tl.load(
            factor + adapter * adapter_stride + ranks[None, :] * rank_stride + cols[:, None] * col_stride,
            col_inside[:, None] & rank_inside[None, :],
            other=0.0,
        )
    total = tl.zeros((COLS, RANK), tl.float32)
    sums = tl.zeros((COLS,), tl.float32)
    first = part * chunk
    for first_row in range(first, tl.minimum(first + chunk, tokens), ROWS):
        rows = tl.full((), 0, tl.int64) + first_row + tl.arange(0, ROWS)
        inside = rows < tokens
        if STACKED:
            # rows of other adapters are not read: all programs together read `wide` once
            inside = inside & (tl.load(adapter_index + rows, inside, other=-1) == adapter)
        tile = tl.load(
            wide + rows[:, None] * wide_stride + cols[None, :], inside[:, None] & col_inside[None, :], other=0.0
        )
        beside = tl.load(
            middle + rows[:, None] * rank + ranks[None, :], inside[:, None] & rank_inside[None, :], other=0.0
        )
        if SUM:
            sums += tl.sum(tile.to(tl.float32), 0)
        tile = _as_operand(tile, DTYPE)
        if MIDDLE:
            found = _exact_product(tile, own, tl.zeros((ROWS, RANK), tl.float32)) * scale
            target = other_middle + (tl.program_id(0).to(tl.int64) * tokens + rows[:, None]) * rank + ranks[None, :]
            tl.store(target, found, inside[:, None] & rank_inside[None, :])
        if DROPOUT:
            tile = tl.where(keep_tile(seed, rows, first_col, threshold, ROWS, COLS), tile, 0.0)
        total = _exact_product(tl.trans(tile), _as_operand(beside, DTYPE), total)
    target = (
        gradient
        + part.to(tl.int64) * part_size
        + adapter * gradient_adapter_stride
        + ranks[None, :] * gradient_rank_stride
        + cols[:, None] * gradient_col_stride
    )
    tl.store(target, (total * scale).to(gradient.dtype.element_ty), col_inside[:, None] & rank_inside[None, :])
    if SUM:
        once = tl.where(rank_block == 0, width, 0)
        tl.store(column_sum + part.to(tl.int64) * width + cols, sums, cols < once)
