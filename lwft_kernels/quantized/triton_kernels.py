"""x W^T and dy W in Triton, W dequantised in registers: what is read is its codes, half a byte or a byte a weight.

W is the left operand of tl.dot, its rows against the tokens: a matrix instruction is 64 rows high on Hopper, 16
elsewhere, and as narrow as 8 tokens, of which there are few.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scales(
    absmax, absmax_codes, absmax_table, absmax_offset, blocks, inside,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """absmax of blocks of weights; where NESTED, absmax_table[code] * absmax of the block of codes + offset."""
    if NESTED:
        code = tl.load(absmax_codes + blocks, inside, other=0).to(tl.int32)
        outer = tl.load(absmax + blocks // NESTED_BLOCK, inside, other=0.0)
        return tl.load(absmax_table + code) * outer + tl.load(absmax_offset)
    return tl.load(absmax + blocks, inside, other=0.0)


@triton.jit
def _weights(
    codes, absmax, values, absmax_codes, absmax_table, absmax_offset, rows, first_col, last_col, d_out, d_in, stride,
    FOUR_BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLS) tile of W in float32: table[code] * absmax of the block, or code * absmax of the row / 127.

    Args:
        values: (16,) tile, the table.
        rows: int64 (ROWS,).
        first_col: a multiple of COLS; the weights from `last_col` on are not read. Both even.
        SHARE: so many neighbours in a row share an absmax, counted from first_col: COLS is a multiple of it.
    """
    if FOUR_BITS:
        # The table is looked up in shared memory: 16 floats lie in 16 banks, so that no two threads wait for each
        # other. A tl.load there would be taken for one to be loaded ahead, and be an asynchronous copy per weight.
        packed_col = first_col // 2 + tl.arange(0, COLS // 2)
        inside = (rows < d_out)[:, None] & (packed_col < last_col // 2)[None, :]
        packed = tl.load(codes + rows[:, None] * stride + packed_col[None, :], inside, other=0).to(tl.int32)
        index = tl.reshape(tl.join(packed >> 4, packed & 15), (ROWS * COLS,))
        value = tl.reshape(tl.gather(values, index, 0), (ROWS, COLS))
        shares = first_col + tl.arange(0, COLS // SHARE) * SHARE
        inside = (rows < d_out)[:, None] & (shares < last_col)[None, :]
        blocks = (rows[:, None] * d_in + shares[None, :]) // BLOCK  # W is cut into blocks row after row
        scale = _scales(absmax, absmax_codes, absmax_table, absmax_offset, blocks, inside, NESTED, NESTED_BLOCK)
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, COLS // SHARE, SHARE))
        return value * tl.reshape(scale, (ROWS, COLS))
    cols = first_col + tl.arange(0, COLS)
    inside = (rows < d_out)[:, None] & (cols < last_col)[None, :]
    scale = tl.load(absmax + rows, rows < d_out, other=0.0) * (1.0 / 127)
    return tl.load(codes + rows[:, None] * stride + cols[None, :], inside, other=0).to(tl.float32) * scale[:, None]


@triton.jit
def quantized_linear_forward_kernel(
    x,  # (T, d_in)
    codes,  # (d_out, d_in / 2) uint8 or (d_out, d_in) int8
    absmax,  # float32
    table,  # (16,) float32
    absmax_codes,  # uint8
    absmax_table,  # (256,) float32
    absmax_offset,  # () float32
    bias,  # (d_out,)
    out,  # (T, d_out); with several splits (splits, T, d_out) float32: partial sums
    tokens, d_out, d_in, x_stride, codes_stride, split_cols,
    FOUR_BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out^T = W x^T + bias. A program takes ROWS rows of W, `split_cols` of their columns and TOKENS tokens."""
    # Programs that read the same weights are neighbours.
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(2) * split_cols
    last = tl.minimum(first + split_cols, d_in)
    values = tl.zeros((16,), tl.float32)
    if FOUR_BITS:
        values = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for col in range(first, last, COLS):
        weight = _weights(
            codes, absmax, values, absmax_codes, absmax_table, absmax_offset, row, col, last, d_out, d_in, codes_stride,
            FOUR_BITS, BLOCK, SHARE, NESTED, NESTED_BLOCK, ROWS, COLS,
        )  # fmt: skip
        cols = col + tl.arange(0, COLS)
        inside = (token < tokens)[:, None] & (cols < last)[None, :]
        tile = tl.load(x + token[:, None] * x_stride + cols[None, :], inside, other=0.0)
        total = tl.dot(weight.to(tile.dtype), tl.trans(tile), total, input_precision="ieee")
    if BIAS:
        added = tl.load(bias + row, row < d_out, other=0.0).to(tl.float32)
        total += tl.where(split == 0, added, 0.0)[:, None]
    target = out + (split * tokens + token[None, :]) * d_out + row[:, None]
    tl.store(target, total.to(out.dtype.element_ty), (row < d_out)[:, None] & (token < tokens)[None, :])


@triton.jit
def quantized_linear_backward_kernel(
    grad_out,  # (T, d_out)
    codes,  # (d_out, d_in / 2) uint8 or (d_out, d_in) int8
    absmax,  # float32
    table,  # (16,) float32
    absmax_codes,  # uint8
    absmax_table,  # (256,) float32
    absmax_offset,  # () float32
    dx,  # (T, d_in); with several splits (splits, T, d_in) float32: partial sums
    tokens, d_out, d_in, grad_stride, codes_stride, split_rows,
    FOUR_BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dx^T = W^T dy^T. A program takes COLS columns of W, `split_rows` of their rows and TOKENS tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(2) * split_rows
    last = tl.minimum(first + split_rows, d_out)
    values = tl.zeros((16,), tl.float32)
    if FOUR_BITS:
        values = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((COLS, TOKENS), tl.float32)
    for first_row in range(first, last, ROWS):
        row = first_row + tl.arange(0, ROWS).to(tl.int64)
        weight = _weights(
            codes, absmax, values, absmax_codes, absmax_table, absmax_offset, row, first_col, d_in, last, d_in,
            codes_stride, FOUR_BITS, BLOCK, SHARE, NESTED, NESTED_BLOCK, ROWS, COLS,
        )  # fmt: skip
        inside = (token < tokens)[:, None] & (row < last)[None, :]
        grad = tl.load(grad_out + token[:, None] * grad_stride + row[None, :], inside, other=0.0)
        total = tl.dot(tl.trans(weight.to(grad.dtype)), tl.trans(grad), total, input_precision="ieee")
    target = dx + (split * tokens + token[None, :]) * d_in + col[:, None]
    tl.store(target, total.to(dx.dtype.element_ty), (col < d_in)[:, None] & (token < tokens)[None, :])


@triton.jit
def dequantize_kernel(
    codes,  # (d_out, d_in / 2) uint8 or (d_out, d_in) int8
    absmax,  # float32
    table,  # (16,) float32
    absmax_codes,  # uint8
    absmax_table,  # (256,) float32
    absmax_offset,  # () float32
    out,  # (d_out, d_in)
    d_out, d_in, codes_stride,
    FOUR_BITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first_col = tl.program_id(0) * COLS
    col = first_col + tl.arange(0, COLS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    values = tl.zeros((16,), tl.float32)
    if FOUR_BITS:
        values = tl.load(table + tl.arange(0, 16))
    weight = _weights(
        codes, absmax, values, absmax_codes, absmax_table, absmax_offset, row, first_col, d_in, d_out, d_in,
        codes_stride, FOUR_BITS, BLOCK, SHARE, NESTED, NESTED_BLOCK, ROWS, COLS,
    )  # fmt: skip
    inside = (row < d_out)[:, None] & (col < d_in)[None, :]
    tl.store(out + row[:, None] * d_in + col[None, :], weight.to(out.dtype.element_ty), inside)
