"""A linear layer that is not trained: its product and, in backward, the gradient of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lwft_kernels import functional as LF

from .case import Arguments, Case, Family, Run, compiled, normal, overhead


def _case(
    preset: str, tokens: int, d_in: int, d_out: int, *, dtypes: tuple[str, ...] = ("float32",), bias: bool = True
) -> Case:
    name = f"T={tokens} d={d_in}" + (f"->{d_out}" if d_out != d_in else "") + ("" if bias else " no bias")
    sizes = {"T": tokens, "d_in": d_in, "d_out": d_out, "bias": bias}
    curve = ("d=768", "T") if d_in == d_out == 768 and bias else None
    return Case(name, sizes, preset, dtypes, curve, beside=overhead(tokens * d_in))


CASES = (
    _case("smoke", 5, 24, 16),
    _case("smoke", 130, 256, 272, bias=False),
    *(_case("quick", t, 768, 768) for t in (64, 512, 4096)),
    *(_case("full", t, 768, 768) for t in (1, 16, 128)),
    *(_case("full", t, 768, 3072) for t in (64, 512, 4096)),
    *(_case("full", t, 3072, 768, bias=False) for t in (64, 512, 4096)),
    *(_case("full", t, 384, 1536) for t in (64, 512, 4096)),
    _case("full", 512, 4096, 4096, bias=False),
    _case("full", 1024, 768, 768, dtypes=("bfloat16",)),
    _case("full", 300, 1000, 333),
    _case("full", 1, 64, 64),
)


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    return {
        "x": normal(generator, dtype, s["T"], s["d_in"], grad=True),
        "weight": normal(generator, dtype, s["d_out"], s["d_in"], scale=s["d_in"] ** -0.5),
        "bias": normal(generator, dtype, s["d_out"]) if s["bias"] else None,
    }


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """One product, and one for the gradient of x."""
    s = case.sizes
    return 2.0 * float(s["T"] * s["d_in"] * s["d_out"]) * (2.0 if backward else 1.0)


def _eager(_: Case, a: Arguments) -> Run:
    values = (a["x"], a["weight"], a["bias"])
    return lambda: F.linear(*values)


def _compile(_: Case, a: Arguments) -> Run:
    function, values = compiled(F.linear), (a["x"], a["weight"], a["bias"])
    return lambda: function(*values)


def _ours(_: Case, a: Arguments) -> Run:
    values = (a["x"], a["weight"], a["bias"])
    return lambda: LF.frozen_linear(*values)


FAMILY = Family(
    "frozen_linear",
    CASES,
    arguments,
    flops,
    {"eager": _eager, "compile": _compile, "lwft": _ours},
    ours=LF.frozen_linear,
)
