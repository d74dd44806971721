"""Attention: plain, and with what fine-tuning adds to it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import functional as LF
from lwft_kernels.attention import reference

from .case import Arguments, Case, Family, NotOffered, Run, compiled, normal


def _case(
    name: str, preset: str, batch: int, heads: int, queries: int, head_dim: int, *, kv_heads: int = 0, keys: int = 0,
    dtypes: tuple[str, ...] = ("float32",), curve: tuple[str, str] | None = None, **options: Any,
) -> Case:  # fmt: skip
    kv_heads, keys = kv_heads or heads, keys or queries
    sizes = {"B": batch, "H": heads, "Hkv": kv_heads, "S": queries, "L": keys, "D": head_dim, **options}
    seen = keys + options.get("prefix", 0)
    if options.get("window"):
        seen = min(keys, options["window"])
    elif options.get("causal") and queries == keys:
        seen = keys / 2
    values = batch * head_dim * (2 * heads * queries + 2 * kv_heads * (keys + options.get("prefix", 0)))
    shape = f"({batch}, {heads if kv_heads == heads else f'{heads}/{kv_heads}'}, {queries}, {head_dim})"
    if keys != queries:
        shape += f" x {keys} keys"
    return Case(
        f"{name} {shape}",
        sizes,
        preset,
        4.0 * batch * heads * queries * seen * head_dim,
        values,
        dtypes,
        curve,
    )


BOTH = ("float32", "bfloat16")
CASES = (
    _case("plain", "smoke", 1, 2, 16, 8),
    _case("bias gradient", "smoke", 1, 2, 16, 8, bias=True),
    _case("plain", "quick", 8, 12, 128, 64, dtypes=BOTH, curve=("plain, D=64", "S")),
    _case("causal", "quick", 2, 12, 512, 64),
    _case("dropout 0.1", "quick", 8, 12, 128, 64, dropout_p=0.1),
    _case("padding", "quick", 8, 12, 128, 64, padding=True),
    _case("bias gradient", "quick", 8, 12, 128, 64, bias=True),
    _case("prefix 20", "quick", 8, 12, 128, 64, prefix=20),
    _case("GQA causal", "quick", 1, 32, 256, 128, kv_heads=8, causal=True),
    _case("decode GQA", "quick", 1, 32, 1, 128, kv_heads=8, keys=4096, dtypes=BOTH, curve=("decode", "L")),
    *(
        _case("plain", "full", max(1, 1024 // s), 12, s, 64, dtypes=BOTH, curve=("plain, D=64", "S"))
        for s in (256, 512, 1024, 2048)
    ),
    *(_case("plain", "full", 4, 8, 256, d) for d in (32, 80, 128)),
    *(
        _case("causal", "full", max(1, 1024 // s), 12, s, 64, causal=True, dtypes=BOTH, curve=("causal, D=64", "S"))
        for s in (128, 512, 1024, 2048)
    ),
    _case("dropout 0.1", "full", 8, 12, 512, 64, dropout_p=0.1, dtypes=BOTH),
    _case("bias gradient", "full", 8, 12, 512, 64, bias=True, dtypes=BOTH),
    _case("window 128", "full", 1, 12, 2048, 64, causal=True, window=128),
    _case("softcap 50", "full", 4, 8, 256, 64, softcap=50.0),
    _case("prefix 20 causal", "full", 2, 12, 512, 64, prefix=20, causal=True),
    _case("cross", "full", 8, 12, 37, 64, keys=517),
    *(
        _case("decode", "full", 1, 32, 1, 128, keys=n, dtypes=BOTH, curve=("decode", "L")) for n in (512, 2048, 8192)
    ),
)  # fmt: skip


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    trains = s["S"] > 1  # decoding is not trained

    def heads_first(heads: int, length: int) -> Tensor:  # the view models hand over
        return normal(generator, dtype, s["B"], length, heads, s["D"]).transpose(1, 2).requires_grad_(trains)

    result: Arguments = {
        "q": heads_first(s["H"], s["S"]),
        "k": heads_first(s["Hkv"], s["L"]),
        "v": heads_first(s["Hkv"], s["L"]),
    }
    if s.get("bias"):
        result["bias"] = normal(generator, dtype, 1, s["H"], s["S"], s["L"], grad=True)
    if s.get("prefix"):
        shape = (1, s["Hkv"], s["prefix"], s["D"])
        result["prefix_k"], result["prefix_v"] = (
            normal(generator, dtype, *shape, grad=True) for _ in range(2)
        )
    if s.get("padding"):
        result["lengths"] = torch.linspace(s["L"] // 2, s["L"], s["B"]).long()
    for name in ("causal", "window", "softcap", "dropout_p"):
        if name in s:
            result[name] = s[name]
    return result


def _mask(case: Case, a: Arguments) -> Tensor | None:
    """The boolean mask that a peer needs, made once, outside the timed call."""
    s = case.sizes
    if not any(name in a for name in ("lengths", "window")) and not (a.get("causal") and s.get("prefix")):
        return None
    mask = reference.may_attend(
        s["S"], s["L"], causal=a.get("causal", False), window=a.get("window"), lengths=a.get("lengths")
    )
    return F.pad(mask, (s.get("prefix", 0), 0), value=True)


def _with_prefix(a: Arguments) -> tuple[Tensor, Tensor]:
    if "prefix_k" not in a:
        return a["k"], a["v"]
    batch = a["k"].shape[0]
    k, v = (torch.cat((a[f"prefix_{name}"].expand(batch, -1, -1, -1), a[name]), 2) for name in ("k", "v"))
    return k, v


def _eager_function(case: Case, a: Arguments) -> Any:
    s = case.sizes
    groups, scale = s["H"] // s["Hkv"], 1 / math.sqrt(s["D"])
    mask = _mask(case, a)
    if mask is None and a.get("causal"):
        mask = reference.may_attend(s["S"], s["L"], causal=True)
    p, softcap = a.get("dropout_p", 0.0), a.get("softcap")

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if groups > 1:  # one product per key head, keys not repeated
            q = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
        scores = q @ k.transpose(-2, -1) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if groups > 1:
            scores = scores.view(s["B"], s["H"], s["S"], -1)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = F.dropout(torch.softmax(scores, -1), p)
        if groups > 1:
            weights = weights.reshape(s["B"], s["Hkv"], groups * s["S"], -1)
        return (weights @ v).reshape(s["B"], s["H"], s["S"], s["D"])

    return eager


def _eager(case: Case, a: Arguments) -> Run:
    function = _eager_function(case, a)
    return lambda: function(a["q"], *_with_prefix(a), a.get("bias"))


def _compile(case: Case, a: Arguments) -> Run:
    function = compiled(_eager_function(case, a))
    return lambda: function(a["q"], *_with_prefix(a), a.get("bias"))


def _sdpa(case: Case, a: Arguments) -> Run:
    if a.get("softcap"):
        raise NotOffered("SDPA knows no softcap")
    mask = _mask(case, a)
    if mask is None:
        mask = a.get("bias")
    options = {
        "dropout_p": a.get("dropout_p", 0.0),
        "is_causal": bool(a.get("causal")) and mask is None,
        "enable_gqa": case.sizes["H"] != case.sizes["Hkv"],
    }
    return lambda: F.scaled_dot_product_attention(a["q"], *_with_prefix(a), attn_mask=mask, **options)


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.attention(**a)


FAMILY = Family(
    "attention",
    CASES,
    arguments,
    {"eager": _eager, "sdpa": _sdpa, "compile": _compile, "lwft": _ours},
    backward_flops=2.5,
    ours=LF.attention,
)
