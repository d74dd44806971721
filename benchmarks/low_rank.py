"""A factorised linear layer: x P Q + bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import functional as LF

from .case import Arguments, Case, Family, Run, compiled, normal, overhead

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)


def _case(
    preset: str, tokens: int, width: int, rank: int, *, dtypes: tuple[str, ...] = ("float32",), in_a_row: bool = False
) -> Case:
    return Case(
        f"T={tokens} d={width} r={rank}",
        {"T": tokens, "d": width, "r": rank},
        preset,
        dtypes,
        ("d=768 r=16", "T") if (width, rank) == (768, 16) else None,
        beside=overhead(tokens * width),
        in_a_row=in_a_row,
    )


def _gpu(preset: str, tokens: int, few: int, width: int, ranks: tuple[int, int]) -> tuple[Case, ...]:
    """Many tokens, where memory is the limit; few, where launches are."""
    return (
        *(_case(preset, tokens, width, r, dtypes=HALF) for r in ranks),
        _case(preset, few, width, ranks[0], dtypes=HALF, in_a_row=True),
    )


CASES = (
    _case("smoke", 5, 24, 4),
    _case("quick", 128, 768, 16),
    _case("quick", 4096, 768, 16, dtypes=BOTH),
    *(_case("full", t, 768, 16) for t in (1, 16)),
    _case("full", 128, 768, 16, dtypes=("bfloat16",)),
    _case("full", 1024, 768, 16, dtypes=BOTH),
    *(_case("full", t, 768, 4, dtypes=BOTH) for t in (128, 4096)),
    _case("full", 4096, 768, 64),
    *(_case("full", t, 4096, 16) for t in (1, 128)),
    _case("full", 1023, 770, 7, dtypes=BOTH),
    _case("full", 1, 64, 4),
    *_gpu("gpu", 8192, 128, 4096, (16, 64)),
    *_gpu("gpu-smoke", 33, 3, 40, (4, 8)),
)


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    return {
        "x": normal(generator, dtype, s["T"], s["d"], grad=True),
        "down_weight": normal(generator, dtype, s["r"], s["d"], grad=True, scale=s["d"] ** -0.5),
        "up_weight": normal(generator, dtype, s["d"], s["r"], grad=True, scale=s["r"] ** -0.5),
        "bias": normal(generator, dtype, s["d"], grad=True),
    }


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """Two products; two more for the gradient of each."""
    s = case.sizes
    return 4.0 * float(s["T"] * s["d"] * s["r"]) * (3.0 if backward else 1.0)


def _two_linears(x: Tensor, down_weight: Tensor, up_weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, down_weight), up_weight, bias)


def _eager(_: Case, a: Arguments) -> Run:
    return lambda: _two_linears(**a)


def _compile(_: Case, a: Arguments) -> Run:
    function = compiled(_two_linears)
    return lambda: function(**a)


def _ours(_: Case, a: Arguments) -> Run:
    return lambda: LF.low_rank_linear(**a)


FAMILY = Family(
    "low_rank_linear",
    CASES,
    arguments,
    flops,
    {"eager": _eager, "compile": _compile, "lwft": _ours},
    ours=LF.low_rank_linear,
)
