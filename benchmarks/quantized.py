"""A frozen linear layer whose weight stays in four or eight bits: x W^T + bias."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import functional as LF
from lwft_kernels.functional import QuantizedWeight
from lwft_kernels.quantized import reference

from .case import Arguments, Case, Family, NotOffered, Run, compiled, normal

BLOCK = 64  # weights that share a scale, bitsandbytes' default


def _case(preset: str, tokens: int, width: int, kind: str) -> Case:
    dtype = "float32" if preset == "smoke" else "bfloat16"
    return Case(f"{kind} T={tokens} d={width}", {"T": tokens, "d": width, "format": kind}, preset, (dtype,))


def _gpu(preset: str, width: int, few: tuple[int, ...], many: int) -> tuple[Case, ...]:
    """Few tokens, where the bytes of the weight are the limit; many, where it is the product."""
    return (
        *(_case(preset, t, width, "nf4") for t in (*few, many)),
        *(_case(preset, t, width, "int8") for t in few[:2]),
    )


CASES = (
    _case("smoke", 5, 64, "nf4"),
    _case("smoke", 5, 64, "int8"),
    *_gpu("gpu", 4096, (1, 16, 64), 512),
    *_gpu("gpu-smoke", 64, (1, 3, 5), 7),
)


def nf4_table() -> Tensor:
    """The 16 values of NF4: quantiles of the normal distribution, 8 above zero and 7 below (QLoRA, section 3)."""
    last = 0.9677083
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    return (values / values.max()).float()


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    """`codes` and `absmax`, which the weight holds too, are there to be counted."""
    tokens, d, device = case.sizes["T"], case.sizes["d"], generator.device

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def scales(count: int) -> Tensor:
        drawn: Tensor = 0.5 + torch.rand(count, generator=generator, device=device)
        return drawn / math.sqrt(d)

    if case.sizes["format"] == "int8":
        weight = QuantizedWeight(integers(-127, 128, d, d, dtype=torch.int8), scales(d), (d, d))
    else:
        packed = integers(0, 256, d * d // 2, 1, dtype=torch.uint8)
        weight = QuantizedWeight(packed, scales(d * d // BLOCK), (d, d), nf4_table().to(device), BLOCK)
    return {
        "x": normal(generator, dtype, tokens, d, grad=True),
        "weight": weight,
        "bias": normal(generator, dtype, d),
        "codes": weight.codes,
        "absmax": weight.absmax,
    }


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """A product, and one more for the gradient of x."""
    return 2.0 * float(case.sizes["T"] * case.sizes["d"] ** 2) * (2.0 if backward else 1.0)


def _eager(_: Case, a: Arguments) -> Run:
    """What can be done without a kernel: W is written out at every call."""
    x, weight, bias = a["x"], a["weight"], a["bias"]
    return lambda: F.linear(x, reference.dequantize(weight, x.dtype), bias)


def _compile(_: Case, a: Arguments) -> Run:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    function = compiled(lambda: F.linear(x, reference.dequantize(weight, x.dtype), bias))
    return lambda: function()


def _bitsandbytes(case: Case, a: Arguments) -> Run:
    """The product of `bitsandbytes.nn.Linear4bit`. That of eight bits rounds the activations too: something else."""
    if case.sizes["format"] != "nf4":
        raise NotOffered("bitsandbytes multiplies activations of eight bits, which is something else")
    try:
        import bitsandbytes
        from bitsandbytes.functional import QuantState
    except ImportError:
        raise NotOffered("bitsandbytes is not installed") from None
    x, weight, bias = a["x"], a["weight"], a["bias"]
    state = QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=weight.table, blocksize=BLOCK, quant_type="nf4",
        dtype=x.dtype,
    )  # fmt: skip

    def linear() -> Tensor:
        out: Tensor = bitsandbytes.matmul_4bit(x, weight.codes.t(), quant_state=state, bias=bias)
        return out

    return linear


def _ours(_: Case, a: Arguments) -> Run:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    return lambda: LF.quantized_linear(x, weight, bias)


def _call(x: Tensor, weight: QuantizedWeight, bias: Tensor, **_: Any) -> Tensor:
    return LF.quantized_linear(x, weight, bias)


FAMILY = Family(
    "quantized_linear",
    CASES,
    arguments,
    flops,
    {"eager": _eager, "bitsandbytes": _bitsandbytes, "compile": _compile, "lwft": _ours},
    ours=_call,
)
