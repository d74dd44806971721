"""Replacing a module by giving the same object another class, and what a replaced forward must ask before it reads
the parts of a module instead of calling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lwft_kernels.integrations import drift
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


def difference(
    module: nn.Module, ours: type[nn.Module], calls: Callable[[nn.Module], Mapping[str, Tensor]]
) -> str | None:
    """What `module`, of float64, and the same one swapped differ in, or None: for the self-test of the drift guard.

    Compared are the results of `calls`, by name, and the gradients of the parameters that are trained.
    """
    found = []
    for kind in (type(module), ours):
        module.__class__ = kind
        results = calls(module)
        total = torch.cat([out.flatten() * torch.linspace(-1, 1, out.numel()) for out in results.values()]).sum()
        # all in one: that of a key's bias is nothing but rounding errors, however it is computed
        gradients = torch.autograd.grad(total, [p for p in module.parameters() if p.requires_grad])
        found.append({**results, "the gradient of the parameters": torch.cat([grad.flatten() for grad in gradients])})
    return drift.first_difference(found[1], found[0])


def described(kind: type) -> str:
    """A class as users write it: nn.LayerNorm for torch.nn.modules.normalization.LayerNorm."""
    if kind.__module__.startswith("torch.nn.modules."):
        return f"nn.{kind.__name__}"
    return kind.__name__


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: what is read instead of called would miss it."""
    return has_own_hooks(module) or _has_any_global_hook()


def has_own_hooks(module: nn.Module) -> bool:
    """`has_hooks`, but for the hooks that are registered for all modules."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


PLAIN = (Tensor, nn.Parameter)  # the classes of whole tensors: no DTensor, no quantised or other subclass


def is_plain(weight: Any) -> bool:
    """A whole tensor in memory: of a plain class, and no ZeRO-3 placeholder."""
    return type(weight) in PLAIN and not hasattr(weight, "ds_id")
