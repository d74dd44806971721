"""Attention: plain, and with what fine-tuning adds to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwft_kernels import functional as LF
from lwft_kernels.attention import reference

from . import attention_flex
from .case import TINY, Arguments, Beside, Case, Family, NotOffered, Run, compiled, normal, overhead

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)


def _without_prefix(a: Arguments) -> Beside:
    rest = {name: value for name, value in a.items() if name not in ("prefix_k", "prefix_v")}
    return Beside("the same without a prefix", lambda: LF.attention(**rest), rest)


def _case(
    name: str, preset: str, batch: int, heads: int, queries: int, head_dim: int, *, kv_heads: int = 0, keys: int = 0,
    dtypes: tuple[str, ...] = ("float32",), curve: tuple[str, str] | None = None, in_a_row: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    kv_heads, keys = kv_heads or heads, keys or queries
    sizes = {"B": batch, "H": heads, "Hkv": kv_heads, "S": queries, "L": keys, "D": head_dim, **options}
    shape = f"({batch}, {heads if kv_heads == heads else f'{heads}/{kv_heads}'}, {queries}, {head_dim})"
    if keys != queries:
        shape += f" x {keys} keys"
    beside = _without_prefix if "prefix" in options else overhead(heads * queries * head_dim)
    # decoding is not trained
    trains = queries > 1
    return Case(f"{name} {shape}", sizes, preset, dtypes, curve, trains=trains, beside=beside, in_a_row=in_a_row)


def _gpu(
    preset: str, batch: int, heads: int, length: int, head_dim: int, prefix: int, window: int, few: int,
    decoding: tuple[int, ...],
) -> tuple[Case, ...]:  # fmt: skip
    """A long sequence, plain and with each thing that fine-tuning adds; a short one; decoding."""
    groups = 4

    def case(name: str, **options: Any) -> Case:
        return _case(name, preset, batch, heads, length, head_dim, dtypes=HALF, **options)

    return (
        case("causal", causal=True),
        case("plain"),
        case(f"prefix {prefix} causal", prefix=prefix, causal=True),
        case(f"prefix {prefix}", prefix=prefix),
        # the oracle's random stream in plain PyTorch takes a hundred bytes for every query and key
        _case("dropout 0.1 causal", preset, max(batch // 2, 1), heads, length, head_dim, dropout_p=0.1, causal=True,
              dtypes=HALF),
        _case("bias gradient", preset, 2 * batch, heads, length // 2, head_dim, bias=True, dtypes=HALF),
        case("GQA causal", kv_heads=heads // groups, causal=True),
        case(f"window {window} causal", window=window, causal=True),
        case("softcap 50 causal", softcap=50.0, causal=True),
        case("padding", padding=True),
        _case("causal", preset, 2 * batch, heads, length, head_dim // 2, causal=True, dtypes=HALF),
        _case("causal dropout 0.1", preset, 1, heads, few, head_dim, causal=True, dropout_p=0.1, dtypes=HALF,
              in_a_row=True),
        *(
            _case(name, preset, 1, 2 * heads, 1, head_dim, kv_heads=kv_heads, keys=n, dtypes=HALF)
            for name, kv_heads in (("decode", 0), ("decode GQA", 2 * heads // groups))
            for n in decoding
        ),
    )  # fmt: skip


CASES = (
    _case("plain", "smoke", 1, 2, 16, 8),
    _case("all at once", "smoke", 2, 4, 7, 8, kv_heads=2, keys=9, causal=True, padding=True, bias=True, prefix=3),
    _case("dropout 0.5", "smoke", 1, 2, 16, 8, dropout_p=0.5),
    _case("decode", "smoke", 1, 4, 1, 8, kv_heads=2, keys=16),
    _case("plain", "quick", 8, 12, 128, 64, dtypes=BOTH, curve=("plain, D=64", "S")),
    _case("causal", "quick", 2, 12, 512, 64, causal=True, curve=("causal, D=64", "S")),
    _case("window 128", "quick", 2, 12, 512, 64, causal=True, window=128),
    _case("dropout 0.1", "quick", 8, 12, 128, 64, dropout_p=0.1),
    _case("padding", "quick", 8, 12, 128, 64, padding=True),
    _case("bias gradient", "quick", 8, 12, 128, 64, bias=True),
    _case("prefix 20", "quick", 8, 12, 128, 64, prefix=20),
    _case("GQA causal", "quick", 1, 32, 256, 128, kv_heads=8, causal=True),
    _case("decode GQA", "quick", 1, 32, 1, 128, kv_heads=8, keys=4096, curve=("decode GQA", "L")),
    *(
        _case("plain", "full", max(1, 1024 // s), 12, s, 64, dtypes=BOTH, curve=("plain, D=64", "S"))
        for s in (256, 512, 1024, 2048)
    ),
    *(_case("plain", "full", 1024 // s, 12, s, d, dtypes=BOTH) for s in (128, 1024) for d in (32, 128)),
    _case("plain", "full", 4, 12, 256, 80),
    *(
        _case("causal", "full", max(1, 1024 // s), 12, s, 64, causal=True, dtypes=t, curve=("causal, D=64", "S"))
        for s, t in ((128, BOTH), (256, BOTH), (512, HALF), (1024, BOTH), (2048, BOTH))
    ),
    *(_case("dropout 0.1", "full", 8, 12, s, 64, dropout_p=0.1, dtypes=t) for s, t in ((128, HALF), (512, BOTH))),
    _case("causal dropout 0.1", "full", 2, 12, 512, 64, causal=True, dropout_p=0.1),
    *(_case("bias gradient", "full", 8, 12, s, 64, bias=True, dtypes=t) for s, t in ((128, HALF), (512, BOTH))),
    _case("window 128", "full", 1, 12, 2048, 64, causal=True, window=128),
    _case("softcap 50", "full", 4, 8, 256, 64, softcap=50.0),
    _case("prefix 20", "full", 8, 12, 128, 64, prefix=20, dtypes=HALF),
    _case("prefix 20 causal", "full", 2, 12, 512, 64, prefix=20, causal=True, dtypes=BOTH),
    _case("GQA causal", "full", 1, 32, 512, 128, kv_heads=8, causal=True, dtypes=BOTH),
    _case("cross", "full", 8, 12, 37, 64, keys=517),
    _case("ugly sizes", "full", 3, 5, 131, 33, dtypes=BOTH),
    _case("ugly causal", "full", 2, 7, 509, 80, causal=True),
    *(
        _case("decode", "full", 1, 32, 1, 128, keys=n, dtypes=t, curve=("decode", "L"))
        for n, t in ((512, BOTH), (2048, BOTH), (4096, (*BOTH, "float16")), (8192, BOTH))
    ),
    *(
        _case("decode GQA", "full", 1, 32, 1, 128, kv_heads=8, keys=n, dtypes=t, curve=("decode GQA", "L"))
        for n, t in ((512, BOTH), (2048, BOTH), (4096, (*HALF, "float16")), (8192, BOTH))
    ),
    _case("tiny", "full", 1, 1, 2, TINY // 2),
    *_gpu("gpu", 2, 16, 4096, 128, 32, 1024, 128, (4096, 8192, 16384, 32768)),
    *_gpu("gpu-smoke", 1, 4, 24, 16, 3, 7, 5, (20, 40)),
)  # fmt: skip


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes

    def heads_first(heads: int, length: int) -> Tensor:  # the view that models hand over
        values = normal(generator, dtype, s["B"], length, heads, s["D"]).transpose(1, 2)
        return values.requires_grad_(case.trains)

    result: Arguments = {
        "q": heads_first(s["H"], s["S"]),
        "k": heads_first(s["Hkv"], s["L"]),
        "v": heads_first(s["Hkv"], s["L"]),
    }
    if s.get("bias"):
        result["bias"] = normal(generator, dtype, 1, s["H"], s["S"], s["L"], grad=True)
    if s.get("prefix"):
        shape = (1, s["Hkv"], s["prefix"], s["D"])
        result["prefix_k"], result["prefix_v"] = (normal(generator, dtype, *shape, grad=True) for _ in range(2))
    if s.get("padding"):
        result["lengths"] = torch.linspace(s["L"] // 2 + 1, s["L"], s["B"], device=generator.device).long()
    for name in ("causal", "window", "softcap", "dropout_p"):
        if name in s:
            result[name] = s[name]
    return result


def flops(case: Case, a: Arguments, backward: bool) -> float:
    """4 D per query and key it sees; backward is five products where forward is two (FlashAttention counts so)."""
    s = case.sizes
    allowed = _may_attend(case, a)
    pairs = int(allowed.expand(s["B"], *allowed.shape[1:]).sum()) + s["B"] * s["S"] * s.get("prefix", 0)
    return 4.0 * float(s["D"] * s["H"] * pairs) * (3.5 if backward else 1.0)


def _may_attend(case: Case, a: Arguments) -> Tensor:  # (B or 1, 1, S, L)
    s = case.sizes
    options = {name: a[name] for name in ("causal", "window", "lengths") if name in a}
    return reference.may_attend(s["S"], s["L"], **options, device=a["q"].device)


# ---- the peers; what can be made once (masks) is made once, outside the timed call ----


def _mask(case: Case, a: Arguments) -> Tensor | None:
    """Which keys may be seen, prefix included; None where every key may."""
    allowed = _may_attend(case, a)
    return None if bool(allowed.all()) else F.pad(allowed, (case.sizes.get("prefix", 0), 0), value=True)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _bias(case: Case, a: Arguments) -> Tensor | None:
    """The bias, over a prefix as well."""
    bias, prefix = a.get("bias"), case.sizes.get("prefix", 0)
    return F.pad(bias, (prefix, 0)) if bias is not None and prefix else bias


def _with_prefix(a: Arguments) -> tuple[Tensor, Tensor]:
    if "prefix_k" not in a:
        return a["k"], a["v"]
    batch = a["k"].shape[0]
    k, v = (torch.cat((a[f"prefix_{name}"].expand(batch, -1, -1, -1), a[name]), 2) for name in ("k", "v"))
    return k, v


def _explicit_softmax(case: Case, a: Arguments) -> Callable[..., Tensor]:
    """softmax(q k^T scale + bias + mask) v, written out; grouped heads share a product, keys are not repeated."""
    s = case.sizes
    groups, scale = s["H"] // s["Hkv"], s["D"] ** -0.5
    mask = _additive(_mask(case, a), a["q"].dtype)
    p, softcap = a.get("dropout_p", 0.0), a.get("softcap")
    per_head, grouped = (s["B"], s["H"], s["S"], -1), (s["B"], s["Hkv"], groups * s["S"], -1)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = q * scale
        if groups > 1:
            q = q.reshape(grouped)
        scores = q @ k.transpose(-2, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if groups > 1:
            scores = scores.view(per_head)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, -1)
        if p:
            weights = F.dropout(weights, p)
        if groups > 1:
            weights = weights.view(grouped)
        return (weights @ v).reshape(per_head)

    return attention


def _eager(case: Case, a: Arguments) -> Run:
    function = _explicit_softmax(case, a)
    return lambda: function(a["q"], *_with_prefix(a), _bias(case, a))


def _compile(case: Case, a: Arguments) -> Run:
    explicit = _explicit_softmax(case, a)

    def whole(values: Arguments) -> Tensor:
        return explicit(values["q"], *_with_prefix(values), _bias(case, values))

    function = compiled(whole)
    tensors = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    return lambda: function(tensors)


def _sdpa(case: Case, a: Arguments) -> Run:
    """SDPA in its fastest legal form: no mask where causal is all, one query's grouped heads as so many queries."""
    if a.get("softcap"):
        raise NotOffered("SDPA knows no softcap")
    s = case.sizes
    p, groups = a.get("dropout_p", 0.0), s["H"] // s["Hkv"]
    only_causal = bool(a.get("causal") and not any(name in a for name in ("window", "lengths", "bias")))
    # is_causal is aligned to the first key, ours to the last: the same where there are as many keys as queries
    is_causal = only_causal and s["S"] == s["L"] and "prefix_k" not in a
    mask: Tensor | None
    if only_causal and not is_causal and a["q"].is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # which imports the compiler

        # the kernels know that alignment too, under another name; a prefix is so many keys more
        mask = causal_lower_right(s["S"], s["L"] + s.get("prefix", 0))
    else:
        mask = None if is_causal else _additive(_mask(case, a), a["q"].dtype)
    if s["S"] == 1 and groups > 1 and mask is None and "bias" not in a:
        shape = (s["B"], s["Hkv"], groups, s["D"])

        def one_query() -> Tensor:
            out = F.scaled_dot_product_attention(a["q"].reshape(shape), *_with_prefix(a), dropout_p=p)
            return out.reshape(a["q"].shape)

        return one_query

    def general() -> Tensor:
        bias = _bias(case, a)
        scores = mask if bias is None else bias if mask is None else bias + mask
        return F.scaled_dot_product_attention(
            a["q"], *_with_prefix(a), scores, dropout_p=p, is_causal=is_causal, enable_gqa=groups > 1
        )

    return general


def _sdpa_by(backend: SDPBackend) -> Callable[[Case, Arguments], Run]:
    """SDPA made to take one of its implementations."""

    def bind(case: Case, a: Arguments) -> Run:
        any_of_them = _sdpa(case, a)

        def run() -> Tensor:
            try:
                with sdpa_kernel(backend):
                    return any_of_them()
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise NotOffered("SDPA has no such kernel for this call") from None
                raise

        return run

    return bind


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.attention(**a)


FAMILY = Family(
    "attention",
    CASES,
    arguments,
    flops,
    {
        "eager": _eager,
        "sdpa": _sdpa,
        "flash": _sdpa_by(SDPBackend.FLASH_ATTENTION),
        "efficient": _sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
        "cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
        "flex": attention_flex.bind,
        "compile": _compile,
        "lwft": _ours,
    },
    ours=LF.attention,
)
