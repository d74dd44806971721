"""PEFT's LoRA layers, by class swap: subclasses whose forward is ours where it can be, else PEFT's own.

The module stays the same object with the same parameters, so state_dict, merging, adapter switching, saving and
copying are PEFT's as before.
"""

from __future__ import annotations

import peft
from peft.tuners import lora
from torch import nn

from lwft_kernels.integrations.class_swap import swapped
from lwft_kernels.integrations.peft.lora_layer import LoraLinear
from lwft_kernels.integrations.report import Change


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per LoRA layer of `model`; those that are not exactly of a class known here are left alone."""
    changes = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        was = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
        reason = _why_not_module(module)
        if reason is not None:
            changes.append(Change(name, was, reason=reason))
        else:
            change = swapped(name, module, LoraLinear, "lora_linear")
            change.was = was
            changes.append(change)
    return changes


def _why_not_module(module: nn.Module) -> str | None:
    if type(module) is LoraLinear:
        return "replaced already"
    if type(module) is not lora.Linear:
        return f"only lora.Linear is known (PEFT {peft.__version__})"
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    return None
