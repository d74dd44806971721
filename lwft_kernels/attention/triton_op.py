"""``lwft::attention_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lwft_kernels.attention.triton_forward import attention_forward_kernel, attention_merge_kernel
from lwft_kernels.triton.cards import Card, card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.tuning import Configuration, size_band

# Rows of a group of heads (queries times the heads that share a key head) that are few: less than the smallest tile
# that the matrix units of a Hopper card work on at their full rate.
_FEW_ROWS = 16
_FEWEST_KEYS_OF_A_PART = 512
_MOST_PARTS = 64


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernels walk along the last dimension with stride 1; a tensor of any other is copied."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides, 0 for a dimension of one element, so that it broadcasts."""
    if tensor is None:
        return (0,) * count
    return tuple(0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(count))


def _by_token(like: Tensor) -> Tensor:
    """An empty (B, H, S, D) whose memory is (B, S, H, D), so that the heads are merged without a copy."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


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
        return max(16, triton.next_power_of_2(self.q.shape[3]))

    @property
    def band(self) -> tuple[Any, ...]:
        """What the best configuration depends on."""
        return (
            self.q.dtype, self.q.shape[3], self.group, size_band(self.groups), size_band(self.rows),
            size_band(self.k.shape[2]), size_band(self.prefix), self.bias is not None, self.mask is not None,
            self.causal, self.window > 0, self.softcap > 0, self.dropout_p > 0,
        )  # fmt: skip

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


def _prefix_cols(call: _Call, cols: int) -> int:
    """Keys of a tile of the prefix, which is short as a rule."""
    return min(cols, max(64 if call.seed is not None else 16, triton.next_power_of_2(call.prefix)))


def forward_candidates(call: _Call, card: Card) -> tuple[Configuration, ...]:
    dims, few = call.dims, call.rows <= _FEW_ROWS
    tiles = [(128, 64, 8, 2), (64, 64, 4, 2)]
    if few:
        tiles = [(16, 64, 4, 2)]
    elif call.q.dtype == torch.float32:
        tiles = [(64, 64, 8, 2)]
    del dims, card
    return tuple(
        Configuration({"ROWS": rows, "COLS": cols, "PREFIX_COLS": _prefix_cols(call, cols)}, warps, stages)
        for rows, cols, warps, stages in tiles
    )


def _parts(call: _Call, card: Card, rows: int) -> int:
    """Into how many parts the keys are cut, so that there is a program for each multiprocessor."""
    programs = triton.cdiv(call.rows, rows) * call.groups
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
    out, lse = _by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    call = _call(
        q, k, v, bias, mask, prefix_k, prefix_v, lengths, seed, scale, causal, window, softcap, dropout_p
    )  # fmt: skip
    card = card_of(q.device)
    batch, heads, queries, head_dim = q.shape
    candidates = forward_candidates(call, card)
    parts = _parts(call, card, max(c.blocks["ROWS"] for c in candidates))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    sums, highests, totals = out, lse, lse
    if parts > 1:
        sums = q.new_empty((parts, *out.shape), dtype=torch.float32)
        highests, totals = (q.new_empty((parts, *lse.shape), dtype=torch.float32) for _ in range(2))
    launch(
        attention_forward_kernel,
        call.q, call.k, call.v,
        call.k if call.prefix_k is None else call.prefix_k, call.v if call.prefix_v is None else call.prefix_v,
        q if bias is None else bias, q if call.mask is None else call.mask,
        q if call.lengths is None else call.lengths, seed_or(seed, q), sums, highests, totals,
        batch, k.shape[1], queries, k.shape[2], call.prefix,
        *_strides(call.q, 3), *_strides(call.k, 3), *_strides(call.v, 3),
        *_strides(call.prefix_k, 3), *_strides(call.prefix_v, 3), *_strides(bias, 4), *_strides(call.mask, 4),
        *call.rule(), threshold, keep_scale,
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


_MERGE = (Configuration({}, num_warps=4),)


def attention_backward(*args: Any) -> Any:
    raise NotImplementedError
