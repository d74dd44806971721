"""`nn.TransformerEncoder` as it is, compiled, and after `lwft_kernels.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lwft_kernels

from .case import Arguments, Case, Family, Run, compiled, normal


def _case(
    preset: str,
    layers: int,
    batch: int,
    tokens: int,
    width: int,
    heads: int,
    *,
    dropout_p: float = 0.0,
    padded: bool = False,
    dtypes: tuple[str, ...] = ("float32",),
) -> Case:
    options: dict[str, Any] = {"dropout_p": dropout_p} if dropout_p else {}
    options |= {"padded": True} if padded else {}
    words = [f"dropout {dropout_p}"] * bool(dropout_p) + ["padded"] * padded
    return Case(
        f"{layers} layers B={batch} S={tokens} d={width} H={heads}" + "".join(f" {word}" for word in words),
        {"layers": layers, "B": batch, "S": tokens, "d": width, "H": heads, **options},
        preset,
        dtypes,
    )


def _gpu(preset: str, layers: int, batch: int, tokens: int, width: int, heads: int) -> tuple[Case, ...]:
    shape = (layers, batch, tokens, width, heads)
    return tuple(_case(preset, *shape, dropout_p=0.1, padded=p, dtypes=("bfloat16",)) for p in (False, True))


CASES = (
    _case("smoke", 2, 2, 5, 24, 4),
    _case("smoke", 2, 2, 5, 24, 4, dropout_p=0.5, padded=True),
    _case("quick", 4, 16, 128, 512, 8, dropout_p=0.1, dtypes=("float32", "bfloat16")),
    _case("quick", 4, 16, 128, 512, 8, padded=True),
    _case("full", 4, 4, 512, 512, 8, dropout_p=0.1, dtypes=("float32", "bfloat16")),
    _case("full", 4, 16, 128, 512, 8, dtypes=("float32", "bfloat16")),
    _case("full", 2, 8, 16, 64, 4, dropout_p=0.1),
    *_gpu("gpu", 4, 16, 512, 1024, 16),
    *_gpu("gpu-smoke", 2, 2, 5, 24, 4),
)


def _encoder(sizes: dict[str, Any]) -> nn.TransformerEncoder:
    """In training mode, its parameters without memory.

    With GELU: one ReLU of millions that falls on the other side of zero is more than all rounding errors together, and
    the check of correctness would be a lottery.
    """
    layer = nn.TransformerEncoderLayer(
        sizes["d"], sizes["H"], 4 * sizes["d"], sizes.get("dropout_p", 0.0), "gelu",
        batch_first=True, device="meta",
    )  # fmt: skip
    return nn.TransformerEncoder(layer, sizes["layers"])


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    batch, tokens, d = (case.sizes[name] for name in ("B", "S", "d"))
    result: Arguments = {"sizes": dict(case.sizes), "x": normal(generator, dtype, batch, tokens, d, grad=True)}
    if "dropout_p" in case.sizes:
        result["dropout_p"] = case.sizes["dropout_p"]
    if "padded" in case.sizes:
        device = generator.device
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator, device=device)
        result["padding"] = torch.arange(tokens, device=device) >= lengths
    for name, parameter in _encoder(dict(case.sizes)).named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        value = normal(generator, dtype, *parameter.shape, scale=scale)
        if "norm" in name and name.endswith("weight"):
            value = value + 1.0
        result[name] = value.requires_grad_()
    return result


def flops(case: Case, _: Arguments, backward: bool) -> float:
    """Projections and feed-forward network, 12 d^2 a token and layer, and the two products of attention."""
    layers, batch, tokens, d = (case.sizes[name] for name in ("layers", "B", "S", "d"))
    return 2.0 * float(layers * batch * tokens * (12 * d * d + 2 * tokens * d)) * (3.0 if backward else 1.0)


def _bound(model: nn.TransformerEncoder, arguments: Arguments) -> Run:
    parameters = {name: arguments[name] for name, _ in model.named_parameters()}
    inputs, masks = (arguments["x"],), {"src_key_padding_mask": arguments.get("padding")}
    return lambda: torch.func.functional_call(model, parameters, inputs, masks)


def _built(arguments: Arguments) -> nn.TransformerEncoder:
    # the checker takes dropout_p away to compare arithmetic
    return _encoder({**arguments["sizes"], "dropout_p": arguments.get("dropout_p", 0.0)})


def _eager(_: Case, a: Arguments) -> Run:
    return _bound(_built(a), a)


def _compile(_: Case, a: Arguments) -> Run:
    return compiled(_bound(_built(a), a))


def _accelerated(a: Arguments) -> Run:
    model = _built(a)
    lwft_kernels.accelerate(model)
    return _bound(model, a)


def _ours(_: Case, a: Arguments) -> Run:
    return _accelerated(a)


def _encode(**a: Any) -> Tensor:
    return _accelerated(a)()


_PROVIDERS: dict[str, Callable[[Case, Arguments], Run]] = {"eager": _eager, "compile": _compile, "lwft": _ours}
FAMILY = Family("nn.TransformerEncoder", CASES, arguments, flops, _PROVIDERS, ours=_encode)
