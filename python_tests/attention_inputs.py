"""Arguments of attention for the tests of its kernels."""

from __future__ import annotations

import torch


def make(batch, heads, kv_heads, queries, keys, head_dim, *, prefix=0, shared_prefix=True, bias=None, **rule):
    """Arguments in float64; q, k, v are `(B, S, H, D).transpose(1, 2)` views, as models hand them over."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys + head_dim)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments = {
        "q": leaf(batch, queries, heads, head_dim).transpose(1, 2).requires_grad_(),
        "k": leaf(batch, keys, kv_heads, head_dim).transpose(1, 2).requires_grad_(),
        "v": leaf(batch, keys, kv_heads, head_dim).transpose(1, 2).requires_grad_(),
    }
    if prefix:
        shape = (1 if shared_prefix else batch, kv_heads, prefix, head_dim)
        arguments["prefix_k"] = leaf(*shape).requires_grad_()
        arguments["prefix_v"] = leaf(*shape).requires_grad_()
    if bias is not None:
        arguments["bias"] = leaf(*bias).requires_grad_()
    return {**arguments, **rule}
