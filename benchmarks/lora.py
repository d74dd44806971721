"""A frozen linear layer with a LoRA branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwft_kernels import functional as LF

from .case import Arguments, Case, Family, NotOffered, Run, compiled, normal

SCALE = 2.0


def _case(
    preset: str, tokens: int, width: int, rank: int, *, dropout_p: float = 0.0, dtypes: tuple[str, ...] = ("float32",),
    curve: tuple[str, str] | None = None,
) -> Case:  # fmt: skip
    return Case(
        f"T={tokens} d={width} r={rank}" + (f" dropout {dropout_p}" if dropout_p else ""),
        {"T": tokens, "d": width, "r": rank, **({"dropout_p": dropout_p} if dropout_p else {})},
        preset,
        2.0 * tokens * width * width + 4.0 * tokens * width * rank,
        2.0 * tokens * width + width * width + 2.0 * width * rank,
        dtypes,
        curve,
    )


CASES = (
    _case("smoke", 5, 24, 4),
    _case("quick", 1, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 128, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 1024, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 1024, 768, 16, dropout_p=0.1, dtypes=("float32", "bfloat16")),
    *(_case("full", t, 768, 16, curve=("d=768 r=16", "T")) for t in (4, 16, 4096)),
    *(_case("full", 1024, 768, r, curve=("d=768 T=1024", "r")) for r in (4, 64)),
    *(_case("full", t, 4096, 16) for t in (1, 16, 128)),
    *(_case("full", t, 768, 16, dropout_p=0.1, dtypes=("float32", "bfloat16")) for t in (16, 128, 4096)),
    _case("full", 128, 4096, 16, dropout_p=0.1),
)  # fmt: skip


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    tokens, d, r = s["T"], s["d"], s["r"]
    result: Arguments = {
        "x": normal(generator, dtype, tokens, d, grad=True),
        "weight": normal(generator, dtype, d, d, scale=d**-0.5),
        "bias": normal(generator, dtype, d),
        "lora_a": normal(generator, dtype, r, d, grad=True, scale=d**-0.5),
        "lora_b": normal(generator, dtype, d, r, grad=True, scale=r**-0.5),
        "scale": SCALE,
    }
    if s.get("dropout_p"):
        result["dropout_p"] = s["dropout_p"]
    return result


def _function(p: float) -> Any:
    def lora(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = F.dropout(x, p) if p else x
        return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * SCALE

    return lora


_NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


def _eager(_: Case, a: Arguments) -> Run:
    function, values = _function(a.get("dropout_p", 0.0)), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _compile(_: Case, a: Arguments) -> Run:
    function, values = compiled(_function(a.get("dropout_p", 0.0))), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _addmm(_: Case, a: Arguments) -> Run:
    x, weight, bias, lora_a, lora_b = (a[name] for name in _NAMES)
    p = a.get("dropout_p", 0.0)

    def chain() -> Tensor:
        dropped = F.dropout(x, p) if p else x
        base = torch.addmm(bias, x, weight.T)
        if torch.is_grad_enabled():
            return torch.addmm(base, dropped @ lora_a.T, lora_b.T, alpha=SCALE)
        return base.addmm_(dropped @ lora_a.T, lora_b.T, alpha=SCALE)

    return chain


def _peft(case: Case, a: Arguments) -> Run:
    try:
        from peft.tuners import lora
    except ImportError:
        raise NotOffered("PEFT is not installed") from None
    from peft import LoraConfig

    base = nn.Linear(case.sizes["d"], case.sizes["d"], dtype=a["x"].dtype).requires_grad_(False)
    base.weight.data, base.bias.data = a["weight"], a["bias"]
    r, p = case.sizes["r"], a.get("dropout_p", 0.0)
    config = LoraConfig(r=r, lora_alpha=int(SCALE * r), lora_dropout=p)
    layer = lora.Linear(base, "default", config, r=r, lora_alpha=int(SCALE * r))
    # the tensors of the other providers themselves, so that all differentiate the same leaves
    for part, name in ((layer.lora_A["default"], "lora_a"), (layer.lora_B["default"], "lora_b")):
        del part.weight
        part.weight = a[name]
    return lambda: layer(a["x"])


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.lora_linear(**a)


FAMILY = Family(
    "lora_linear",
    CASES,
    arguments,
    {"eager": _eager, "addmm": _addmm, "peft": _peft, "compile": _compile, "lwft": _ours},
    backward_flops=1.0,  # W is frozen: no gradient of it
    ours=LF.lora_linear,
)
