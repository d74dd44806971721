"""FlexAttention as a peer: bias and softcap as its score_mod, the rest as its mask_mod, a prefix by cat."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Arguments, Case, NotOffered, Run, compiled


def bind(case: Case, a: Arguments) -> Run:
    """Compiled on a GPU; on the CPU, where its compiled form has no backward either, as it is."""
    if a.get("dropout_p"):
        raise NotOffered("FlexAttention has no dropout")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # which imports the compiler

    s = case.sizes
    batch, prefix = s["B"], s.get("prefix", 0)
    allowed = _mask_mod(case, a)
    device = a["q"].device
    block_mask = None
    if allowed is not None:  # made once, outside the timed call
        per_row = batch if "lengths" in a else None
        block_mask = create_block_mask(allowed, per_row, None, s["S"], s["L"] + prefix, device=device.type)
    softcap, grouped = a.get("softcap"), s["H"] != s["Hkv"]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if bias is None else score + bias[0, h, i, j]

        plain = softcap is None and bias is None
        out: Tensor = flex_attention(
            q, k, v, score_mod=None if plain else score_mod, block_mask=block_mask, enable_gqa=grouped
        )
        return out

    function = compiled(attention) if device.type == "cuda" else attention

    def run() -> Tensor:
        q, k, v, bias = a["q"], a["k"], a["v"], a.get("bias")
        if device.type == "cpu":
            if torch.is_grad_enabled() and q.requires_grad:
                raise NotOffered("FlexAttention has no backward on the CPU")
            q, k, v = (tensor.detach() for tensor in (q, k, v))
        if prefix:
            learned = (a[name].expand(batch, -1, -1, -1) for name in ("prefix_k", "prefix_v"))
            k, v = (torch.cat(pair, 2) for pair in zip(learned, (k, v), strict=True))
            bias = None if bias is None else F.pad(bias, (prefix, 0))
        return function(q, k, v, bias)

    return run


def _mask_mod(case: Case, a: Arguments) -> Callable[..., Tensor] | None:
    """Which keys a query sees, as `lwft_kernels.attention.reference.may_attend` has it, behind a prefix all see."""
    s = case.sizes
    prefix, shift = s.get("prefix", 0), s["L"] - s["S"]
    causal, window, lengths = a.get("causal"), a.get("window"), a.get("lengths")
    if not causal and window is None and lengths is None:
        return None

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query + shift, key - prefix
        allowed: Tensor = j < s["L"]
        if causal:
            allowed = allowed & (j <= i)
        if window is not None:
            allowed = allowed & (i - window < j) & (j < i + window)
        if lengths is not None:
            allowed = allowed & (j < lengths[b])
        return (j < 0) | allowed if prefix else allowed

    return mask_mod
