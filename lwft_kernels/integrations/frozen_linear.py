"""Linear layers that are not trained and carry no adapter, by class swap: `frozen_linear` where it is faster.

In a fine-tune with adapters they are most of the work: the feed-forward layers, and of attention what has no adapter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwft_kernels import backend
from lwft_kernels import functional as LF
from lwft_kernels.integrations import drift, reached
from lwft_kernels.integrations.class_swap import PLAIN, described, is_plain, swapped
from lwft_kernels.integrations.report import Change
from lwft_kernels.lowrank import frozen

_MANY_ROWS = 1 << 12  # for which a layer is asked whether it is ever faster


class Linear(nn.Linear):
    """`nn.Linear` on the op `frozen_linear`. Its name stays: FSDP and device maps look layers up by it."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear.forward`. Weights that are trained after all, or sharded, or quantised, are torch's."""
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if type(input) is Tensor and input.is_cpu and not traced and backend.leave_small_calls:
            # so many calls of a model that generates are small that a microsecond counts
            d_in, d_out = self.in_features, self.out_features
            if d_in and frozen.is_own(input.dtype, input.numel() // d_in, d_in, d_out) is False:
                reached.mark(self)
                backend.small_calls["frozen_linear"] += 1
                return F.linear(input, self.weight, self.bias)
        weight, bias = self.weight, self.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            backend.record_decline("frozen_linear", "the layer is trained by now")
        elif type(weight) in PLAIN:
            reached.mark(self)
            return LF.frozen_linear(input, weight, bias)
        return F.linear(input, weight, bias)


# The classes whose weight and bias may be read instead of calling the layer. Ours is swapped in where nobody does, but
# an adapter may be put around it later.
LINEAR = (nn.Linear, Linear)


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per `nn.Linear` that is frozen, large enough, and called by whoever holds it; the others are not listed.

    None at all on a processor without a product of ours.
    """
    changes: list[Change] = []
    refused: str | None = None
    for name, module in _called(model):
        if type(module) is Linear:
            changes.append(Change(name, "nn.Linear", reason="replaced already"))
        elif type(module) is nn.Linear and _gains(module):
            if not changes:
                refused = drift.why_not(_upstream(), strict)
            reason = "somebody else has replaced its forward" if "forward" in module.__dict__ else refused
            if reason is None:
                changes.append(swapped(name, module, Linear, "frozen_linear"))
            else:
                changes.append(Change(name, described(type(module)), reason=reason))
    return changes


def _gains(linear: nn.Linear) -> bool:
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or not is_plain(weight) or weight.requires_grad or weight.device.type != "cpu":
        return False
    if bias is not None and (not is_plain(bias) or bias.requires_grad or bias.dtype != weight.dtype):
        return False
    d_out, d_in = weight.shape
    return frozen.is_own(weight.dtype, _MANY_ROWS, d_in, d_out) is True


def _called(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of `model` but the parts of adapters, which other rooms, or the adapters themselves, read."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found.append((name, module))
        if _reads_its_parts(type(module)):
            return
        for child, part in module._modules.items():
            if part is not None:
                walk(f"{name}.{child}" if name else child, part)

    walk("", model)
    return found


def _reads_its_parts(kind: type[nn.Module]) -> bool:
    for base in kind.__mro__:
        library = base.__module__
        if library.startswith("peft.") and not issubclass(kind, _peft_models()):
            return True
        if library.startswith("adapters.methods."):
            return True
        if library.startswith("lwft_kernels.") and not library.startswith("lwft_kernels.integrations."):
            return True
    return False


def _peft_models() -> tuple[type, ...]:
    """PEFT's classes that hold a whole model and only call it."""
    peft: Any = sys.modules["peft"]
    found = (getattr(peft, name, None) for name in ("PeftModel", "PeftMixedModel"))
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    return tuple(kind for kind in (*found, tuner) if kind is not None)


def _upstream() -> drift.Upstream:
    return drift.Upstream("torch.nn.Linear.forward", (nn.Linear.forward,), frozenset({"6f8ba4c6c21adc54"}), _self_test)


def _self_test() -> str | None:
    linear = nn.Linear(8, 16, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)

    def calls(layer: nn.Module) -> dict[str, Tensor]:
        out = layer(x)
        return {"out": out, "the gradient of the input": torch.autograd.grad(out.square().sum(), x)[0]}

    theirs = calls(linear)
    linear.__class__ = Linear
    return drift.first_difference(calls(linear), theirs)
