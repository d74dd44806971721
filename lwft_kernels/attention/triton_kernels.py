"""What attention's Triton kernels share: which keys a row sees, and how q.k becomes a score and a score a weight.

The G = H / Hkv query heads that share a key head are worked on together, as in csrc/attention/attention_scores.h: row r
of such a group is query r // G of its head r % G. So grouped heads read a key once, and neighbouring rows see about the
same keys.

Scores come in one of two units. As a rule they are the bare products q.k, which `unit` = scale * log2(e) brings to
powers of two in the same multiply-add that subtracts the shift: P = exp2(product * unit - shift). NATURAL scores (those
with a bias, a softcap or a scale that is not positive) are what the formula says: P = exp2((score - shift) * log2(e)).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.triton.philox import keep_tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# ---- where things stand ----


@triton.jit
def head_group(blocks, kv_heads):
    """(block, sequence, key head) of this program; the blocks of a group are neighbours, for the cache."""
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    return program % blocks, group // kv_heads, group % kv_heads


@triton.jit
def at_rows(rows, batch, kv_head, batch_stride, head_stride, query_stride, GROUP: tl.constexpr):
    """Where rows of a group stand in a (B, H, S, ...) tensor, int64."""
    wide = rows.to(tl.int64)
    return batch * batch_stride + (kv_head * GROUP + wide % GROUP) * head_stride + wide // GROUP * query_stride


@triton.jit
def load_tile(pointers, inside, dims, CHECKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """A (rows, DIMS) tile with zeros beyond HEAD_DIM and, where CHECKED, in rows that are not `inside`."""
    if CHECKED:
        if HEAD_DIM < DIMS:
            tile = tl.load(pointers, inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, inside[:, None], other=0.0)
    else:
        if HEAD_DIM < DIMS:
            tile = tl.load(pointers, (dims < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


# ---- which tiles are visited ----


@triton.jit
def key_end_of(lengths, batch, keys, LENGTHS: tl.constexpr):
    """How many keys of a sequence are valid."""
    end = keys
    if LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), keys).to(tl.int32)
    return end


@triton.jit
def visible_keys(first, last, offset, key_end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The keys that some, and those that all of the queries first .. last see: begin, full_begin, full_end, end.

    Query i stands at i + offset, offset = L - S.
    """
    begin = key_end * 0
    full_begin = begin
    full_end = key_end
    end = key_end
    if CAUSAL:
        end = tl.minimum(end, last + offset + 1)
        full_end = tl.minimum(full_end, first + offset + 1)
    if WINDOW:
        begin = tl.maximum(begin, first + offset - window + 1)
        full_begin = tl.maximum(full_begin, last + offset - window + 1)
        if not CAUSAL:
            end = tl.minimum(end, last + offset + window)
            full_end = tl.minimum(full_end, first + offset + window)
    return begin, full_begin, full_end, end


@triton.jit
def visible_queries(first, last, offset, queries, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The queries that see some, and those that see all of the keys first .. last, as `visible_keys`."""
    begin = queries * 0
    full_begin = begin
    full_end = begin + queries
    end = begin + queries
    if CAUSAL:
        begin = tl.maximum(begin, first - offset)
        full_begin = tl.maximum(full_begin, last - offset)
    if WINDOW:
        end = tl.minimum(end, last + window - offset)
        full_end = tl.minimum(full_end, first + window - offset)
        if not CAUSAL:
            begin = tl.maximum(begin, first - window + 1 - offset)
            full_begin = tl.maximum(full_begin, last - window + 1 - offset)
    return begin, full_begin, full_end, end


@triton.jit
def cut(begin, full_begin, full_end, end, shift, part, parts, SIZE: tl.constexpr):
    """Part `part` of the blocks of SIZE that hold begin .. end - 1.

    Blocks begin at multiples of SIZE less `shift`. Returns (first, full_first, full_end, edges): from full_first to
    full_end the blocks lie within full_begin .. full_end and need no mask; beside them there are `edges` more, which
    `edge_start` numbers.
    """
    first = tl.maximum(begin + shift, 0) // SIZE * SIZE
    stop = tl.cdiv(tl.maximum(end + shift, first), SIZE) * SIZE
    chunk = tl.cdiv((stop - first) // SIZE, parts) * SIZE
    first = tl.minimum(first + part * chunk, stop)
    stop = tl.minimum(first + chunk, stop)
    full_first = tl.cdiv(tl.maximum(full_begin + shift, 0), SIZE) * SIZE
    full_stop = tl.maximum(full_end + shift, 0) // SIZE * SIZE
    full_first = tl.minimum(tl.maximum(full_first, first), stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_first)
    edges = (full_first - first + stop - full_stop) // SIZE
    return first - shift, full_first - shift, full_stop - shift, edges


@triton.jit
def edge_start(number, first, full_first, full_end, SIZE: tl.constexpr):
    """Where edge block `number` of `cut` begins: before the full blocks, then behind them."""
    start = first + number * SIZE
    return tl.where(start >= full_first, start + full_end - full_first, start)


# ---- scores ----


@triton.jit
def tanh(x):
    """tanh without loss near 0; the polynomial is that of csrc/common/cpu/vec_math.h."""
    square = x * x
    polynomial = -0.00609671417 * square + 0.0209971790
    polynomial = polynomial * square - 0.0538509096
    polynomial = polynomial * square + 0.133327697
    polynomial = polynomial * square - 0.333333289
    small = x + x * square * polynomial
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def scores_of(
    product,  # q.k, float32
    position,  # where the rows' queries stand: i + L - S; broadcasts with product, as do all below
    cols,  # keys
    key_end,  # how many keys there are for these rows
    row_inside,  # whether the rows are rows
    bias, mask,  # pointers to the rows of bias and mask
    bias_step, mask_step,  # their strides from key to key
    scale, softcap, window,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """softcap * tanh(scale * product / softcap) + bias, -inf where masked; and 1 - tanh(...)^2 where SOFTCAP.

    Without EDGE every row sees every key of the tile, but for `mask`.
    """
    scores = product
    slope = product
    if NATURAL:
        scores = product * scale
    if SOFTCAP:
        bent = tanh(scores / softcap)
        scores = bent * softcap
        slope = 1.0 - bent * bent
    if EDGE:
        allowed = (cols >= 0) & (cols < key_end)
        if BIAS or MASK:
            loaded = allowed & row_inside
    if BIAS:
        if EDGE:
            scores += tl.load(bias + cols.to(tl.int64) * bias_step, loaded, other=0.0).to(tl.float32)
        else:
            scores += tl.load(bias + cols.to(tl.int64) * bias_step).to(tl.float32)
    if MASK:
        if EDGE:
            seen = tl.load(mask + cols.to(tl.int64) * mask_step, loaded, other=0)
        else:
            seen = tl.load(mask + cols.to(tl.int64) * mask_step)
        scores = tl.where(seen != 0, scores, -float("inf"))
    if EDGE:
        if CAUSAL:
            allowed = allowed & (cols <= position)
        if WINDOW:
            allowed = allowed & (cols > position - window)
            if not CAUSAL:
                allowed = allowed & (cols < position + window)
        scores = tl.where(allowed, scores, -float("inf"))
    return scores, slope


@triton.jit
def weights_of(scores, shift, unit, NATURAL: tl.constexpr):
    """exp(score - shift), the shift in the unit of `shift_of`."""
    if NATURAL:
        # the difference first: the lowest float32, with which masks are written, times log2(e) is -inf
        weights = tl.exp2((scores - shift) * LOG2E)
    else:
        weights = tl.exp2(scores * unit - shift)
    return weights


@triton.jit
def raised(scores, highest, unit, NATURAL: tl.constexpr, EMPTY: tl.constexpr):
    """A running softmax (Milakov & Gimelshein 2018, algorithm 3) sees one more tile of scores.

    Returns the highest score of each row so far, in the unit of shifts; the shift, which is that but 0 for a row that
    has seen only -inf, where EMPTY says there may be any; and what all that was summed before must be multiplied by.
    """
    largest = tl.max(scores, 1)
    if not NATURAL:
        largest = largest * unit
    now = tl.maximum(highest, largest)
    shift = now
    if EMPTY:
        shift = tl.where(now == -float("inf"), 0.0, now)
    if NATURAL:
        factor = tl.exp2((highest - shift) * LOG2E)
    else:
        factor = tl.exp2(highest - shift)
    return now, shift, factor


@triton.jit
def keep(seed, row_index, first_column, threshold, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which weights of a tile dropout keeps; as (COLS, ROWS) where TRANSPOSED."""
    kept = keep_tile(seed, row_index, first_column, threshold, ROWS, COLS)
    if TRANSPOSED:
        kept = tl.trans(kept)
    return kept
