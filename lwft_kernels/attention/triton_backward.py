"""Attention backward in Triton (FlashAttention-2, Dao 2023, algorithm 2; formulas in autograd.py), without atomics.

`attention_statistics_kernel` leaves three numbers of each row; then dQ is summed by programs that own rows
(`attention_queries_kernel`), dK and dV by programs that own keys (`attention_keys_kernel`, for the prefix launched on
its own) and dbias by programs that own a tile of the bias (`attention_bias_kernel`). Each computes S and P anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.attention.triton_kernels import (
    LOG2E,
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
    visible_queries,
    weights_of,
)

# Beyond this, lse = highest + log(total) has lost the total: a whole row biased by the lowest float32.
_TOO_LARGE: tl.constexpr = tl.constexpr(1e5)


# ---- statistics of rows ----
#
# P = exp(S - shift) * factor, dS = P * (Z * dP - delta). As a rule shift is lse, factor 1, and delta
# rowsum(dO * O) - dlse. But what delta is subtracted from is a dP with other rounding errors than those of the rounded
# `out`. Mostly that does not matter; where it does (EXACT), the statistics are taken from all S and dP of the row. So
# they are where lse has lost the total, which only a bias brings about.


@triton.jit
def _observe(
    highest, total, products,  # the rows' state: highest score, sum of weights, sum of weights * Z * dP
    tile_q, tile_grad, k, v, k_stride, v_stride, start, key_end,
    position, row_index, row_inside, dims,
    bias, mask, bias_step, mask_step, seed, first_column, threshold, keep_scale,
    scale, unit, softcap, window,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, COLS)
    inside = (cols >= 0) & (cols < key_end)
    start = tl.full((), 0, tl.int64) + start
    tile_k = load_tile(k + start * k_stride, inside, dims, True, HEAD_DIM, DIMS)
    tile_v = load_tile(v + start * v_stride, inside, dims, True, HEAD_DIM, DIMS)
    product = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
    dweights = tl.dot(tile_grad, tl.trans(tile_v), input_precision="ieee")
    scores, _ = scores_of(
        product, position[:, None], cols[None, :], key_end, row_inside[:, None],
        bias[:, None], mask[:, None], bias_step, mask_step, scale, softcap, window,
        BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, True,
    )  # fmt: skip
    highest, shift, factor = raised(scores, highest, unit, NATURAL, True)
    weights = weights_of(scores, shift[:, None], unit, NATURAL)
    if DROPOUT:
        kept = keep(seed, row_index, first_column + start, threshold, False, ROWS, COLS)
        dweights = tl.where(kept, dweights * keep_scale, 0.0)
    total = total * factor + tl.sum(weights, 1)
    products = products * factor + tl.sum(weights * dweights, 1)
    return highest, total, products


@triton.jit(do_not_specialize=["threshold"])
def attention_statistics_kernel(
    grad_out,  # (B, H, S, D)
    grad_lse,  # (B, H, S) float32
    q, k, v, prefix_k, prefix_v, bias, mask, lengths, seed,  # as in forward
    out,  # (B, H, S, D)
    lse,  # (B, H, S) float32
    shifts, factors, deltas,  # (B, H, S) float32; factors only with BIAS
    batches, kv_heads, queries, keys, prefix,
    grad_batch, grad_head, grad_query, out_batch, out_head, out_query,
    q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    pk_batch, pk_head, pk_key, pv_batch, pv_head, pv_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    scale, unit, softcap, window, threshold, keep_scale,
    GRAD_LSE: tl.constexpr, EXACT: tl.constexpr,
    PREFIX: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PREFIX_COLS: tl.constexpr,
):  # fmt: skip
    row_count = queries * GROUP
    block, batch, kv_head = head_group(tl.cdiv(row_count, ROWS), kv_heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_inside = rows < row_count
    dims = tl.arange(0, DIMS)
    row_index = at_rows(rows, batch, kv_head, GROUP * kv_heads * queries, queries, 1, GROUP)
    at_grad = at_rows(rows, batch, kv_head, grad_batch, grad_head, grad_query, GROUP)
    at_out = at_rows(rows, batch, kv_head, out_batch, out_head, out_query, GROUP)
    tile_grad = load_tile(grad_out + at_grad[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
    tile_out = load_tile(out + at_out[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
    shift = tl.load(lse + row_index, row_inside, other=-float("inf"))
    delta = tl.sum(tile_grad.to(tl.float32) * tile_out.to(tl.float32), 1)
    nothing = shift == -float("inf")
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if not NATURAL:
        shift = shift * LOG2E

    if EXACT or BIAS:
        turns = 1
        if not EXACT:
            lost = row_inside & (tl.abs(shift) > _TOO_LARGE) & (shift != -float("inf"))
            turns = tl.max(lost.to(tl.int32), 0)
        offset = keys - queries
        position = rows // GROUP + offset
        at_q = at_rows(rows, batch, kv_head, q_batch, q_head, q_query, GROUP)
        tile_q = load_tile(q + at_q[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
        bias_rows = bias + at_rows(rows, batch, kv_head, bias_batch, bias_head, bias_query, GROUP)
        mask_rows = mask + at_rows(rows, batch, kv_head, mask_batch, mask_head, mask_query, GROUP)
        highest = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        products = tl.zeros((ROWS,), tl.float32)
        if PREFIX:
            lanes = tl.arange(0, PREFIX_COLS).to(tl.int64)
            k_tile = prefix_k + batch * pk_batch + kv_head * pk_head + lanes[:, None] * pk_key + dims[None, :]
            v_tile = prefix_v + batch * pv_batch + kv_head * pv_head + lanes[:, None] * pv_key + dims[None, :]
            for number in range(tl.cdiv(prefix, PREFIX_COLS) * turns):
                highest, total, products = _observe(
                    highest, total, products, tile_q, tile_grad, k_tile, v_tile, pk_key, pv_key,
                    number * PREFIX_COLS, prefix, position, row_index, row_inside, dims,
                    bias_rows, mask_rows, bias_key, mask_key, seed, 0, threshold, keep_scale,
                    scale, unit, softcap, window,
                    False, False, False, False, SOFTCAP, NATURAL, DROPOUT, HEAD_DIM, DIMS, ROWS, PREFIX_COLS,
                )  # fmt: skip
        lanes = tl.arange(0, COLS).to(tl.int64)
        k_tile = k + batch * k_batch + kv_head * k_head + lanes[:, None] * k_key + dims[None, :]
        v_tile = v + batch * v_batch + kv_head * v_head + lanes[:, None] * v_key + dims[None, :]
        key_end = key_end_of(lengths, batch, keys, LENGTHS)
        last = tl.minimum(block * ROWS + ROWS, row_count) - 1
        begin, _, _, end = visible_keys(
            block * ROWS // GROUP, last // GROUP, offset, key_end, window, CAUSAL, WINDOW
        )  # fmt: skip
        shifted = 0
        if DROPOUT:
            shifted = prefix % 64
        first, _, _, edges = cut(begin, 0, 0, end, shifted, 0, 1, COLS)
        for number in range(edges * turns):
            highest, total, products = _observe(
                highest, total, products, tile_q, tile_grad, k_tile, v_tile, k_key, v_key,
                first + number * COLS, key_end, position, row_index, row_inside, dims,
                bias_rows, mask_rows, bias_key, mask_key, seed, prefix, threshold, keep_scale,
                scale, unit, softcap, window,
                BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, HEAD_DIM, DIMS, ROWS, COLS,
            )  # fmt: skip
        if turns > 0:
            nothing = total == 0.0
            total = tl.where(nothing, 1.0, total)
            factor = 1.0 / total
            delta = products * factor
            shift = highest
            if not NATURAL:
                shift = highest + tl.log2(total)
            elif not BIAS:
                shift = highest + tl.log(total)

    if GRAD_LSE:
        delta -= tl.load(grad_lse + row_index, row_inside, other=0.0)
    # a row that sees nothing: P = exp(-inf) = 0
    tl.store(shifts + row_index, tl.where(nothing, float("inf"), shift), row_inside)
    tl.store(deltas + row_index, tl.where(nothing, 0.0, delta), row_inside)
    if BIAS:
        tl.store(factors + row_index, factor, row_inside)


# ---- a tile ----


@triton.jit
def _score_gradients(
    product, dweights,  # q.k and dO.v, float32; what follows broadcasts with them
    shift, factor, delta, kept,  # statistics of the rows; which weights dropout keeps
    position, cols, key_end, row_inside, bias, mask, bias_step, mask_step, scale, unit, softcap, window, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, FACTOR: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """P * Z but for keep_scale, dS, and dR but for scale."""
    scores, slope = scores_of(
        product, position, cols, key_end, row_inside, bias, mask, bias_step, mask_step, scale, softcap, window,
        BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, EDGE,
    )  # fmt: skip
    weights = weights_of(scores, shift, unit, NATURAL)
    if FACTOR:
        weights = weights * factor
    dropped = weights
    if DROPOUT:
        dropped = tl.where(kept, weights, 0.0)
        dweights = tl.where(kept, dweights * keep_scale, 0.0)
    dscores = weights * (dweights - delta)
    dproduct = dscores
    if SOFTCAP:
        dproduct = dscores * slope
    return dropped, dscores, dproduct


@triton.jit
def _load_statistics(shifts, factors, deltas, row_index, row_inside, FACTOR: tl.constexpr):
    """Of rows that are none: P = 0, so that they add nothing to any sum."""
    shift = tl.load(shifts + row_index, row_inside, other=float("inf"))
    delta = tl.load(deltas + row_index, row_inside, other=0.0)
    factor = delta
    if FACTOR:
        factor = tl.load(factors + row_index, row_inside, other=0.0)
    return shift, factor, delta


# ---- dQ ----


@triton.jit
def _add_dq(
    dq, tile_q, tile_grad, k, v, k_stride, v_stride, start, key_end,
    shift, factor, delta, position, row_index, row_inside, dims,
    bias, mask, bias_step, mask_step, seed, first_column, threshold, keep_scale, scale, unit, softcap, window,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, FACTOR: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dq + dR K over one tile of keys."""
    cols = start + tl.arange(0, COLS)
    inside = (cols >= 0) & (cols < key_end)
    start = tl.full((), 0, tl.int64) + start
    tile_k = load_tile(k + start * k_stride, inside, dims, EDGE, HEAD_DIM, DIMS)
    tile_v = load_tile(v + start * v_stride, inside, dims, EDGE, HEAD_DIM, DIMS)
    product = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
    dweights = tl.dot(tile_grad, tl.trans(tile_v), input_precision="ieee")
    kept = row_inside[:, None]
    if DROPOUT:
        kept = keep(seed, row_index, first_column + start, threshold, False, ROWS, COLS)
    _, _, dproduct = _score_gradients(
        product, dweights, shift[:, None], factor[:, None], delta[:, None], kept,
        position[:, None], cols[None, :], key_end, row_inside[:, None], bias[:, None], mask[:, None],
        bias_step, mask_step, scale, unit, softcap, window, keep_scale,
        BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, FACTOR, DROPOUT, EDGE,
    )  # fmt: skip
    return tl.dot(dproduct.to(tile_k.dtype), tile_k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["threshold"])
def attention_queries_kernel(
    grad_out, q, k, v, prefix_k, prefix_v, bias, mask, lengths, seed,
    shifts, factors, deltas,
    dq,  # (B, S, H, D)
    kv_heads, queries, keys, prefix,
    grad_batch, grad_head, grad_query,
    q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    pk_batch, pk_head, pk_key, pv_batch, pv_head, pv_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    scale, unit, softcap, window, threshold, keep_scale,
    PREFIX: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PREFIX_COLS: tl.constexpr,
):  # fmt: skip
    row_count = queries * GROUP
    blocks = tl.cdiv(row_count, ROWS)
    block, batch, kv_head = head_group(blocks, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block  # the longest programs begin first
    rows = block * ROWS + tl.arange(0, ROWS)
    row_inside = rows < row_count
    dims = tl.arange(0, DIMS)
    offset = keys - queries
    position = rows // GROUP + offset
    row_index = at_rows(rows, batch, kv_head, GROUP * kv_heads * queries, queries, 1, GROUP)
    at_q = at_rows(rows, batch, kv_head, q_batch, q_head, q_query, GROUP)
    at_grad = at_rows(rows, batch, kv_head, grad_batch, grad_head, grad_query, GROUP)
    tile_q = load_tile(q + at_q[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
    tile_grad = load_tile(grad_out + at_grad[:, None] + dims[None, :], row_inside, dims, True, HEAD_DIM, DIMS)
    bias_rows = bias + at_rows(rows, batch, kv_head, bias_batch, bias_head, bias_query, GROUP)
    mask_rows = mask + at_rows(rows, batch, kv_head, mask_batch, mask_head, mask_query, GROUP)
    shift, factor, delta = _load_statistics(shifts, factors, deltas, row_index, row_inside, BIAS)

    acc = tl.zeros((ROWS, DIMS), tl.float32)
    if PREFIX:
        lanes = tl.arange(0, PREFIX_COLS).to(tl.int64)
        k_tile = prefix_k + batch * pk_batch + kv_head * pk_head + lanes[:, None] * pk_key + dims[None, :]
        v_tile = prefix_v + batch * pv_batch + kv_head * pv_head + lanes[:, None] * pv_key + dims[None, :]
        for number in range(tl.cdiv(prefix, PREFIX_COLS)):
            acc = _add_dq(
                acc, tile_q, tile_grad, k_tile, v_tile, pk_key, pv_key, number * PREFIX_COLS, prefix,
                shift, factor, delta, position, row_index, row_inside, dims,
                bias_rows, mask_rows, bias_key, mask_key, seed, 0, threshold, keep_scale, scale, unit, softcap, window,
                False, False, False, False, SOFTCAP, NATURAL, BIAS, DROPOUT, True,
                HEAD_DIM, DIMS, ROWS, PREFIX_COLS,
            )  # fmt: skip
    lanes = tl.arange(0, COLS).to(tl.int64)
    k_tile = k + batch * k_batch + kv_head * k_head + lanes[:, None] * k_key + dims[None, :]
    v_tile = v + batch * v_batch + kv_head * v_head + lanes[:, None] * v_key + dims[None, :]
    key_end = key_end_of(lengths, batch, keys, LENGTHS)
    last = tl.minimum(block * ROWS + ROWS, row_count) - 1
    begin, full_begin, full_end, end = visible_keys(
        block * ROWS // GROUP, last // GROUP, offset, key_end, window, CAUSAL, WINDOW
    )  # fmt: skip
    shifted = 0
    if DROPOUT:
        shifted = prefix % 64
    first, full_first, full_end, edges = cut(begin, full_begin, full_end, end, shifted, 0, 1, COLS)
    for start in range(full_first, full_end, COLS):
        acc = _add_dq(
            acc, tile_q, tile_grad, k_tile, v_tile, k_key, v_key, start, key_end,
            shift, factor, delta, position, row_index, row_inside, dims,
            bias_rows, mask_rows, bias_key, mask_key, seed, prefix, threshold, keep_scale, scale, unit, softcap, window,
            BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, BIAS, DROPOUT, False, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip
    for number in range(edges):
        acc = _add_dq(
            acc, tile_q, tile_grad, k_tile, v_tile, k_key, v_key,
            edge_start(number, first, full_first, full_end, COLS), key_end,
            shift, factor, delta, position, row_index, row_inside, dims,
            bias_rows, mask_rows, bias_key, mask_key, seed, prefix, threshold, keep_scale, scale, unit, softcap, window,
            BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, BIAS, DROPOUT, True, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip

    heads = kv_heads * GROUP
    at_dq = at_rows(rows, batch, kv_head, heads * queries * HEAD_DIM, HEAD_DIM, heads * HEAD_DIM, GROUP)
    stored = row_inside[:, None]
    if HEAD_DIM < DIMS:
        stored = stored & (dims < HEAD_DIM)[None, :]
    tl.store(dq + at_dq[:, None] + dims[None, :], (acc * scale).to(dq.dtype.element_ty), stored)


# ---- dK, dV ----


@triton.jit
def _add_dk_dv(
    dk, dv, tile_k, tile_v, q, grad_out, q_batch, q_head, q_query, grad_batch, grad_head, grad_query,
    start, row_count, batch, kv_head, kv_heads, queries, offset,
    shifts, factors, deltas, cols, key_end, dims,
    bias, mask, bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    seed, first_column, threshold, keep_scale, scale, unit, softcap, window,
    DK: tl.constexpr, DV: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, FACTOR: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dk + dR^T Q and dv + (P * Z)^T dO over one tile of rows, whose scores stand here as (COLS, ROWS)."""
    rows = start + tl.arange(0, ROWS)
    row_inside = rows < row_count
    row_index = at_rows(rows, batch, kv_head, GROUP * kv_heads * queries, queries, 1, GROUP)
    at_q = at_rows(rows, batch, kv_head, q_batch, q_head, q_query, GROUP)
    at_grad = at_rows(rows, batch, kv_head, grad_batch, grad_head, grad_query, GROUP)
    tile_q = load_tile(q + at_q[:, None] + dims[None, :], row_inside, dims, EDGE, HEAD_DIM, DIMS)
    tile_grad = load_tile(grad_out + at_grad[:, None] + dims[None, :], row_inside, dims, EDGE, HEAD_DIM, DIMS)
    shift, factor, delta = _load_statistics(shifts, factors, deltas, row_index, row_inside, FACTOR)
    bias_rows = bias + at_rows(rows, batch, kv_head, bias_batch, bias_head, bias_query, GROUP)
    mask_rows = mask + at_rows(rows, batch, kv_head, mask_batch, mask_head, mask_query, GROUP)
    product = tl.dot(tile_k, tl.trans(tile_q), input_precision="ieee")
    dweights = product
    if DK:
        dweights = tl.dot(tile_v, tl.trans(tile_grad), input_precision="ieee")
    kept = row_inside[None, :]
    if DROPOUT:
        kept = keep(seed, row_index, first_column, threshold, True, ROWS, COLS)
    position = rows // GROUP + offset
    dropped, _, dproduct = _score_gradients(
        product, dweights, shift[None, :], factor[None, :], delta[None, :], kept,
        position[None, :], cols[:, None], key_end, row_inside[None, :], bias_rows[None, :], mask_rows[None, :],
        bias_key, mask_key, scale, unit, softcap, window, keep_scale,
        BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, FACTOR, DROPOUT, EDGE,
    )  # fmt: skip
    if DV:
        dv = tl.dot(dropped.to(tile_grad.dtype), tile_grad, dv, input_precision="ieee")
    if DK:
        dk = tl.dot(dproduct.to(tile_q.dtype), tile_q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["threshold"])
def attention_keys_kernel(
    grad_out, q,  # (B, H, S, D)
    k, v,  # (B, Hkv, L, D)
    bias, mask, lengths, seed, shifts, factors, deltas,
    dk, dv,  # (parts, B, Hkv, L, D) by strides; float32 where there are parts to be summed
    kv_heads, queries, keys, first_column,
    grad_batch, grad_head, grad_query,
    q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    d_part, d_batch, d_head, d_key,
    scale, unit, softcap, window, threshold, keep_scale,
    DK: tl.constexpr, DV: tl.constexpr, FACTOR: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """first_column: of key 0 in the random stream."""
    shifted = 0
    if DROPOUT:
        shifted = first_column % 64
    block, batch, kv_head = head_group(tl.cdiv(keys + shifted, COLS), kv_heads)
    part, parts = tl.program_id(1), tl.num_programs(1)
    start = block * COLS - shifted
    cols = start + tl.arange(0, COLS)
    key_end = key_end_of(lengths, batch, keys, LENGTHS)
    inside = (cols >= 0) & (cols < key_end)
    dims = tl.arange(0, DIMS)
    wide = cols.to(tl.int64)[:, None]
    k_tile = k + batch * k_batch + kv_head * k_head + wide * k_key + dims[None, :]
    v_tile = v + batch * v_batch + kv_head * v_head + wide * v_key + dims[None, :]
    tile_k = load_tile(k_tile, inside, dims, True, HEAD_DIM, DIMS)
    tile_v = load_tile(v_tile, inside, dims, True, HEAD_DIM, DIMS)

    # The rows that see any of these keys; those that see all of them, if all of them are keys.
    offset = keys - queries
    row_count = queries * GROUP
    first_key, last_key = tl.maximum(start, 0), tl.minimum(start + COLS, key_end) - 1
    begin, full_begin, full_end, end = visible_queries(first_key, last_key, offset, queries, window, CAUSAL, WINDOW)
    end = tl.where(last_key < first_key, 0, end)
    full_end = tl.where((start < 0) | (start + COLS > key_end), 0, full_end)
    first, full_first, full_end, edges = cut(
        begin * GROUP, full_begin * GROUP, full_end * GROUP, end * GROUP, 0, part, parts, ROWS
    )  # fmt: skip

    dk_acc = tl.zeros((COLS, DIMS), tl.float32)
    dv_acc = tl.zeros((COLS, DIMS), tl.float32)
    for row in range(full_first, full_end, ROWS):
        dk_acc, dv_acc = _add_dk_dv(
            dk_acc, dv_acc, tile_k, tile_v, q, grad_out,
            q_batch, q_head, q_query, grad_batch, grad_head, grad_query,
            row, row_count, batch, kv_head, kv_heads, queries, offset, shifts, factors, deltas, cols, key_end, dims,
            bias, mask, bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
            seed, first_column + start, threshold, keep_scale, scale, unit, softcap, window,
            DK, DV, BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, FACTOR, DROPOUT, False,
            GROUP, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip
    for number in range(edges):
        dk_acc, dv_acc = _add_dk_dv(
            dk_acc, dv_acc, tile_k, tile_v, q, grad_out,
            q_batch, q_head, q_query, grad_batch, grad_head, grad_query,
            edge_start(number, first, full_first, full_end, ROWS),
            row_count, batch, kv_head, kv_heads, queries, offset, shifts, factors, deltas, cols, key_end, dims,
            bias, mask, bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
            seed, first_column + start, threshold, keep_scale, scale, unit, softcap, window,
            DK, DV, BIAS, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, FACTOR, DROPOUT, True,
            GROUP, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip

    stored = ((cols >= 0) & (cols < keys))[:, None]
    if HEAD_DIM < DIMS:
        stored = stored & (dims < HEAD_DIM)[None, :]
    at = part.to(tl.int64) * d_part + batch * d_batch + kv_head * d_head + wide * d_key + dims[None, :]
    if DK:
        tl.store(dk + at, (dk_acc * scale).to(dk.dtype.element_ty), stored)
    if DV:
        if DROPOUT:
            dv_acc = dv_acc * keep_scale
        tl.store(dv + at, dv_acc.to(dv.dtype.element_ty), stored)


# ---- dbias ----


@triton.jit
def _bias_tile(
    acc, turn, batch, head, row_block, col_block, row_blocks, col_blocks, heads,
    grad_out, q, k, v, bias, mask, lengths, seed, shifts, factors, deltas, all_heads, queries, keys, prefix, shifted,
    grad_batch, grad_head, grad_query, q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    scale, unit, softcap, window, threshold, keep_scale,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """acc + dS of tile `turn` among the (batches, heads, row_blocks, col_blocks) from (batch, head, ...) on."""
    wide_turn = tl.full((), 0, tl.int64) + turn
    tile = (wide_turn % (row_blocks * col_blocks)).to(tl.int32)
    member = wide_turn // (row_blocks * col_blocks)
    batch, head = batch + member // heads, head + member % heads
    rows = (row_block + tile // col_blocks) * ROWS + tl.arange(0, ROWS)
    start = (col_block + tile % col_blocks) * COLS - shifted
    cols = start + tl.arange(0, COLS)
    row_inside = rows < queries
    key_end = key_end_of(lengths, batch, keys, LENGTHS)
    inside = (cols >= 0) & (cols < key_end)
    dims = tl.arange(0, DIMS)
    kv_head = head // GROUP
    wide = cols.to(tl.int64)[:, None]
    at_q = at_rows(rows, batch, head, q_batch, q_head, q_query, 1)
    at_grad = at_rows(rows, batch, head, grad_batch, grad_head, grad_query, 1)
    k_tile = k + batch * k_batch + kv_head * k_head + wide * k_key + dims[None, :]
    v_tile = v + batch * v_batch + kv_head * v_head + wide * v_key + dims[None, :]
    tile_q = load_tile(q + at_q[:, None] + dims[None, :], row_inside, dims, EDGE, HEAD_DIM, DIMS)
    tile_k = load_tile(k_tile, inside, dims, EDGE, HEAD_DIM, DIMS)
    tile_grad = load_tile(grad_out + at_grad[:, None] + dims[None, :], row_inside, dims, EDGE, HEAD_DIM, DIMS)
    tile_v = load_tile(v_tile, inside, dims, EDGE, HEAD_DIM, DIMS)
    product = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
    dweights = tl.dot(tile_grad, tl.trans(tile_v), input_precision="ieee")
    row_index = at_rows(rows, batch, head, all_heads * queries, queries, 1, 1)
    shift, factor, delta = _load_statistics(shifts, factors, deltas, row_index, row_inside, True)
    bias_rows = bias + at_rows(rows, batch, head, bias_batch, bias_head, bias_query, 1)
    mask_rows = mask + at_rows(rows, batch, head, mask_batch, mask_head, mask_query, 1)
    kept = row_inside[:, None]
    if DROPOUT:
        kept = keep(seed, row_index, prefix + start, threshold, False, ROWS, COLS)
    _, dscores, _ = _score_gradients(
        product, dweights, shift[:, None], factor[:, None], delta[:, None], kept,
        (rows + keys - queries)[:, None], cols[None, :], key_end, row_inside[:, None],
        bias_rows[:, None], mask_rows[:, None], bias_key, mask_key, scale, unit, softcap, window, keep_scale,
        True, MASK, CAUSAL, WINDOW, SOFTCAP, NATURAL, True, DROPOUT, EDGE,
    )  # fmt: skip
    return acc + dscores


@triton.jit(do_not_specialize=["threshold"])
def attention_bias_kernel(
    grad_out, q, k, v, bias, mask, lengths, seed, shifts, factors, deltas,
    dbias,  # (parts, bias's own sizes); float32 where there are parts to be summed
    batches, all_heads, queries, keys, prefix, size, matrix_size,  # elements of bias, and of its last two dimensions
    grad_batch, grad_head, grad_query, q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    scale, unit, softcap, window, threshold, keep_scale,
    OWN_BATCH: tl.constexpr, OWN_HEAD: tl.constexpr, OWN_ROWS: tl.constexpr, OWN_COLS: tl.constexpr,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: the sum of dS over the dimensions that bias is broadcast over, those which are not OWN.

    The tiles of such a dimension are taken in turn; along rows and columns they are summed once more at the end.
    """
    shifted = 0
    if DROPOUT:
        shifted = prefix % 64
    row_blocks, col_blocks = tl.cdiv(queries, ROWS), tl.cdiv(keys + shifted, COLS)
    program = tl.program_id(0)
    batch, head, row_block, col_block = program * 0, program * 0, program * 0, program * 0
    if OWN_COLS:
        col_block = program % col_blocks
        program = program // col_blocks
    if OWN_ROWS:
        row_block = program % row_blocks
        program = program // row_blocks
    if OWN_HEAD:
        head = program % all_heads
        program = program // all_heads
    if OWN_BATCH:
        batch = program
    members, heads = program * 0 + 1, program * 0 + 1
    if not OWN_HEAD:
        heads = members * all_heads
        members = members * all_heads
    if not OWN_BATCH:
        members = members * batches

    # Only tiles where some row sees some key; sequences differ in `lengths`, which the tile looks at.
    offset = keys - queries
    first_row, first_col = row_block * ROWS, col_block * COLS - shifted
    last_row = tl.minimum(first_row + ROWS, queries) - 1
    full_tiles = program * 0
    if OWN_ROWS:
        begin, full_begin, full_end, end = visible_keys(
            first_row, last_row, offset, program * 0 + keys, window, CAUSAL, WINDOW
        )  # fmt: skip
        row_blocks = program * 0 + 1
        if OWN_COLS:
            seen = (first_col < end) & (first_col + COLS > begin)
            col_blocks = seen.to(tl.int32)
            if not LENGTHS:
                full = (first_row + ROWS <= queries) & (first_col >= full_begin) & (first_col + COLS <= full_end)
                full_tiles = (full & (first_col >= 0)).to(tl.int32)
        else:
            first, _, _, col_blocks = cut(begin, 0, 0, end, shifted, 0, 1, COLS)
            col_block = (first + shifted) // COLS
    elif OWN_COLS:
        begin, _, _, end = visible_queries(
            tl.maximum(first_col, 0), tl.minimum(first_col + COLS, keys) - 1, offset, queries, window, CAUSAL, WINDOW
        )  # fmt: skip
        first, _, _, row_blocks = cut(begin, 0, 0, end, 0, 0, 1, ROWS)
        row_block = first // ROWS
        col_blocks = program * 0 + 1

    turns = members * row_blocks * col_blocks
    chunk = tl.cdiv(turns, tl.num_programs(1))
    first_turn = tl.minimum(tl.program_id(1) * chunk, turns)
    end_turn = tl.minimum(first_turn + chunk, turns)
    edge_turn = tl.where(full_tiles > 0, end_turn, first_turn)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for turn in range(first_turn, edge_turn):
        acc = _bias_tile(
            acc, turn, batch, head, row_block, col_block, row_blocks, col_blocks, heads,
            grad_out, q, k, v, bias, mask, lengths, seed, shifts, factors, deltas,
            all_heads, queries, keys, prefix, shifted,
            grad_batch, grad_head, grad_query, q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
            bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
            scale, unit, softcap, window, threshold, keep_scale,
            MASK, LENGTHS, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, False, GROUP, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip
    for turn in range(edge_turn, end_turn):
        acc = _bias_tile(
            acc, turn, batch, head, row_block, col_block, row_blocks, col_blocks, heads,
            grad_out, q, k, v, bias, mask, lengths, seed, shifts, factors, deltas,
            all_heads, queries, keys, prefix, shifted,
            grad_batch, grad_head, grad_query, q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key,
            bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
            scale, unit, softcap, window, threshold, keep_scale,
            MASK, LENGTHS, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, True, GROUP, HEAD_DIM, DIMS, ROWS, COLS,
        )  # fmt: skip

    matrix = batch.to(tl.int64)
    if OWN_HEAD:
        matrix = matrix * all_heads + head
    at = tl.program_id(1).to(tl.int64) * size + matrix * matrix_size
    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    row_inside, col_inside = rows < queries, (cols >= 0) & (cols < keys)
    out_type = dbias.dtype.element_ty
    if OWN_ROWS and OWN_COLS:
        to = dbias + at + rows.to(tl.int64)[:, None] * keys + cols[None, :]
        tl.store(to, acc.to(out_type), row_inside[:, None] & col_inside[None, :])
    elif OWN_ROWS:
        tl.store(dbias + at + rows, tl.sum(acc, 1).to(out_type), row_inside)
    elif OWN_COLS:
        tl.store(dbias + at + cols, tl.sum(acc, 0).to(out_type), col_inside)
    else:
        tl.store(dbias + at, tl.sum(tl.sum(acc, 1), 0).to(out_type))
