"""PEFT's LoRA layers on `lora_linear` and `lora_delta_`: what their forward computes here.

A layer is base(x) + sum over its adapters of B(A(dropout(x))) * scaling. A small layer takes less time than a proper
look at what it is made of. So its parts are read from where nn.Module keeps them, past `nn.Module.__getattr__` and
PEFT's properties; nothing is remembered from one call to the next, so that nothing can be out of date.
"""

from __future__ import annotations

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
from lwft_kernels.integrations.class_swap import PLAIN, has_hooks, has_own_hooks, is_plain
from lwft_kernels.integrations.frozen_linear import LINEAR
from lwft_kernels.integrations.peft import dora, few_tokens
from lwft_kernels.lowrank import autograd
from lwft_kernels.lowrank.packed_weight import PackedWeight, operand


class Linear(lora.Linear):
    """`peft.tuners.lora.Linear` on `lora_linear` and `lora_delta_`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: base(x) + B(A(dropout(x))) * scaling, in the dtype of the base result."""
        if not args and not kwargs:
            simple = _simple(self, x)
            if simple is not None:
                return simple
        served = lora_forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if served is None else served


class _Branch:
    """scale * (dropout(x) A^T B^T + bias) of one adapter, or of several stacked, chosen by `index`."""

    __slots__ = ("a", "b", "bias", "dropout_p", "index", "name", "scale")

    def __init__(
        self,
        name: str,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout_p: float,
        index: Tensor | None = None,
    ) -> None:
        self.name, self.a, self.b, self.bias = name, a, b, bias
        self.scale, self.dropout_p, self.index = scale, dropout_p, index


def _simple(module: lora.Linear, x: Tensor) -> Tensor | None:
    """The call of one plain adapter on a plain linear layer, or None where anything at all is out of the ordinary.

    The input is not looked at: what does not go with the weights (another dtype, device or shape), the op refuses.
    """
    state = module.__dict__
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
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
        or torch.compiler.is_compiling()
    ):
        return None
    base = state["_modules"]["base_layer"]
    parts = _parts(module, name)
    if isinstance(parts, str) or type(base) not in LINEAR or has_own_hooks(base):
        return None
    a, b, lora_bias, scale, dropout_p = parts
    if lora_bias is not None:
        return None
    held = base._parameters
    weight: Any = held.get("weight")
    bias = held["bias"]
    if type(weight) is PackedWeight and not weight.requires_grad:
        weight = weight.blocks
    elif type(weight) is not nn.Parameter:
        return None
    if bias is not None and type(bias) is not nn.Parameter:
        return None
    if not backend.attempts(x):
        return None
    seed = dropout.draw_seed(x.device) if dropout_p else None
    out: Tensor | None = autograd.try_lora_linear(x, weight, bias, a, b, None, seed, scale, dropout_p)
    if out is not None:
        reached.mark(module)
        if weight is not held["weight"]:
            reached.mark(base)
    return out


_Parts = tuple[Tensor, Tensor, Tensor | None, float, float]  # A, B, the bias of B, scale, dropout probability


def _parts(module: Any, name: str) -> _Parts | str:
    """The adapter `name` of a layer as the ops take it, or why its layers must be called instead of read."""
    state = module.__dict__
    modules = state["_modules"]
    down, up = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    part = modules["lora_dropout"]._modules.get(name)
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"the adapter's layer is a {type(up if type(down) is nn.Linear else down).__name__}"
    if has_own_hooks(down) or has_own_hooks(up) or has_own_hooks(part) or _has_any_global_hook():
        return "the adapter's layers have hooks"
    if type(part) is nn.Dropout and not part.inplace:
        dropout_p = part.p if part.training else 0.0
    elif type(part) is nn.Identity:
        dropout_p = 0.0
    else:
        return f"the dropout is {part}"
    down_held, up_held = down._parameters, up._parameters
    a, b, bias = down_held.get("weight"), up_held.get("weight"), up_held["bias"]
    if (
        type(a) is not nn.Parameter
        or type(b) is not nn.Parameter
        or hasattr(a, "ds_id")
        or hasattr(b, "ds_id")
        or (bias is not None and not is_plain(bias))
    ):
        return "the adapter's weights are sharded or of a tensor subclass"
    if down_held["bias"] is not None:
        return "lora_A has a bias"
    scale = state["scaling"][name]
    if type(scale) is not float:
        if type(scale) is not int:
            return f"the scaling is a {type(scale).__name__}"
        scale = float(scale)
    return a, b, bias, scale, dropout_p


def lora_forward(module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of a LoRA layer for the arguments of its forward, or None (and the reason counted) for PEFT to give.

    Args:
        module: a `LoraLayer` with a `base_layer` and adapters in `lora_A` and `lora_B`.
        x, args, kwargs: as its forward was given them. `adapter_names` chooses an adapter per row of the batch.
    """
    names = kwargs.get("adapter_names")
    chosen = module.active_adapters if names is None else dict.fromkeys(names)
    known = module.lora_A._modules
    reason = _why_not(module, x)
    branches: list[_Branch] = []
    for name in () if reason is not None else chosen:
        if name in known:
            parts = _parts(module, name)
            if isinstance(parts, str):
                reason = parts
                break
            branches.append(_Branch(name, *parts))
            reason = _why_not_branch(module, branches[-1], x, names is not None)
            if reason is not None:
                break
    if reason is None and not branches and names is None:
        reason = "no adapter is active"
    if reason is None and names is not None and len({branch.a.dtype for branch in branches}) > 1:
        reason = "the adapters of the batch differ in dtype"
    if reason is not None:
        backend.record_decline(op_name(module), reason)
        return None
    reached.mark(module)
    if names is not None:
        module._check_forward_args(x, *args, **kwargs)
        branches = _stacked(branches, names, x)
    if kwargs:  # what is not PEFT's own is the base layer's
        kwargs = {key: v for key, v in kwargs.items() if key != "adapter_names" and key not in VARIANT_KWARG_KEYS}
    return _sum(module, x, branches, args, kwargs)


def op_name(module: nn.Module) -> str:
    """As the declined calls of a layer are named in `stats`: by PEFT's class."""
    return f"peft lora.{type(module).__name__}"


def _why_not(module: Any, x: Any) -> str | None:
    """Why the ops cannot serve a call on `x`, whatever the adapter, or None."""
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "the adapter is merged"
    if type(x) not in PLAIN or x.layout != torch.strided or x.is_nested or x.dim() < 2:
        return "the input is not a plain tensor of two or more dimensions"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if not module.cast_input_dtype_enabled:
        return "cast_input_dtype_enabled is off"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not("lora_linear", x.device)


def _why_not_branch(module: Any, branch: _Branch, x: Tensor, mixed: bool) -> str | None:
    """Why the ops cannot serve this adapter on `x`, or None."""
    a = branch.a
    if a.dtype != branch.b.dtype:
        return "lora_A and lora_B differ in dtype"
    if x.device != a.device:
        return "input and adapter are on different devices"
    # the ops take parameters in the dtype of x, or wider ones (float32) beside 16-bit activations
    fits = a.dtype == x.dtype or (a.dtype.itemsize == 4 and x.dtype.itemsize == 2)
    if not x.is_floating_point() or not (fits or checks.autocast_dtype(x.device) is not None):
        return f"an adapter of {a.dtype} on an input of {x.dtype}"
    if mixed and branch.bias is not None:
        return "lora_bias in a mixed batch"
    if branch.name in module.lora_variant:
        if mixed:
            return f"the LoRA variant {type(module.lora_variant[branch.name]).__name__} in a mixed batch"
        return dora.why_not(module, branch.name)
    return None


def _stacked(branches: list[_Branch], names: list[str], x: Tensor) -> list[_Branch]:
    """One branch of stacked adapters for all that share a dropout probability, with the place of each row's."""
    groups: dict[float, list[_Branch]] = {}
    for branch in branches:
        groups.setdefault(branch.dropout_p, []).append(branch)
    result = []
    for dropout_p, group in groups.items():
        rank = max(branch.a.shape[0] for branch in group)
        down, up = [], []
        for branch in group:
            missing = rank - branch.a.shape[0]
            down.append(F.pad(branch.a, (0, 0, 0, missing)) if missing else branch.a)
            b = branch.b if branch.scale == 1.0 else branch.b * branch.scale
            up.append(F.pad(b, (0, missing)) if missing else b)
        place = {branch.name: i for i, branch in enumerate(group)}
        index = torch.tensor([place.get(name, -1) for name in names], device=x.device)
        result.append(_Branch("", torch.stack(down), torch.stack(up), None, 1.0, dropout_p, index))
    return result


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
        bias = branch.bias
        if result is None and fused:
            weight, base_bias = weight_and_bias(base)
            if type(weight) is PackedWeight:
                reached.mark(base)
            if bias is not None and bias.dtype == weight.dtype:
                scaled = bias * branch.scale
                base_bias, bias = scaled if base_bias is None else base_bias + scaled, None
            result = _with_base(x, weight, base_bias, branch)
        else:
            if result is None:
                result = _base_result(module, x, args, kwargs)
            result = LF.lora_delta_(
                result, x, branch.a, branch.b, scale=branch.scale, dropout_p=branch.dropout_p,
                adapter_index=branch.index,
            )  # fmt: skip
        if bias is not None:
            result = (result + bias * branch.scale).to(result.dtype)
    if result is None:  # a mixed batch of which no row has an adapter here
        result = _base_result(module, x, args, kwargs)
    return result


def _with_base(x: Tensor, weight: Tensor, bias: Tensor | None, branch: _Branch) -> Tensor:
    tokens = branch.index
    if tokens is not None:
        tokens = tokens.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]).reshape(-1)
    if backend.attempts(x):
        seed = dropout.draw_seed(x.device) if branch.dropout_p else None
        found: Tensor | None = autograd.try_lora_linear(
            x, operand(weight), bias, branch.a, branch.b, tokens, seed,
            branch.scale, branch.dropout_p,
        )  # fmt: skip
        if found is not None:
            return found
    return LF.lora_linear(
        x, weight, bias, branch.a, branch.b, scale=branch.scale, dropout_p=branch.dropout_p,
        adapter_index=branch.index,
    )  # fmt: skip


def _base_result(module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the base computes by itself (quantised, offloaded, hooked), in memory that may be written to."""
    base = module.base_layer
    if not args and not kwargs:
        for_few_tokens = few_tokens.result(base, x)
        if for_few_tokens is not None:
            return for_few_tokens
    if type(getattr(base, "weight", None)) is PackedWeight:
        backend.record_decline(op_name(module), "a packed weight is unpacked for a base layer that must be called")
    result: Tensor = base(x, *args, **kwargs)
    # A hook may have kept it, another layer saved it for its backward.
    return result if is_plain_linear(base) and not result._is_view() else result.clone()


def is_plain_linear(base: nn.Module) -> bool:
    """Whether `base` is a linear layer of which reading the weight, instead of calling it, is the same thing."""
    return (
        type(base) in (*LINEAR, Conv1D)
        and not has_hooks(base)
        and (is_plain(base.weight) or type(base.weight) is PackedWeight)
        and (base.bias is None or is_plain(base.bias))
    )


def weight_and_bias(base: Any) -> tuple[Tensor, Tensor | None]:
    """(d_out, d_in), (d_out,) of a linear layer; Conv1D keeps its weight the other way round."""
    return (base.weight.t() if type(base) is Conv1D else base.weight), base.bias
