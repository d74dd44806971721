"""PEFT's LoRA layers on `lora_linear` and `lora_delta_`: what their forward computes here.

A layer is base(x) + sum over its adapters of B(A(dropout(x))) * scaling. The commonest call, one plain adapter on a
plain linear layer, is tried at once (`_simple`); every other is looked at (`_why_not`) and either served or left to
PEFT's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lwft_kernels import backend, checks, dropout, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations import reached
from lwft_kernels.integrations.class_swap import has_hooks, is_plain
from lwft_kernels.integrations.peft import dora
from lwft_kernels.lowrank import autograd


class LoraLinear(lora.Linear):
    """`peft.tuners.lora.Linear` on `lora_linear` and `lora_delta_`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: base(x) + B(A(dropout(x))) * scaling, in the dtype of the base result."""
        if not args and not kwargs and not torch.compiler.is_compiling():
            simple = _simple(self, x)
            if simple is not None:
                return simple
        served = lora_forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if served is None else served


def _simple(module: lora.Linear, x: Tensor) -> Tensor | None:
    """The call of one plain adapter on a plain base, or None where anything at all is out of the ordinary.

    A small layer takes less time than looking properly at what it is made of. So its parts are read from where
    nn.Module keeps them, past `nn.Module.__getattr__` and PEFT's properties, and nothing is remembered between calls.
    """
    state = module.__dict__
    modules = state["_modules"]
    name = state["_active_adapter"]
    if type(name) is not str:
        if len(name) != 1:
            return None
        name = name[0]
    if (
        state["_disable_adapters"]
        or state["merged_adapters"]
        or state["lora_variant"]
        or not state["cast_input_dtype_enabled"]
    ):
        return None
    down, up = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    base, drop = modules["base_layer"], modules["lora_dropout"]._modules.get(name)
    if type(base) is not nn.Linear or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    if type(drop) is not nn.Identity and type(drop) is not nn.Dropout:
        return None
    for part in (base, down, up, drop):
        own = part.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return None
    held, down_held, up_held = base._parameters, down._parameters, up._parameters
    weight, bias, a, b = held.get("weight"), held["bias"], down_held.get("weight"), up_held.get("weight")
    scale = state["scaling"][name]
    if (
        type(a) is not nn.Parameter
        or type(b) is not nn.Parameter
        or type(weight) is not nn.Parameter
        or (bias is not None and type(bias) is not nn.Parameter)
        or down_held["bias"] is not None
        or up_held["bias"] is not None
        or type(scale) is not float
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
        or _has_any_global_hook()
    ):
        return None
    # What a placeholder of ZeRO-3, another dtype or another shape would be, the op refuses.
    if type(drop) is nn.Dropout and drop.training and drop.p:
        if drop.inplace:
            return None
        seed, dropout_p = dropout.draw_seed(x.device), drop.p
    else:
        seed, dropout_p = None, 0.0
    out: Tensor | None = backend.attempt(
        "lora_linear", autograd.lora_linear, x, weight, bias, a, b, None, seed, scale, dropout_p
    )
    if out is not None:
        reached.mark(module)
    return out


def lora_forward(module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of a LoRA layer for the arguments of its forward, or None (and the reason counted) for PEFT to give.

    Args:
        module: a `LoraLayer` with a `base_layer` and adapters in `lora_A` and `lora_B`.
        x, args, kwargs: as its forward was given them. `adapter_names` chooses an adapter per row of the batch.
    """
    names = kwargs.get("adapter_names")
    chosen = module.active_adapters if names is None else dict.fromkeys(names)
    adapters = [name for name in chosen if name in module.lora_A]
    reason = _why_not(module, x, adapters, names)
    if reason is not None:
        backend.record_decline(op_name(module), reason)
        return None
    reached.mark(module)
    if names is not None:
        module._check_forward_args(x, *args, **kwargs)
        branches = _mixed(module, x, adapters, names)
    else:
        branches = [_branch(module, name) for name in adapters]
    own = {"adapter_names", *VARIANT_KWARG_KEYS}  # the rest is the base layer's
    return _sum(module, x, branches, args, {key: value for key, value in kwargs.items() if key not in own})


def op_name(module: nn.Module) -> str:
    """As the declined calls of a layer are named in `stats`: by PEFT's class."""
    return f"peft lora.{type(module).__mro__[1].__name__}"


@dataclass
class _Branch:
    """scale * dropout(x) A^T B^T, of one adapter or of several stacked, and the bias of B where it has one."""

    name: str
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float
    bias: Tensor | None = None
    index: Tensor | None = None


def _branch(module: Any, name: str) -> _Branch:
    up = module.lora_B[name]
    return _Branch(
        name, module.lora_A[name].weight, up.weight, module.scaling[name], _dropout_p(module, name), up.bias
    )  # fmt: skip


def _dropout_p(module: Any, name: str) -> float:
    part = module.lora_dropout[name]
    return part.p if isinstance(part, nn.Dropout) and part.training else 0.0


def _mixed(module: Any, x: Tensor, adapters: list[str], names: list[str]) -> list[_Branch]:
    """Stacked adapters and the row's place among them: one branch for all that share a dropout probability."""
    groups: dict[float, list[str]] = {}
    for name in adapters:
        groups.setdefault(_dropout_p(module, name), []).append(name)
    branches = []
    for dropout_p, group in groups.items():
        rank = max(module.lora_A[name].weight.shape[0] for name in group)
        down, up = [], []
        for name in group:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight * module.scaling[name]
            missing = rank - a.shape[0]
            down.append(F.pad(a, (0, 0, 0, missing)) if missing else a)
            up.append(F.pad(b, (0, missing)) if missing else b)
        place = {name: i for i, name in enumerate(group)}
        index = torch.tensor([place.get(name, -1) for name in names], device=x.device)
        branches.append(_Branch("", torch.stack(down), torch.stack(up), 1.0, dropout_p, index=index))
    return branches


def _sum(module: Any, x: Tensor, branches: list[_Branch], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    base = module.base_layer
    fused = (
        not args
        and not kwargs
        and is_plain_linear(base)
        and (base.weight.dtype == x.dtype or checks.autocast_dtype(x.device) is not None)
    )
    result: Tensor | None = None
    for branch in branches:
        if branch.name in module.lora_variant:
            result = dora.forward(module, branch.name, x, base(x, *args, **kwargs) if result is None else result)
            continue
        options: dict[str, Any] = {
            "scale": branch.scale, "dropout_p": branch.dropout_p, "adapter_index": branch.index
        }  # fmt: skip
        if result is None and fused:
            weight, bias = weight_and_bias(base)
            if branch.bias is not None and branch.bias.dtype == weight.dtype:
                scaled = branch.bias * branch.scale
                bias, branch.bias = scaled if bias is None else bias + scaled, None
            result = LF.lora_linear(x, weight, bias, branch.a, branch.b, **options)
        else:
            if result is None:
                result = _base_result(base, x, args, kwargs)
            result = LF.lora_delta_(result, x, branch.a, branch.b, **options)
        if branch.bias is not None:
            result = (result + branch.bias * branch.scale).to(result.dtype)
    if result is None:  # a mixed batch of which no row has an adapter here
        result = _base_result(base, x, args, kwargs)
    return result


def _base_result(base: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the base computes by itself (quantised, offloaded, hooked), in memory that may be written to."""
    result: Tensor = base(x, *args, **kwargs)
    # A hook may have kept it, another layer saved it for its backward.
    return result if is_plain_linear(base) and not result._is_view() else result.clone()


def is_plain_linear(base: nn.Module) -> bool:
    """Whether `base` is a linear layer of which reading the weight, instead of calling it, is the same thing."""
    return (
        type(base) in (nn.Linear, Conv1D)
        and not has_hooks(base)
        and is_plain(base.weight)
        and (base.bias is None or is_plain(base.bias))
    )


def weight_and_bias(base: Any) -> tuple[Tensor, Tensor | None]:
    """(d_out, d_in), (d_out,) of a linear layer; Conv1D keeps its weight the other way round."""
    return (base.weight.t() if type(base) is Conv1D else base.weight), base.bias


def _why_not(module: Any, x: Any, adapters: list[str], names: list[str] | None) -> str | None:
    """Why the ops cannot serve this call, or None."""
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "the adapter is merged"
    if not adapters and names is None:
        return "no adapter is active"
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested or x.dim() < 2:
        return "the input is not a plain tensor of two or more dimensions"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "cast_input_dtype_enabled is off"
    for name in adapters:
        reason = _why_not_adapter(module, name, x, names is not None)
        if reason is not None:
            return reason
    if names is not None and len({module.lora_A[name].weight.dtype for name in adapters}) > 1:
        return "the adapters of the batch differ in dtype"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not_native("lora_linear", x.device)


def _why_not_adapter(module: Any, name: str, x: Tensor, mixed: bool) -> str | None:
    a, b, part = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    for factor in (a, b):
        if type(factor) is not nn.Linear:
            return f"the adapter's layer is a {type(factor).__name__}"
        if not is_plain(factor.weight):
            return "the adapter's weights are sharded or of a tensor subclass"
    if a.bias is not None:
        return "lora_A has a bias"
    if any(has_hooks(layer) for layer in (a, b, part)):
        return "the adapter's layers have hooks"
    if type(part) not in (nn.Dropout, nn.Identity) or getattr(part, "inplace", False):
        return f"the dropout is {part}"
    if a.weight.dtype != b.weight.dtype:
        return "lora_A and lora_B differ in dtype"
    if b.bias is not None and mixed:
        return "lora_bias in a mixed batch"
    if not isinstance(module.scaling[name], (int, float)):
        return f"the scaling is a {type(module.scaling[name]).__name__}"
    if x.device != a.weight.device:
        return "input and adapter are on different devices"
    if not x.is_floating_point() or (checks.autocast_dtype(x.device) is None and not _goes_with(a.weight, x)):
        return f"an adapter of {a.weight.dtype} on an input of {x.dtype}"
    if name in module.lora_variant:
        variant = type(module.lora_variant[name]).__name__
        if mixed:
            return f"the LoRA variant {variant} in a mixed batch"
        return dora.why_not(module, name)
    return None


def _goes_with(weight: Tensor, x: Tensor) -> bool:
    """The op takes parameters in the dtype of x, or wider ones (float32) beside 16-bit activations."""
    return weight.dtype == x.dtype or (weight.dtype.itemsize == 4 and x.dtype.itemsize == 2)
