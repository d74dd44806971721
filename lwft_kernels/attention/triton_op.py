"""``lwft::attention_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lwft_kernels.attention import triton_tiles
from lwft_kernels.attention.autograd import empty_by_token
from lwft_kernels.attention.triton_backward import (
    attention_bias_kernel,
    attention_keys_kernel,
    attention_queries_kernel,
    attention_statistics_kernel,
)
from lwft_kernels.attention.triton_forward import attention_forward_kernel, attention_merge_kernel
from lwft_kernels.triton.cards import Card, card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.reduction import reduced
from lwft_kernels.triton.tuning import Configuration, size_band

_MERGE = (Configuration({}, num_warps=4),)
# Rows of a group of heads (queries times the heads that share a key head) that are few: less than the smallest tile
# that the matrix units of a Hopper card work on at their full rate.
_FEW_ROWS = 16
_FEWEST_KEYS_OF_A_PART = 512
_MOST_PARTS = 64
_FEWEST_ROWS_OF_A_PART = 512
_FEW_KEYS = 32


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernels walk along the last dimension with stride 1; a tensor of any other is copied."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides, 0 for a dimension of one element, so that it broadcasts."""
    if tensor is None:
        return (0,) * count
    return tuple(0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(count))


@dataclass(frozen=True)
class _Call:
    """The arguments that forward and backward have in common, as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    scale: float
    causal: bool
    window: int
    softcap: float
    dropout_p: float

    @property
    def prefix(self) -> int:
        return 0 if self.prefix_k is None else self.prefix_k.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def groups(self) -> int:
        """Pairs of a sequence and a key head."""
        return self.q.shape[0] * self.k.shape[1]

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.group * self.q.shape[2]

    @property
    def dims(self) -> int:
        return max(16, int(triton.next_power_of_2(self.q.shape[3])))

    @property
    def precision(self) -> str:
        """Of products of float32. NVIDIA's matrix units take their 11 leading bits, or in three products nearly all.

        Without matrix units a tile would spill: its product would be written out element by element.
        """
        return "tf32x3" if card_of(self.q.device).maker == "cuda" else "ieee"

    @property
    def band(self) -> tuple[Any, ...]:
        """What the best configuration depends on."""
        return (
            self.q.dtype, self.q.shape[3], self.group, size_band(self.groups), size_band(self.rows),
            size_band(self.k.shape[2]), size_band(self.prefix), self.bias is not None, self.mask is not None,
            self.causal, self.window > 0, self.softcap > 0, self.dropout_p > 0,
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v, prefix_k, prefix_v, bias, mask, lengths, seed: where there is none, one that nobody reads."""
        return (
            self.q, self.k, self.v,
            self.k if self.prefix_k is None else self.prefix_k, self.v if self.prefix_v is None else self.prefix_v,
            self.q if self.bias is None else self.bias, self.q if self.mask is None else self.mask,
            self.q if self.lengths is None else self.lengths, seed_or(self.seed, self.q),
        )  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        """3 of each of q, k, v, prefix_k, prefix_v, 4 of bias and of mask."""
        tensors = (self.q, self.k, self.v, self.prefix_k, self.prefix_v)
        return (*(stride for t in tensors for stride in _strides(t, 3)),
                *_strides(self.bias, 4), *_strides(self.mask, 4))  # fmt: skip

    def scores(self, prefix: bool = False) -> dict[str, Any]:
        """The compile-time arguments that say how a score comes about; those of `prefix` keys no rule hides."""
        return {
            "BIAS": self.bias is not None and not prefix,
            "MASK": self.mask is not None and not prefix,
            "LENGTHS": self.lengths is not None and not prefix,
            "CAUSAL": self.causal and not prefix,
            "WINDOW": self.window > 0 and not prefix,
            "SOFTCAP": self.softcap > 0,
            "NATURAL": self.bias is not None or self.softcap > 0 or not self.scale > 0,
            "PRECISION": self.precision,
            "DROPOUT": self.seed is not None,
            "GROUP": self.group,
            "HEAD_DIM": self.q.shape[3],
            "DIMS": self.dims,
        }

    def rule(self) -> tuple[float, float, float, int]:
        """scale, unit, softcap, window"""
        # a window of all keys says no less, and more might not fit 32 bits
        window = min(self.window, self.q.shape[2] + self.k.shape[2])
        return self.scale, self.scale * math.log2(math.e), self.softcap, window


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    *rule: Any,
) -> _Call:
    if prefix_k is not None and prefix_k.shape[2] == 0:
        prefix_k = prefix_v = None
    return _Call(
        _unit_stride(q), _unit_stride(k), _unit_stride(v), bias, None if mask is None else mask.view(torch.uint8),
        None if prefix_k is None else _unit_stride(prefix_k), None if prefix_v is None else _unit_stride(prefix_v),
        None if lengths is None else lengths.contiguous(), seed, *rule,
    )  # fmt: skip


def _candidates(kernel: str, call: _Call, card: Card) -> tuple[Configuration, ...]:
    return triton_tiles.candidates(
        kernel, card, call.q.dtype, call.dims, few_rows=call.rows <= _FEW_ROWS,
        laden=call.bias is not None or call.mask is not None or call.softcap > 0 or call.seed is not None,
        prefix=call.prefix,
    )  # fmt: skip


def _parts(call: _Call, card: Card, rows: int) -> int:
    """Into how many parts the keys are cut, so that there is a program for each multiprocessor."""
    programs = int(triton.cdiv(call.rows, rows)) * call.groups
    wanted = card.multiprocessors // max(programs, 1)
    return max(1, min(wanted, (call.k.shape[2] + call.prefix) // _FEWEST_KEYS_OF_A_PART, _MOST_PARTS))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    call = _call(
        q, k, v, bias, mask, prefix_k, prefix_v, lengths, seed, scale, causal, window, softcap, dropout_p
    )  # fmt: skip
    card = card_of(q.device)
    batch, heads, queries, head_dim = q.shape
    candidates = _candidates("forward", call, card)
    parts = _parts(call, card, max(c.blocks["ROWS"] for c in candidates))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    sums, highests, totals = out, lse, lse
    if parts > 1:
        sums = q.new_empty((parts, *out.shape), dtype=torch.float32)
        highests, totals = (q.new_empty((parts, *lse.shape), dtype=torch.float32) for _ in range(2))
    launch(
        attention_forward_kernel,
        *call.tensors(), sums, highests, totals,
        batch, k.shape[1], queries, k.shape[2], call.prefix,
        *call.strides(), *call.rule(), threshold, keep_scale,
        PREFIX=call.prefix > 0, SPLIT=parts > 1, **call.scores(),
        grid=lambda c: (triton.cdiv(call.rows, c.blocks["ROWS"]) * call.groups, parts),
        candidates=candidates, band=call.band,
    )  # fmt: skip
    if parts > 1:
        launch(
            attention_merge_kernel,
            sums, highests, totals, out, lse, heads, queries, parts, lse.numel(), keep_scale,
            NATURAL=call.scores()["NATURAL"], DROPOUT=seed is not None, HEAD_DIM=head_dim, DIMS=call.dims,
            PARTS=triton.next_power_of_2(parts), grid=lambda _: (lse.numel(),), candidates=_MERGE,
        )  # fmt: skip
    return out, lse


# ---- backward ----


@dataclass(frozen=True)
class _Gradient:
    """What all kernels of backward take beside the call."""

    call: _Call
    grad_out: Tensor
    shift: Tensor
    factor: Tensor
    delta: Tensor

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.shift, self.factor, self.delta


def _exact(call: _Call, bias_wanted: bool) -> bool:
    """Whether the statistics of rows are taken from all their scores.

    Few rows: cheap, and one row weighs much. Few keys: every one weighs much. A bias that is the same for all keys: the
    sum of dS over them all is a difference of equals.
    """
    same = bias_wanted and call.bias is not None and call.bias.shape[3] == 1
    return same or call.rows <= _FEW_ROWS or call.prefix + call.k.shape[2] <= _FEW_KEYS


def _statistics(
    call: _Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_wanted: bool
) -> _Gradient:
    q = call.q
    shift, delta = (q.new_empty(lse.shape, dtype=torch.float32) for _ in range(2))
    factor = shift if call.bias is None else q.new_empty(lse.shape, dtype=torch.float32)
    out = _unit_stride(out)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    launch(
        attention_statistics_kernel,
        grad_out, lse if grad_lse is None else grad_lse.contiguous(), *call.tensors(), out, lse.contiguous(),
        shift, factor, delta,
        q.shape[0], call.k.shape[1], q.shape[2], call.k.shape[2], call.prefix,
        *_strides(grad_out, 3), *_strides(out, 3), *call.strides(), *call.rule(), threshold, keep_scale,
        GRAD_LSE=grad_lse is not None, EXACT=_exact(call, bias_wanted), PREFIX=call.prefix > 0, **call.scores(),
        grid=lambda c: (triton.cdiv(call.rows, c.blocks["ROWS"]) * call.groups,),
        candidates=_candidates("statistics", call, card_of(q.device)), band=call.band,
    )  # fmt: skip
    return _Gradient(call, grad_out, shift, factor, delta)


def _queries(gradient: _Gradient) -> Tensor:
    call = gradient.call
    dq = empty_by_token(call.q)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    launch(
        attention_queries_kernel,
        gradient.grad_out, *call.tensors(), *gradient.statistics, dq,
        call.k.shape[1], call.q.shape[2], call.k.shape[2], call.prefix,
        *_strides(gradient.grad_out, 3), *call.strides(), *call.rule(), threshold, keep_scale,
        PREFIX=call.prefix > 0, **call.scores(),
        grid=lambda c: (triton.cdiv(call.rows, c.blocks["ROWS"]) * call.groups,),
        candidates=_candidates("queries", call, card_of(call.q.device)), band=call.band,
    )  # fmt: skip
    return dq


def _keys(gradient: _Gradient, prefix: bool, needs: int) -> tuple[Tensor, Tensor]:
    """dk and dv, or those of the prefix; `needs` has a bit for each.

    Few keys are few programs; then each block of keys has several, with a part of the rows each.
    """
    call = gradient.call
    k, v = (call.prefix_k, call.prefix_v) if prefix else (call.k, call.v)
    assert k is not None and v is not None
    empty = k.new_empty(0)
    if needs == 0:
        return empty, empty
    batch, kv_heads, keys, head_dim = call.q.shape[0], *k.shape[1:]
    by_token = not prefix
    sizes = (batch, keys, kv_heads, head_dim) if by_token else (batch, kv_heads, keys, head_dim)
    summed = prefix and k.shape[0] == 1 and batch > 1
    card = card_of(k.device)
    candidates = _candidates("keys", call, card)
    programs = triton.cdiv(keys, max(c.blocks["COLS"] for c in candidates)) * call.groups
    most = triton.cdiv(call.rows, _FEWEST_ROWS_OF_A_PART)
    parts = max(1, min(2 * card.multiprocessors // max(programs, 1), most))
    dtype = torch.float32 if summed or parts > 1 else k.dtype
    dk, dv = (k.new_empty((parts, *sizes) if needs >> bit & 1 else (0,), dtype=dtype) for bit in (0, 1))
    step = (head_dim, kv_heads * head_dim) if by_token else (keys * head_dim, head_dim)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    if keys > 0 and call.groups > 0:
        first_column = 0 if prefix else call.prefix
        shifted = first_column % 64 if call.seed is not None else 0
        launch(
            attention_keys_kernel,
            gradient.grad_out, call.q, k, v, *call.tensors()[5:], *gradient.statistics, dk, dv,
            kv_heads, call.q.shape[2], keys, first_column,
            *_strides(gradient.grad_out, 3), *_strides(call.q, 3), *_strides(k, 3), *_strides(v, 3),
            *call.strides()[15:], batch * kv_heads * keys * head_dim, kv_heads * keys * head_dim, *step,
            *call.rule(), threshold, keep_scale,
            DK=bool(needs & 1), DV=bool(needs & 2), FACTOR=call.bias is not None, **call.scores(prefix),
            grid=lambda c: (triton.cdiv(keys + shifted, c.blocks["COLS"]) * call.groups, parts),
            candidates=candidates, band=(*call.band, prefix),
        )  # fmt: skip

    def result(bit: int, parts: Tensor) -> Tensor:
        if not needs >> bit & 1:
            return empty
        shape = (1, *sizes[1:]) if summed else sizes
        size = math.prod(shape)
        if parts.dtype != k.dtype or parts.shape[0] > 1 or summed:
            parts = reduced(parts.view(-1, size) if size > 0 else parts.view(0, 0), shape, k.dtype)
        found = parts.view(shape)
        return found.transpose(1, 2) if by_token else found

    return result(0, dk), result(1, dv)


def _bias(gradient: _Gradient) -> Tensor:
    call = gradient.call
    q, k, bias = call.q, call.k, call.bias
    assert bias is not None
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    full = (batch, heads, queries, keys)
    own = [size == want for size, want in zip(bias.shape, full, strict=True)]
    if bias.numel() == 0:
        return bias.new_empty(bias.shape)
    if keys == 0:
        return bias.new_zeros(bias.shape)
    card = card_of(q.device)
    candidates = _candidates("bias", call, card)
    shifted = call.prefix % 64 if call.seed is not None else 0

    def blocks(c: Configuration) -> tuple[int, int, int, int]:
        return batch, heads, triton.cdiv(queries, c.blocks["ROWS"]), triton.cdiv(keys + shifted, c.blocks["COLS"])

    def programs(c: Configuration, owned: bool = True) -> int:
        return math.prod(count for count, mine in zip(blocks(c), own, strict=True) if mine == owned)

    first = candidates[0]
    parts = max(1, min(2 * card.multiprocessors // programs(first), programs(first, owned=False)))
    dbias = bias.new_empty((parts, *bias.shape), dtype=torch.float32 if parts > 1 else bias.dtype)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    flags = {name: flag for name, flag in call.scores().items() if name != "BIAS"}
    launch(
        attention_bias_kernel,
        gradient.grad_out, q, k, call.v, *call.tensors()[5:], *gradient.statistics, dbias,
        batch, heads, queries, keys, call.prefix, bias.numel(), bias.shape[2] * bias.shape[3],
        *_strides(gradient.grad_out, 3), *call.strides()[:9], *call.strides()[15:], *call.rule(),
        threshold, keep_scale,
        OWN_BATCH=own[0], OWN_HEAD=own[1], OWN_ROWS=own[2], OWN_COLS=own[3], **flags,
        grid=lambda c: (programs(c), parts), candidates=candidates, band=(*call.band, *own),
    )  # fmt: skip
    if parts > 1:
        return reduced(dbias.view(parts, -1), tuple(bias.shape), bias.dtype)
    return dbias.view(bias.shape)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _call(
        q, k, v, bias, mask, prefix_k, prefix_v, lengths, seed, scale, causal, window, softcap, dropout_p
    )  # fmt: skip
    bias_wanted = bias is not None and bool(needs & 0b1000)
    if lse.numel() == 0:

        def zeros(bit: int, like: Tensor | None) -> Tensor:
            return q.new_empty(0) if like is None or not needs >> bit & 1 else like.new_zeros(like.shape)

        dk, dv = (empty_by_token(t).zero_() if needs >> bit & 1 else q.new_empty(0) for bit, t in ((1, k), (2, v)))
        dq = empty_by_token(q) if needs & 1 else q.new_empty(0)
        return dq, dk, dv, zeros(3, bias), zeros(4, prefix_k), zeros(5, prefix_v)
    gradient = _statistics(call, _unit_stride(grad_out), grad_lse, out, lse, bias_wanted)
    dq = _queries(gradient) if needs & 1 else q.new_empty(0)
    dk, dv = _keys(gradient, False, needs >> 1 & 0b11)
    dbias = _bias(gradient) if bias_wanted else q.new_empty(0)
    if call.prefix > 0:
        dprefix_k, dprefix_v = _keys(gradient, True, needs >> 4 & 0b11)
    else:  # none, or one of no keys
        dprefix_k, dprefix_v = (
            q.new_empty(0) if t is None or not needs >> bit & 1 else torch.empty_like(t)
            for bit, t in ((4, prefix_k), (5, prefix_v))
        )
    return dq, dk, dv, dbias, dprefix_k, dprefix_v
