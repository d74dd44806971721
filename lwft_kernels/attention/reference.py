"""Attention in plain PyTorch: the specification of lwft_kernels.attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lwft_kernels.dropout import keep_multiplier


def may_attend(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,  # bool, broadcastable to (B, H, S, L)
    lengths: Tensor | None = None,  # (B,) int64
    device: torch.device | None = None,
) -> Tensor:  # bool, broadcastable to (B, H, S, L)
    """Which keys a query sees. Query i stands at i' = i + L - S: the last query beside the last key."""
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed & (j <= i)
    if window is not None:
        allowed = allowed & (i - window < j) & (j < i + window)
    if mask is not None:
        allowed = allowed & mask
    if lengths is not None:
        allowed = allowed & (j < lengths[:, None, None, None])
    return allowed


def attention(
    q: Tensor,  # (B, H, S, D)
    k: Tensor,  # (B, Hkv, L, D)
    v: Tensor,  # (B, Hkv, L, D)
    *,
    bias: Tensor | None = None,  # broadcastable to (B, H, S, L)
    mask: Tensor | None = None,  # bool, broadcastable to (B, H, S, L), True = may attend
    prefix_k: Tensor | None = None,  # (B or 1, Hkv, P, D)
    prefix_v: Tensor | None = None,  # (B or 1, Hkv, P, D)
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,  # (B,) int64
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,  # (2,) int64; needed when dropout_p > 0
) -> Tensor | tuple[Tensor, Tensor]:  # (B, H, S, D), and lse (B, H, S)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale

    def scores_of(k: Tensor) -> Tensor:  # (B or 1, Hkv, n, D) -> (B, H, S, n)
        shared = k.repeat_interleave(heads // max(k.shape[1], 1), 1).expand(batch, -1, -1, -1)
        scores = (q @ shared.transpose(-2, -1)) * scale
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def values_of(v: Tensor) -> Tensor:
        return v.repeat_interleave(heads // max(v.shape[1], 1), 1).expand(batch, -1, -1, -1)

    scores, values = scores_of(k), values_of(v)
    if bias is not None:
        scores = scores + bias
    allowed = may_attend(queries, keys, causal=causal, window=window, mask=mask, lengths=lengths, device=q.device)
    scores = scores.masked_fill(~allowed, -math.inf)
    if prefix_k is not None and prefix_v is not None:
        scores = torch.cat((scores_of(prefix_k).to(scores.dtype), scores), -1)
        values = torch.cat((values_of(prefix_v), values), 2)

    # A row with nothing to attend to gives zeros and gets no gradient; a softmax of -inf alone would be NaN.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    statistics = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=statistics).masked_fill(nothing, 0.0)
    if dropout_p > 0.0 and seed is not None:
        rows = torch.arange(batch * heads * queries, device=q.device)
        cols = torch.arange(scores.shape[-1], device=q.device)
        weights = weights * keep_multiplier(seed, rows, cols, dropout_p, statistics).view(weights.shape)
    out = weights.to(v.dtype) @ values
    if not return_lse:
        return out
    lse = torch.logsumexp(scores.to(statistics), -1)
    return out, lse.masked_fill(nothing.squeeze(-1), -math.inf)
