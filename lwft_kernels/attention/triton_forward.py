"""Attention forward in Triton: FlashAttention-2 (Dao 2023, algorithm 1) over prefix and keys, a tile of rows a program.

Few rows before many keys (decoding) are too few programs; then the keys are cut into parts with a program each
(Flash-Decoding, Dao et al. 2023), whose softmax states and sums a second kernel merges in the order of the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.attention.triton_kernels import (
    LN2,
    at_rows,
    cut,
    edge_start,
    head_group,
    keep,
    key_end_of,
    load_tile,
    raised,
    scores_of,
    visible_keys,
    weights_of,
)


@triton.jit
def _attend(
    acc, highest, total,  # the rows' state: sum of weights * v, highest score, sum of weights
    tile_q, k, v,  # q of the rows; pointers to (COLS, DIMS) tiles of keys 0 .. COLS - 1
    k_stride, v_stride, start, key_end,
    position, row_index, row_inside, dims,
    bias, mask, bias_step, mask_step, seed, first_column, threshold,
    scale, unit, softcap, window,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr, EMPTY: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from `start` on, joins the state."""
    cols = start + tl.arange(0, COLS)
    inside = (cols >= 0) & (cols < key_end)
    start = tl.full((), 0, tl.int64) + start
    tile_k = load_tile(k + start * k_stride, inside, dims, EDGE, HEAD_DIM, DIMS)
    product = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
    scores, _ = scores_of(
        product, position[:, None], cols[None, :], key_end, row_inside[:, None],
        bias[:, None], mask[:, None], bias_step, mask_step, scale, softcap, window,
        BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, EDGE,
    )  # fmt: skip
    highest, shift, factor = raised(scores, highest, unit, NATURAL, EMPTY)
    weights = weights_of(scores, shift[:, None], unit, NATURAL)
    total = total * factor + tl.sum(weights, 1)
    acc = acc * factor[:, None]
    if DROPOUT:
        weights = tl.where(keep(seed, row_index, first_column + start, threshold, False, ROWS, COLS), weights, 0.0)
    tile_v = load_tile(v + start * v_stride, inside, dims, EDGE, HEAD_DIM, DIMS)
    acc = tl.dot(weights.to(tile_v.dtype), tile_v, acc, input_precision="ieee")
    return acc, highest, total


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    q,  # (B, H, S, D)
    k, v,  # (B, Hkv, L, D)
    prefix_k, prefix_v,  # (B, Hkv, P, D)
    bias, mask,  # (B, H, S, L)
    lengths,  # (B,) int64
    seed,  # (2,) int64
    out,  # (B, S, H, D); of parts (parts, B, S, H, D) float32: sums of exp(score - highest) * v
    lse,  # (B, H, S) float32; of parts (parts, B, H, S): highest scores
    totals,  # of parts (parts, B, H, S) float32: sums of exp(score - highest)
    batches, kv_heads, queries, keys, prefix,
    q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    pk_batch, pk_head, pk_key, pv_batch, pv_head, pv_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    scale, unit, softcap, window, threshold, keep_scale,
    PREFIX: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PREFIX_COLS: tl.constexpr,
):  # fmt: skip
    row_count = queries * GROUP
    blocks = tl.cdiv(row_count, ROWS)
    block, batch, kv_head = head_group(blocks, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block  # later rows see more keys: the longest programs begin first
    part, parts = tl.program_id(1), tl.num_programs(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_inside = rows < row_count
    dims = tl.arange(0, DIMS)
    offset = keys - queries
    position = rows // GROUP + offset
    row_index = at_rows(rows, batch, kv_head, GROUP * kv_heads * queries, queries, 1, GROUP)
    at_q = at_rows(rows, batch, kv_head, q_batch, q_head, q_query, GROUP)
    tile_q = load_tile(q + at_q[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
    bias_rows = bias + at_rows(rows, batch, kv_head, bias_batch, bias_head, bias_query, GROUP)
    mask_rows = mask + at_rows(rows, batch, kv_head, mask_batch, mask_head, mask_query, GROUP)

    acc = tl.zeros((ROWS, DIMS), tl.float32)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if PREFIX:
        lanes = tl.arange(0, PREFIX_COLS).to(tl.int64)
        k_tile = prefix_k + batch * pk_batch + kv_head * pk_head + lanes[:, None] * pk_key + dims[None, :]
        v_tile = prefix_v + batch * pv_batch + kv_head * pv_head + lanes[:, None] * pv_key + dims[None, :]
        first, _, _, edges = cut(0, 0, 0, prefix, 0, part, parts, PREFIX_COLS)
        for number in range(edges):
            acc, highest, total = _attend(
                acc, highest, total, tile_q, k_tile, v_tile, pk_key, pv_key, first + number * PREFIX_COLS, prefix,
                position, row_index, row_inside, dims,
                bias_rows, mask_rows, bias_key, mask_key, seed, 0, threshold, scale, unit, softcap, window,
                False, False, False, False, SOFTCAP, NATURAL, DROPOUT, True, False,
                HEAD_DIM, DIMS, ROWS, PREFIX_COLS,
            )  # fmt: skip

    lanes = tl.arange(0, COLS).to(tl.int64)
    k_tile = k + batch * k_batch + kv_head * k_head + lanes[:, None] * k_key + dims[None, :]
    v_tile = v + batch * v_batch + kv_head * v_head + lanes[:, None] * v_key + dims[None, :]
    key_end = key_end_of(lengths, batch, keys, LENGTHS)
    last = tl.minimum(block * ROWS + ROWS, row_count) - 1
    begin, full_begin, full_end, end = visible_keys(
        block * ROWS // GROUP, last // GROUP, offset, key_end, window, CAUSAL, WINDOW
    )
    shift = 0
    if DROPOUT:
        shift = prefix % 64  # the random stream counts the prefix too, and is drawn for 64 columns
    first, full_first, full_end, edges = cut(begin, full_begin, full_end, end, shift, part, parts, COLS)
    for start in range(full_first, full_end, COLS):
        acc, highest, total = _attend(
            acc, highest, total, tile_q, k_tile, v_tile, k_key, v_key, start, key_end,
            position, row_index, row_inside, dims,
            bias_rows, mask_rows, bias_key, mask_key, seed, prefix, threshold, scale, unit, softcap, window,
            BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, False, BIAS or MASK,
            HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip
    for number in range(edges):
        acc, highest, total = _attend(
            acc, highest, total, tile_q, k_tile, v_tile, k_key, v_key,
            edge_start(number, first, full_first, full_end, COLS), key_end,
            position, row_index, row_inside, dims,
            bias_rows, mask_rows, bias_key, mask_key, seed, prefix, threshold, scale, unit, softcap, window,
            BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, True, True,
            HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip

    heads = kv_heads * GROUP
    at_out = at_rows(rows, batch, kv_head, heads * queries * HEAD_DIM, HEAD_DIM, heads * HEAD_DIM, GROUP)
    stored = row_inside[:, None]
    if HEAD_DIM < DIMS:
        stored = stored & (dims < HEAD_DIM)[None, :]
    if SPLIT:
        all_rows = tl.full((), 0, tl.int64) + batches * heads * queries
        tl.store(lse + part * all_rows + row_index, highest, row_inside)
        tl.store(totals + part * all_rows + row_index, total, row_inside)
        tl.store(out + part * all_rows * HEAD_DIM + at_out[:, None] + dims[None, :], acc, stored)
    else:
        store_results(acc, highest, total, out + at_out[:, None] + dims[None, :], lse + row_index, row_inside, stored,
                      keep_scale, NATURAL, DROPOUT)  # fmt: skip


@triton.jit
def store_results(
    acc, highest, total, out, lse, row_inside, stored, keep_scale, NATURAL: tl.constexpr, DROPOUT: tl.constexpr
):
    """out = acc / total, lse = highest + log(total); zeros and -inf for a row that sees nothing."""
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    inverse = tl.where(nothing, 0.0, 1.0 / total)
    if DROPOUT:
        inverse = inverse * keep_scale
    tl.store(out, (acc * inverse[:, None]).to(out.dtype.element_ty), stored)
    if not NATURAL:
        highest = highest * LN2
    tl.store(lse, tl.where(nothing, -float("inf"), highest + tl.log(total)), row_inside)


@triton.jit
def attention_merge_kernel(
    sums,  # (parts, B, S, H, D) float32
    highests, totals,  # (parts, B, H, S) float32
    out,  # (B, S, H, D)
    lse,  # (B, H, S) float32
    heads, queries, parts, all_rows, keep_scale,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row of `out` from its parts: weights exp(highest of the part - highest of all)."""
    row = tl.program_id(0).to(tl.int64)
    query, head, batch = row % queries, row // queries % heads, row // (queries * heads)
    at_out = ((batch * queries + query) * heads + head) * HEAD_DIM
    lanes = tl.arange(0, PARTS).to(tl.int64)
    dims = tl.arange(0, DIMS)
    inside = lanes < parts
    highest = tl.load(highests + lanes * all_rows + row, inside, other=-float("inf"))
    total = tl.load(totals + lanes * all_rows + row, inside, other=0.0)
    now, _, _ = raised(tl.expand_dims(highest, 0), tl.full((1,), -float("inf"), tl.float32), 1.0, NATURAL, False)
    shift = tl.where(now == -float("inf"), 0.0, now)
    factor = weights_of(highest, shift, 1.0, NATURAL)
    stored = inside[:, None] & (dims < HEAD_DIM)[None, :]
    part_sums = tl.load(sums + (lanes * all_rows * HEAD_DIM)[:, None] + at_out + dims[None, :], stored, other=0.0)
    acc = tl.expand_dims(tl.sum(part_sums * factor[:, None], 0), 0)
    one = tl.arange(0, 1)
    store_results(
        acc, now, tl.expand_dims(tl.sum(total * factor, 0), 0), out + at_out + one[:, None] + dims[None, :],
        lse + row + one, one == 0, (one == 0)[:, None] & (dims < HEAD_DIM)[None, :], keep_scale, NATURAL, DROPOUT,
    )  # fmt: skip
