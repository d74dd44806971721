"""PEFT's `lora.Linear`, by class swap: a subclass whose forward is one op, else PEFT's own forward.

The module stays the same object with the same parameters, so state_dict, merging, adapter switching, saving
and copying are PEFT's as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations.report import Change

_OP = "peft lora.Linear"  # as declined calls are named in stats()


class LoraLinear(lora.Linear):
    """`peft.tuners.lora.Linear` on `lora_linear` and `lora_delta_`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: base(x) + B(A(dropout(x))) * scaling, in the dtype of the base result."""
        reason = _why_not(self, x, args, kwargs)
        if reason is not None:
            backend.record_decline(_OP, reason)
            declined: Tensor = super().forward(x, *args, **kwargs)
            return declined
        name = _active(self)
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        base = self.base_layer
        if _is_plain_frozen_linear(base) and (
            base.weight.dtype == x.dtype or checks.autocast_dtype(x.device) is not None
        ):
            return LF.lora_linear(x, base.weight, base.bias, a, b, scale=scale, dropout_p=p)
        # A quantised, offloaded, hooked or trained base computes itself.
        result: Tensor = base(x)
        if not _is_ours(base, result):
            result = result.clone()
        return LF.lora_delta_(result, x, a, b, scale=scale, dropout_p=p)


def _is_ours(base: nn.Module, result: Tensor) -> bool:
    """Whether nobody else holds `result`: a hook may have kept it, another layer saved it for backward."""
    return type(base) in (nn.Linear, Conv1D) and not _has_hooks(base) and not result._is_view()


def _active(module: lora.Linear) -> str:
    name: str = next(name for name in module.active_adapters if name in module.lora_A)
    return name


def _why_not(module: lora.Linear, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the op cannot serve this call, or None."""
    if args or any(value is not None for value in kwargs.values()):
        known = ("adapter_names", *VARIANT_KWARG_KEYS)
        given = [key for key, value in kwargs.items() if value is not None]
        return f"{' and '.join(k for k in given if k in known) or 'further arguments'} given"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "the adapter is merged"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    name = active[0]
    if name in module.lora_variant:
        return f"the LoRA variant {type(module.lora_variant[name]).__name__}"
    if module.lora_bias.get(name):
        return "lora_bias"
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    for part in (a, b):
        if type(part) is not nn.Linear:
            return f"the adapter's layer is a {type(part).__name__}"
        if not _is_plain(part.weight):
            return "the adapter's weights are sharded or of a tensor subclass"
    if any(_has_hooks(part) for part in (a, b, dropout)):
        return "the adapter's layers have hooks"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"the dropout is a {type(dropout).__name__}"
    if a.weight.dtype != b.weight.dtype:
        return "lora_A and lora_B differ in dtype"
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested or x.dim() < 2:
        return "the input is not a plain tensor of two or more dimensions"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if x.device != a.weight.device:
        return "input and adapter are on different devices"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "cast_input_dtype_enabled is off"
    if not x.is_floating_point() or (checks.autocast_dtype(x.device) is None and not _goes_with(a.weight, x)):
        return f"an adapter of {a.weight.dtype} on an input of {x.dtype}"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not_native("lora_linear", x.device)


def _goes_with(weight: Tensor, x: Tensor) -> bool:
    """The op takes parameters in the dtype of x, or wider ones (float32) beside 16-bit activations."""
    return weight.dtype == x.dtype or (weight.dtype.itemsize == 4 and x.dtype.itemsize == 2)


def _is_plain(weight: Any) -> bool:
    """A whole tensor in memory: no DTensor or quantised subclass, no ZeRO-3 placeholder."""
    return type(weight) is nn.Parameter and not hasattr(weight, "ds_id")


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_plain_frozen_linear(base: nn.Module) -> bool:
    """Whether reading base.weight instead of calling base is the same thing."""
    return (
        type(base) is nn.Linear
        and not _has_hooks(base)
        and _is_plain(base.weight)
        and not base.weight.requires_grad
        and (base.bias is None or (_is_plain(base.bias) and not base.bias.requires_grad))
    )


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per LoRA layer of `model`; those that are not exactly PEFT's `lora.Linear` are left alone."""
    changes = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        was = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
        reason = _why_not_module(module)
        if reason is not None:
            changes.append(Change(name, was, reason=reason))
        else:
            swapped = Change(name, was, "lora_linear")
            swapped.apply, swapped.revert = _swap(module), _swap_back(module)
            changes.append(swapped)
    return changes


def _why_not_module(module: nn.Module) -> str | None:
    if type(module) is LoraLinear:
        return "replaced already"
    if type(module) is not lora.Linear:
        return f"only lora.Linear is known (PEFT {peft.__version__})"
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    return None


def _swap(module: nn.Module) -> Callable[[], None]:
    def swap() -> None:
        module.__class__ = LoraLinear

    return swap


def _swap_back(module: nn.Module) -> Callable[[], None]:
    def swap_back() -> None:
        if type(module) is LoraLinear:
            module.__class__ = lora.Linear

    return swap_back
