"""LayerNorm(x + dropout(sublayer_out))."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import functional as LF

from .case import Arguments, Case, Family, NotOffered, Run, compiled, normal, overhead

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)


def _case(
    preset: str, tokens: int, width: int, dropout_p: float = 0.0, dtypes: tuple[str, ...] = ("float32",),
    in_a_row: bool = False,
) -> Case:  # fmt: skip
    return Case(
        f"T={tokens} d={width}" + (f" dropout {dropout_p}" if dropout_p else ""),
        {"T": tokens, "d": width, **({"dropout_p": dropout_p} if dropout_p else {})},
        preset,
        dtypes,
        (f"d={width}" + (f" dropout {dropout_p}" if dropout_p else ""), "T"),
        beside=overhead(tokens * width),
        in_a_row=in_a_row,
    )


def _gpu(preset: str, tokens: int, few: int, narrow: int, wide: int) -> tuple[Case, ...]:
    """Many tokens, where memory is the limit; few, where launches are."""
    return (
        _case(preset, tokens, wide, 0.1, HALF),
        _case(preset, tokens, wide, dtypes=HALF),
        _case(preset, tokens, narrow, 0.1, HALF),
        _case(preset, few, wide, 0.1, HALF, in_a_row=True),
    )


CASES = (
    _case("smoke", 5, 24),
    _case("smoke", 5, 24, 0.5),
    _case("quick", 128, 768),
    _case("quick", 4096, 768, dtypes=BOTH),
    _case("quick", 4096, 768, 0.1),
    *(_case("full", t, 768, p) for t in (1, 16, 1024) for p in (0.0, 0.1)),
    *(_case("full", 128, 768, p, t) for p, t in ((0.0, ("bfloat16",)), (0.1, BOTH))),
    _case("full", 4096, 768, 0.1, ("bfloat16",)),
    _case("full", 1024, 4096, 0.1, BOTH),
    _case("full", 1023, 770, 0.1, BOTH),
    _case("full", 1, 64),
    *_gpu("gpu", 8192, 128, 1024, 4096),
    *_gpu("gpu-smoke", 33, 3, 24, 40),
)


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    tokens, d = case.sizes["T"], case.sizes["d"]
    result: Arguments = {
        "x": normal(generator, dtype, tokens, d, grad=True),
        "sublayer_out": normal(generator, dtype, tokens, d, grad=True),
        "weight": normal(generator, dtype, d, grad=True),
        "bias": normal(generator, dtype, d, grad=True),
    }
    if "dropout_p" in case.sizes:
        result["dropout_p"] = case.sizes["dropout_p"]
    return result


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """About eight operations an element forward, twice that backward; bytes are what limits it."""
    return 8.0 * float(case.sizes["T"] * case.sizes["d"]) * (3.0 if backward else 1.0)


def _function(p: float) -> Callable[..., Tensor]:
    def add_layer_norm(x: Tensor, sublayer_out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dropped = F.dropout(sublayer_out, p) if p else sublayer_out
        return F.layer_norm(x + dropped, x.shape[-1:], weight, bias)

    return add_layer_norm


_NAMES = ("x", "sublayer_out", "weight", "bias")


def _eager(_: Case, a: Arguments) -> Run:
    function, values = _function(a.get("dropout_p", 0.0)), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _compile(_: Case, a: Arguments) -> Run:
    function, values = compiled(_function(a.get("dropout_p", 0.0))), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _liger(_: Case, a: Arguments) -> Run:
    """Liger's LayerNorm behind torch's dropout and sum: it has the three in one only for RMSNorm."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        raise NotOffered("Liger is not installed") from None
    (x, added, weight, bias), p = (a[name] for name in _NAMES), a.get("dropout_p", 0.0)

    def add_layer_norm() -> Tensor:
        out: Tensor = LigerLayerNormFunction.apply(x + (F.dropout(added, p) if p else added), weight, bias, 1e-5)
        return out

    return add_layer_norm


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.add_layer_norm(**a)


FAMILY = Family(
    "add_layer_norm",
    CASES,
    arguments,
    flops,
    {"eager": _eager, "liger": _liger, "compile": _compile, "lwft": _ours},
    ours=LF.add_layer_norm,
)
