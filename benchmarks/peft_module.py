"""PEFT's `lora.Linear` as it is and after `lwft_kernels.accelerate`: with small layers, what a call costs by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lwft_kernels

from . import lora
from .case import Arguments, Case, Family, NotOffered, Run

_BOTH, _HALF = ("float32", "bfloat16"), ("bfloat16",)


def _gpu(preset: str, tokens: int, few: int, width: int, rank: int) -> tuple[Case, ...]:
    return (
        lora._case(preset, tokens, width, rank, dropout_p=0.1, float32_adapter=True, dtypes=_HALF),
        lora._case(preset, few, width, rank, dropout_p=0.1, float32_adapter=True, dtypes=_HALF, in_a_row=True),
    )


CASES = (
    lora._case("smoke", 5, 24, 4, width_out=16),
    lora._case("smoke", 5, 24, 4, dropout_p=0.5),
    lora._case("quick", 8, 64, 8),
    lora._case("quick", 8, 64, 8, dropout_p=0.1),
    lora._case("quick", 1024, 768, 16, dropout_p=0.1),
    lora._case("full", 128, 768, 16, dropout_p=0.1, dtypes=_BOTH),
    lora._case("full", 1024, 768, 16, dropout_p=0.1, float32_adapter=True, dtypes=("bfloat16",)),
    lora._case("full", 128, 4096, 16, dropout_p=0.1),
    *_gpu("gpu", 8192, 128, 4096, 16),
    *_gpu("gpu-smoke", 33, 3, 40, 4),
)


def _layer(a: Arguments) -> Any:
    """PEFT's layer on the very tensors of the arguments, so that all providers differentiate the same leaves."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        raise NotOffered("PEFT is not installed") from None
    (d_out, d_in), rank = a["weight"].shape, a["lora_a"].shape[0]
    config = LoraConfig(lora_dropout=a.get("dropout_p", 0.0))
    with torch.random.fork_rng(devices=[]):  # what it starts with is replaced; the dropout's stream is not to move
        base = nn.Linear(d_in, d_out, device="meta")
        layer = Linear(base, "default", config, r=rank, lora_alpha=int(lora.SCALE * rank))
    for part, name, tensor in (
        (layer.base_layer, "weight", a["weight"]),
        (layer.base_layer, "bias", a["bias"]),
        (layer.lora_A["default"], "weight", a["lora_a"]),
        (layer.lora_B["default"], "weight", a["lora_b"]),
    ):
        tensor.__class__ = nn.Parameter  # torch turns its lazy parameters into others in the same way
        setattr(part, name, tensor)
    return layer


def _eager(_: Case, a: Arguments) -> Run:
    layer, x = _layer(a), a["x"]
    return lambda: layer(x)


def _accelerated(a: Arguments) -> Run:
    layer, x = _layer(a), a["x"]
    lwft_kernels.accelerate(layer)
    return lambda: layer(x)


def _ours(_: Case, a: Arguments) -> Run:
    return _accelerated(a)


def _call(**a: Any) -> Tensor:
    return _accelerated(a)()


FAMILY = Family("peft lora.Linear", CASES, lora.arguments, lora.flops, {"eager": _eager, "lwft": _ours}, ours=_call)
