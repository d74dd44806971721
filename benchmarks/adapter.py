"""The bottleneck adapter: residual + dropout(up(relu(down(layer_norm(x)))))."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import functional as LF

from .case import Arguments, Case, Family, Run, compiled, normal, overhead

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)


def _case(
    preset: str, tokens: int, width: int, bottleneck: int, *, norm: bool = False, dropout_p: float = 0.0,
    dtypes: tuple[str, ...] = ("float32",), curve: tuple[str, str] | None = None, in_a_row: bool = False,
) -> Case:  # fmt: skip
    options = {**({"norm": True} if norm else {}), **({"dropout_p": dropout_p} if dropout_p else {})}
    extra = (" +LayerNorm" if norm else "") + (f" +dropout {dropout_p}" if dropout_p else "")
    return Case(
        f"T={tokens} d={width} m={bottleneck}{extra}",
        {"T": tokens, "d": width, "m": bottleneck, **options},
        preset,
        dtypes,
        curve,
        beside=overhead(tokens * width),
        in_a_row=in_a_row,
    )


def _gpu(preset: str, tokens: int, few: int, widths: tuple[int, int], bottlenecks: tuple[int, int]) -> tuple[Case, ...]:
    """Many tokens, where memory is the limit, with all options and without; few, where launches are."""
    (narrow, wide), (small, large) = widths, bottlenecks
    return (
        _case(preset, tokens, wide, small, norm=True, dropout_p=0.1, dtypes=HALF),
        _case(preset, tokens, wide, small, norm=True, dtypes=HALF),
        _case(preset, tokens, wide, small, dtypes=HALF),
        _case(preset, tokens, wide, large, norm=True, dropout_p=0.1, dtypes=HALF),
        _case(preset, tokens, narrow, small, norm=True, dropout_p=0.1, dtypes=HALF),
        *(_case(preset, few, d, small, norm=True, dropout_p=0.1, dtypes=HALF, in_a_row=True) for d in widths),
    )


CASES = (
    _case("smoke", 5, 24, 8, norm=True),
    _case("smoke", 5, 24, 8, dropout_p=0.5),
    _case("quick", 1, 768, 64, curve=("d=768 m=64", "T")),
    _case("quick", 128, 768, 64, curve=("d=768 m=64", "T")),
    _case("quick", 4096, 768, 64, dtypes=BOTH, curve=("d=768 m=64", "T")),
    _case("quick", 4096, 768, 64, norm=True, dropout_p=0.1),
    *(
        _case("full", t, 768, 64, dtypes=dtypes, curve=("d=768 m=64", "T"))
        for t, dtypes in ((4, BOTH), (16, ("float32",)), (128, HALF), (512, BOTH), (2048, ("float32",)))
    ),
    *(_case("full", 4096, 768, m, dtypes=BOTH) for m in (16, 256)),
    *(_case("full", t, 768, m) for t in (4, 128) for m in (16, 256)),
    *(_case("full", t, 4096, 64) for t in (1, 128, 1024)),
    *(_case("full", t, 768, 64, norm=True, dtypes=BOTH) for t in (128, 4096)),
    _case("full", 128, 768, 64, norm=True, dropout_p=0.1, dtypes=BOTH),
    _case("full", 1023, 770, 37, norm=True, dropout_p=0.1, dtypes=BOTH),
    _case("full", 1, 64, 8),
    *_gpu("gpu", 8192, 128, (1024, 4096), (64, 256)),
    *_gpu("gpu-smoke", 33, 3, (24, 40), (8, 16)),
)  # fmt: skip


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    tokens, d, m = s["T"], s["d"], s["m"]

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(generator, dtype, *shape, grad=True, scale=scale)

    x = leaf(tokens, d)
    result: Arguments = {
        "x": x,
        "down_weight": leaf(m, d, scale=d**-0.5),
        "down_bias": leaf(m),
        "up_weight": leaf(d, m, scale=m**-0.5),
        "up_bias": leaf(d),
        "residual": x,
    }
    if s.get("norm"):
        result["norm_weight"], result["norm_bias"] = leaf(d), leaf(d)
    if s.get("dropout_p"):
        result["dropout_p"] = s["dropout_p"]
    return result


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """Two products; two more for the gradient of each."""
    s = case.sizes
    return 4.0 * float(s["T"] * s["d"] * s["m"]) * (3.0 if backward else 1.0)


def _function(p: float) -> Callable[..., Tensor]:
    def adapter(
        x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
        norm_weight: Tensor | None, norm_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
        h = F.linear(F.relu(F.linear(h, down_weight, down_bias)), up_weight, up_bias)
        return x + (F.dropout(h, p) if p else h)

    return adapter


_NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


def _eager(_: Case, a: Arguments) -> Run:
    function, values = _function(a.get("dropout_p", 0.0)), [a.get(name) for name in _NAMES]
    return lambda: function(*values)


def _compile(_: Case, a: Arguments) -> Run:
    function, values = compiled(_function(a.get("dropout_p", 0.0))), [a.get(name) for name in _NAMES]
    return lambda: function(*values)


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.adapter(**a)


FAMILY = Family(
    "adapter",
    CASES,
    arguments,
    flops,
    {"eager": _eager, "compile": _compile, "lwft": _ours},
    ours=LF.adapter,
)
