"""Replacing a module by giving the same object another class, and what a replaced forward must ask before it reads
the parts of a module instead of calling them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lwft_kernels.integrations.report import Change


def swapped(name: str, module: nn.Module, ours: type[nn.Module], now: str) -> Change:
    """The change that makes `module` an instance of `ours`, a subclass of its class, and back.

    The object, its parameters, buffers and hooks stay. Whatever somebody else has made of the module since (FSDP and
    parametrizations derive a class of their own) stays as they left it.
    """
    theirs = type(module)

    def apply() -> None:
        module.__class__ = ours

    def revert() -> None:
        if type(module) is ours:
            module.__class__ = theirs

    return Change(name, described(theirs), now, apply=apply, revert=revert)


def described(kind: type) -> str:
    """A class as users write it: nn.LayerNorm for torch.nn.modules.normalization.LayerNorm."""
    if kind.__module__.startswith("torch.nn.modules."):
        return f"nn.{kind.__name__}"
    return kind.__name__


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: what is read instead of called would miss it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_plain(weight: Any) -> bool:
    """A whole tensor in memory: no DTensor or quantised subclass, no ZeRO-3 placeholder."""
    return type(weight) in (nn.Parameter, Tensor) and not hasattr(weight, "ds_id")
