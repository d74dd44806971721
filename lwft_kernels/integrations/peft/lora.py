"""PEFT's LoRA layers, by class swap: subclasses whose forward is ours where it can be, else PEFT's own.

The module stays the same object with the same parameters, so state_dict, merging, adapter switching, saving and
copying are PEFT's as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lwft_kernels.integrations import drift
from lwft_kernels.integrations.class_swap import described, difference, swapped
from lwft_kernels.integrations.frozen_linear import LINEAR
from lwft_kernels.integrations.peft import dora, lora_attention, lora_layer, quantised
from lwft_kernels.integrations.report import Change
from lwft_kernels.lowrank import prepack as packing


class _Swap(NamedTuple):
    ours: type[nn.Module]
    now: str
    upstream: Callable[[], drift.Upstream]


def plan(model: nn.Module, *, strict: bool = False, prepack: bool = False) -> list[Change]:
    """A change per LoRA layer of `model`; those that are not exactly of a class known here are left alone.

    If `prepack`, after each layer that ours computes, one for the weight of its base layer.
    """
    # An adapter may be added later, so DoRA's verdict is kept for the calls too.
    dora.refused = drift.why_not(_dora_upstream(), strict=False)
    changes = []
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values()) if prepack else Counter()
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        was = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
        reason = _why_not_module(module, strict)
        if reason is not None:
            changes.append(Change(name, was, reason=reason))
        else:
            swap = _swap(type(module))
            assert swap is not None
            change = swapped(name, module, swap.ours, swap.now)
            change.was = was
            changes.append(change)
        if prepack and (reason is None or type(module) is lora_layer.Linear):
            changes.append(_prepacked(name, module, uses))
    return changes


def _prepacked(name: str, module: Any, uses: Counter[int]) -> Change:
    """The change that packs the weight of a LoRA layer's base, and back. `uses` counts where a parameter is held."""
    base = module.base_layer
    change = Change(f"{name}.base_layer" if name else "base_layer", f"the weight of {described(type(base))}")
    if type(base) not in LINEAR:
        change.reason = f"only the weight of an nn.Linear is packed, not of {type(base).__name__}"
    elif not isinstance(module, lora.Linear):
        change.reason = f"a {type(module).__name__} reads its weight otherwise than lora_linear does"
    elif module.lora_variant:
        variant = type(next(iter(module.lora_variant.values()))).__name__
        change.reason = f"{variant} reads it otherwise than lora_linear does"
    elif uses[id(base.weight)] > 1:
        change.reason = "another module has the same weight"
    else:
        change.reason = packing.why_not(base)
    if change.reason is not None:
        return change

    def apply() -> str | None:
        reason = packing.prepack(base)
        if reason is None:
            change.now = f"packed ({packing.described(packing.measured(base.weight))})"
        return reason

    change.now, change.apply, change.revert = "packed, if that is faster", apply, lambda: packing.unpack(base)
    return change


def _swap(kind: type) -> _Swap | None:
    """What a layer of exactly this class is replaced by."""
    if kind is lora.Linear:
        return _Swap(lora_layer.Linear, "lora_linear", _linear_upstream)
    if kind is lora.MultiheadAttention:
        return _Swap(lora_attention.MultiheadAttention, "lora_linear, attention", _attention_upstream)
    ours: type[nn.Module] | None = quantised.derived(kind)
    return None if ours is None else _Swap(ours, "lora_delta_", lambda: _quantised_upstream(kind, ours))


def _why_not_module(module: nn.Module, strict: bool) -> str | None:
    kind = type(module)
    if kind.__module__.startswith(__package__):
        return "replaced already"
    swap = _swap(kind)
    if swap is None:
        return _LEFT.get(kind, f"no {kind.__name__} is known here (PEFT {peft.__version__})")
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    reason = drift.why_not(swap.upstream(), strict)
    variants: dict[str, Any] = module.__dict__["lora_variant"]
    if reason is None and any(type(v) is DoraLinearVariant for v in variants.values()):
        reason = drift.why_not(_dora_upstream(), strict)
    return reason


# ---- what is overridden, and how it is tried where PEFT is not one that was tested ----


def _linear_upstream() -> drift.Upstream:
    linear = lora.Linear
    return drift.Upstream(
        "peft.tuners.lora.Linear.forward",
        (linear.forward, linear._check_forward_args, linear._mixed_batch_forward, BaseTunerLayer._cast_input_dtype),
        frozenset({"40868a5c556bd366"}),
        lambda: _differs(lora.Linear, lora_layer.Linear),
    )


def _dora_upstream() -> drift.Upstream:
    layer = DoraLinearLayer
    return drift.Upstream(
        "peft.tuners.lora.variants.DoraLinearVariant.forward",
        (DoraLinearVariant.forward, layer.forward, layer.get_weight_norm, layer.get_lora_weight),
        frozenset({"5e8b7fb5b80ed4dd"}),
        lambda: _differs(lora.Linear, lora_layer.Linear, use_dora=True),
    )


def _attention_upstream() -> drift.Upstream:
    attention = lora.MultiheadAttention
    return drift.Upstream(
        "peft.tuners.lora.MultiheadAttention.forward",
        (attention.forward, attention.merge, attention.unmerge, attention.get_delta_weight, lora.Linear.merge),
        frozenset({"ac74c13d9e83d6bd"}),
        lambda: _differs(lora.MultiheadAttention, lora_attention.MultiheadAttention),
    )


def _quantised_upstream(kind: Any, ours: type[nn.Module]) -> drift.Upstream:
    if kind.forward is lora.Linear.forward:
        return _linear_upstream()
    known = frozenset(_QUANTISED)
    name = f"peft.tuners.lora.{kind.__name__}.forward"
    return drift.Upstream(name, (kind.forward,), known, lambda: _differs(kind, ours))


def _differs(upstream: type[nn.Module], ours: type[nn.Module], **options: Any) -> str | None:
    """Forward and backward of a tiny layer by both classes; what differs, or None."""
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options)
    width, dtype = 6, torch.float64
    attention = issubclass(upstream, lora.MultiheadAttention)
    base = nn.MultiheadAttention(width, 2) if attention else nn.Linear(width, 5)
    build: Any = upstream
    layer = build(base, "default", config=config, r=2, lora_alpha=3).to(dtype)
    base.requires_grad_(False)
    for parameter in (p for name, p in layer.named_parameters() if "lora_" in name):
        parameter.requires_grad_(True)
    x = torch.randn(3, 4, width, dtype=dtype, requires_grad=True)

    def calls(layer: Any) -> dict[str, Tensor]:
        out = layer(x, x, x, need_weights=False)[0] if attention else layer(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        return {"the result": out, "the gradient of x": grad}

    return difference(layer, ours, calls)


# Aqlm, Awq, GPTQ, Hqq, 4-bit and 8-bit of bitsandbytes in PEFT 0.21.2
_QUANTISED = (
    "52a19cff6f7fa636",
    "963ad92001810669",
    "71c33945a88b3270",
    "8ffb31d9037b542d",
    "d9f83dbb85194239",
    "4821d14d34d9872a",
)

_LEFT = {
    lora.Embedding: "a lookup of rank-r rows: there is no pass over activations to save",
    lora.Conv1d: "a convolution's branch is two convolutions; there is no kernel for them",
    lora.Conv2d: "a convolution's branch is two convolutions; there is no kernel for them",
    lora.Conv3d: "a convolution's branch is two convolutions; there is no kernel for them",
    lora.ParamWrapper: "it changes a parameter that somebody else's forward reads",
}
