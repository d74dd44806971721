"""AdapterHub `adapters`: bottleneck adapters and LoRA layers, by class swap.

A swapped module stays the same object with the same parameters, so that state_dict, composition, fusion, merging and
saving are the library's as before. What the formula of an op is not, a call at a time or a module as a whole, is
computed by the library's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import adapters
import torch
import torch.nn.functional as F
from adapters.composition import Stack
from adapters.methods import lora, modeling
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, BertFusion, ParallelAdapter, PHMLayer
from adapters.methods.prefix_tuning import PrefixTuningLayer
from adapters.methods.reft import ReftModule
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import activations

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations import drift, reached
from lwft_kernels.integrations.class_swap import described, has_hooks, is_plain, swapped
from lwft_kernels.integrations.report import Change

_BOTTLENECK, _LORA = "adapters Adapter", "adapters LoRALinear"  # as declined calls are named in stats()

# The library's activations that are one of the op's, but for rounding: the tanh GELU has many spellings.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
    activations.LinearActivation: "identity",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
}


class Deferred(Tensor):
    """A tensor that is computed, by the library's own code, when somebody reads it; as a rule nobody does.

    Adapters hand out the middle and the end of their branch beside the result. Only AdapterFusion reads them.
    """

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], compute: Callable[[Adapter, Tensor], Tensor], module: Adapter, x: Tensor,
        reading: _Reading,
    ) -> Deferred:  # fmt: skip
        """A stand-in for what `compute` returns of `module` and `x`, under the modes of `reading`."""
        self: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)
        self.__dict__["deferred"] = compute, module, x, reading
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Whatever is asked of the stand-in is asked of the tensor itself."""
        args, kwargs = _pytree.tree_map_only(Deferred, _value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Where C++ code got hold of the stand-in itself, its gradient would be lost without a word."""
        raise RuntimeError(
            f"{func}: the middle and the end of an accelerated adapter's branch cannot be used here; read them by a "
            "Python operation first (x + 0), or leave this model's adapters as they are"
        )


def _value_of(deferred: Deferred) -> Tensor:
    state = deferred.__dict__
    if "value" not in state:
        compute, module, x, reading = state.pop("deferred")
        state["value"] = reading.again(lambda: compute(module, x))
    value: Tensor = state["value"]
    return value


class _Reading:
    """The modes under which an adapter was called and the state of what it read, for what is computed later.

    Args:
        device: of the input.
        tensors: input and weights.
    """

    __slots__ = ("autocast", "device", "grad", "tensors", "versions")

    def __init__(self, device: torch.device, tensors: list[Tensor]) -> None:
        self.device, self.tensors = device, tensors
        self.grad, self.autocast = torch.is_grad_enabled(), checks.autocast_dtype(device)
        self.versions = _versions(tensors)

    def again(self, compute: Callable[[], Tensor]) -> Tensor:
        if _versions(self.tensors) != self.versions:
            raise RuntimeError(
                "the input or the weights of an accelerated adapter were written to before its tuple was read: read "
                "its second and third tensor at once, or leave this model's adapters as they are"
            )
        autocast = torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.grad), autocast:
            return compute()


def _versions(tensors: list[Tensor]) -> list[int] | None:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode, where nobody counts
        return None


def _deferred(
    shape: tuple[int, ...], compute: Callable[[Adapter, Tensor], Tensor], module: Adapter, x: Tensor,
    reading: _Reading | None,
) -> Tensor:  # fmt: skip
    return compute(module, x) if reading is None else Deferred(shape, compute, module, x, reading)


def _down(module: Adapter, x: Tensor) -> Tensor:
    down: Tensor = module.adapter_down(x)
    return down


def _up(module: Adapter, x: Tensor) -> Tensor:
    up: Tensor = module.adapter_up(module.adapter_down(x)) * module.scaling
    return up


def _activation(module: nn.Module) -> str | None:
    """The op's name of what an `Activation_Function_Class` computes, or None."""
    if type(module) is not modeling.Activation_Function_Class or has_hooks(module):
        return None
    f = module._modules.get("f") or module.f
    if f is F.leaky_relu:
        return "leaky_relu"
    if not isinstance(f, nn.Module) or has_hooks(f):
        return None
    if type(f) is nn.LeakyReLU:
        return "leaky_relu" if f.negative_slope == 0.01 else None
    return _ACTIVATIONS.get(type(f))


class _Parts(NamedTuple):
    """What the op reads of an adapter."""

    norm: nn.LayerNorm | None
    linear: nn.Linear
    activation: str
    up: nn.Linear


def _parts_of(module: Adapter) -> _Parts | str:
    """The parts of an adapter, or why it is not the formula of the op, whatever it is called with."""
    children = module._modules
    down, up, dropout = children["adapter_down"], children["adapter_up"], children["dropout"]
    assert down is not None
    *norms, linear, activation = down._modules.values()
    if type(linear) is PHMLayer or type(up) is PHMLayer:
        return "its projections are PHM layers (Compacter)"
    if type(linear) is not nn.Linear or type(up) is not nn.Linear:
        return "its projections are not plain linear layers"
    if type(dropout) is not nn.Dropout:
        return f"the dropout is a {type(dropout).__name__}"
    norm = norms[0] if norms else None
    if norm is not None and (len(norms) > 1 or type(norm) is not nn.LayerNorm or norm.weight is None):
        return "what comes before the projection is not a LayerNorm with weights"
    if has_hooks(down) or has_hooks(linear) or has_hooks(up) or has_hooks(dropout) or (norm and has_hooks(norm)):
        return "its layers have hooks"
    name = _activation(activation)
    if name is None:
        return f"the op has no activation {_name_of(getattr(activation, 'f', activation))}"
    return _Parts(norm, linear, name, up)


def _name_of(activation: Any) -> str:
    return str(getattr(activation, "__name__", type(activation).__name__))


def _why_not_bottleneck(module: Adapter, parts: _Parts, x: Any, residual: Any) -> str | None:
    """Why the op cannot serve this call of an adapter, or None."""
    if module._backward_hooks or module._backward_pre_hooks:
        return "hooks on its gradient are set"
    if not isinstance(module, ParallelAdapter):
        if not isinstance(residual, Tensor):
            return "there is no residual"
        if "DropPath" in module._modules and module.DropPath.training:
            return "stochastic depth"
    reason = _why_not_here("adapter", x)
    if reason is not None:
        return reason
    weights = _weights(module, parts)
    if not all(map(is_plain, weights)):
        return "its weights are sharded or of a tensor subclass"
    return _why_not_together(x, weights)


def _why_not_here(op: str, x: Any) -> str | None:
    """Why a call on the input `x` cannot go to the kernel of `op`, whatever the module; or None."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested:
        return "the input is not a plain tensor"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not(op, x.device)


def _why_not_together(x: Tensor, weights: list[Tensor]) -> str | None:
    device, dtype = x.device, x.dtype
    for weight in weights:
        if weight.device != device:
            return "input and weights are on different devices"
        if weight.dtype != dtype and checks.autocast_dtype(device) is None:
            return f"its weights are not all of the input's {dtype}"
    return None


def _weights(module: Adapter, parts: _Parts) -> list[Tensor]:
    """The parameters that the op reads."""
    read = [parts.linear._parameters, parts.up._parameters]
    if parts.norm is not None:
        read.append(parts.norm._parameters)
    found: list[Tensor] = [p for parameters in read for p in parameters.values() if p is not None]
    return [*found, module.scaling] if "scaling" in module._parameters else found


def _branch(
    module: Adapter, parts: _Parts, x: Tensor, residual: Tensor | None, dropout_p: float
) -> Tensor:  # residual + dropout(up(act(down(norm(x)))) * scaling)
    norm, linear, activation, up = parts
    # The attributes of a module are found the long way round.
    down_weight, down_bias = linear._parameters.values()
    up_weight, up_bias = up._parameters.values()
    assert down_weight is not None and up_weight is not None
    scaling = module.scaling
    multiply_after = False
    if not isinstance(scaling, float):
        # A learned scale, of all or of each channel, goes into the small matrix; where autocast would make the product
        # with it wider than the rest, it stays outside.
        multiply_after = checks.autocast_dtype(x.device) is not None
        if not multiply_after:
            up_weight = up_weight * (scaling if scaling.numel() == 1 else scaling[:, None])
            up_bias = None if up_bias is None else up_bias * scaling
        scaling = 1.0
    norm_weight, norm_bias, eps = (None, None, 1e-5) if norm is None else (norm.weight, norm.bias, norm.eps)
    branch = LF.adapter(
        x, down_weight, down_bias, up_weight, up_bias, activation=activation, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, scale=scaling, residual=residual, dropout_p=dropout_p,
    )  # fmt: skip
    return branch * module.scaling if multiply_after else branch


def _bottleneck(
    module: Adapter, parts: _Parts, x: Tensor, residual: Tensor | None, output_gating: bool, up_is_read: bool
) -> Any:
    """(output, down, up[, gate]) as the library's forward gives them; `residual` is None in a parallel adapter."""
    dropout = module._modules["dropout"]
    p = dropout.p if dropout.training else 0.0
    in_one = (
        type(residual) is Tensor
        and not (up_is_read or module.use_gating)
        and (module.adapter_residual_before_ln or not module.add_layer_norm_after)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and checks.autocast_dtype(x.device) is None
    )
    # torch.compile drops what nobody reads; otherwise it is computed when somebody does
    reading = None if torch.compiler.is_compiling() else _Reading(x.device, [x, *_weights(module, parts)])
    down = _deferred((*x.shape[:-1], parts.linear.out_features), _down, module, x, reading)
    if in_one or (p > 0.0 and not up_is_read):
        up = _deferred(x.shape, _up, module, x, reading)
        output = _branch(module, parts, x, residual if in_one else None, p)
    else:
        up = _branch(module, parts, x, None, 0.0)
        output = dropout(up)
    if module.use_gating:
        gate = torch.sigmoid(module.gate(x)).mean(dim=1).unsqueeze(-1)
        output = output * gate
    if in_one:
        residual = None
    if residual is not None and module.adapter_residual_before_ln:
        output = output + residual
    if module.add_layer_norm_after:
        output = module.adapter_norm_after(output)
    if residual is not None and not module.adapter_residual_before_ln:
        output = output + residual
    if module.use_gating and output_gating:
        return output, down, up, gate
    return output, down, up


def _forward(
    module: Adapter, theirs: Callable[..., Any], x: Any, residual_input: Any, output_gating: Any, up_is_read: bool
) -> Any:
    parts = _parts_of(module)
    reason = parts if isinstance(parts, str) else _why_not_bottleneck(module, parts, x, residual_input)
    if isinstance(parts, str) or reason is not None:
        backend.record_decline(_BOTTLENECK, str(reason))
        return theirs(x, residual_input, output_gating)
    reached.mark(module)
    residual = None if isinstance(module, ParallelAdapter) else residual_input
    return _bottleneck(module, parts, x, residual, output_gating, up_is_read)


class FusedAdapter(Adapter):
    """`adapters.methods.modeling.Adapter` on the op `adapter`."""

    def forward(self, x: Any, residual_input: Any, output_gating: Any = False) -> Any:
        """As the library's: (output, down, up[, gate]); down and up are computed when they are read."""
        return _forward(self, super().forward, x, residual_input, output_gating, up_is_read=False)


class FusedAdapterOfFusion(FusedAdapter):
    """The same for an adapter that an AdapterFusion reads: what it reads is computed first, and once."""

    def forward(self, x: Any, residual_input: Any, output_gating: Any = False) -> Any:
        """As the library's: (output, down, up[, gate]); down is computed when it is read."""
        return _forward(self, Adapter.forward.__get__(self), x, residual_input, output_gating, up_is_read=True)


class FusedParallelAdapter(ParallelAdapter):
    """`adapters.methods.modeling.ParallelAdapter` on the op `adapter`."""

    def forward(self, x: Any, residual_input: Any, output_gating: Any = False) -> Any:
        """As the library's: (output, down, up[, gate]); down and up are computed when they are read."""
        return _forward(self, super().forward, x, residual_input, output_gating, up_is_read=False)


class FusedParallelAdapterOfFusion(FusedParallelAdapter):
    """The same for an adapter that an AdapterFusion reads."""

    def forward(self, x: Any, residual_input: Any, output_gating: Any = False) -> Any:
        """As the library's: (output, down, up[, gate]); down is computed when it is read."""
        return _forward(self, ParallelAdapter.forward.__get__(self), x, residual_input, output_gating, up_is_read=True)


class FusedLoRALinear(lora.LoRALinearTorch):
    """`adapters.methods.lora.LoRALinearTorch` on `lora_linear` and `lora_delta_`."""

    def forward(self, input_states: Any) -> Any:
        """As the library's: the linear layer's result plus scaling * B(A(dropout(x)))."""
        setup = None if self.merged else self.get_active_setup()
        if setup is None:  # the linear layer alone
            return super().forward(input_states)
        reason = _why_not_lora(self, setup, input_states)
        if reason is not None:
            backend.record_decline(_LORA, reason)
            return super().forward(input_states)
        reached.mark(self)
        layer = self.loras[_only(self, setup)]
        dropout = layer.lora_dropout
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a, b, scale = layer.lora_A, layer.lora_B, float(layer.scaling)
        if not self.fan_in_fan_out and not self.weight.requires_grad:
            return LF.lora_linear(input_states, self.weight, self.bias, a, b, scale=scale, dropout_p=p)
        base = F.linear(input_states, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        return LF.lora_delta_(base, input_states, a, b, scale=scale, dropout_p=p)


def _only(module: lora.LoRALinear, setup: Any) -> str | None:
    """The one LoRA of this layer in an active setup, or None where they are composed."""
    if type(setup) is not Stack or not all(isinstance(child, str) for child in setup):
        return None
    names = [name for name in setup if name in module.loras]
    return names[0] if len(names) == 1 else None


def _why_not_lora(module: lora.LoRALinear, setup: Any, x: Any) -> str | None:
    """Why the op cannot serve this call of a LoRA layer with an active setup, or None."""
    name = _only(module, setup)
    if name is None:
        return f"a {type(setup).__name__} of several LoRAs"
    layer = module.loras[name]
    if type(layer) is not lora.LoRA:
        return f"the method {type(layer).__name__}"
    if layer.use_gating or layer.use_dora:
        return "gated LoRA" if layer.use_gating else "DoRA"
    if has_hooks(layer):
        return "the LoRA module has hooks"
    dropout = layer.lora_dropout
    if isinstance(dropout, nn.Module) and (type(dropout) is not nn.Dropout or has_hooks(dropout)):
        return "its dropout is not a plain one"
    reason = _why_not_here("lora_linear", x)
    if reason is not None:
        return reason
    if x.dim() < 2:
        return "the input has one dimension"
    weights = [w for w in (module.weight, module.bias, layer.lora_A, layer.lora_B) if w is not None]
    if not all(is_plain(weight) for weight in weights):
        return "its weights are sharded, quantised or of a tensor subclass"
    return _why_not_together(x, weights)


# What each class is replaced by; the second, where there is one, in an AdapterFusion.
_REPLACEMENTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    Adapter: (FusedAdapter, FusedAdapterOfFusion),
    ParallelAdapter: (FusedParallelAdapter, FusedParallelAdapterOfFusion),
    lora.LoRALinearTorch: (FusedLoRALinear,),
}


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per adapter, LoRA layer and prefix of `model`. A layer that holds none of them is not mentioned."""
    fused = _in_fusions(model)
    drifted: dict[type[nn.Module], str | None] = {}
    changes = []
    for name, module in model.named_modules():
        what = _what(module)
        if what is None:
            continue
        reason = _why_not_module(module)
        if reason is None:
            if type(module) not in drifted:
                drifted[type(module)] = drift.why_not(_upstream(type(module)), strict)
            reason = drifted[type(module)]
        if reason is not None:
            changes.append(Change(name, described(type(module)), reason=reason))
        else:
            ours = _REPLACEMENTS[type(module)]
            changes.append(swapped(name, module, ours[-1] if id(module) in fused else ours[0], what))
    return changes


def _in_fusions(model: nn.Module) -> set[int]:
    """The ids of the adapters whose branch an AdapterFusion reads."""
    found = set()
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer) and hasattr(layer, "adapter_fusion_layer"):
            names = {name for fusion in layer.adapter_fusion_layer for name in fusion.split(",")}
            found |= {id(layer.adapters[name]) for name in names if name in layer.adapters}
    return found


def _what(module: nn.Module) -> str | None:
    """What a module is replaced by, "" where it is one of the library's that never is, None where it is no matter."""
    if isinstance(module, Adapter):
        return "adapter"
    if isinstance(module, lora.LoRALayer):
        return "lora_linear" if len(module.loras) > 0 else None
    if isinstance(module, PrefixTuningLayer):
        return "" if module.prefixes else None
    return "" if isinstance(module, (BertFusion, ReftModule)) else None


def _why_not_module(module: nn.Module) -> str | None:
    for original, ours in _REPLACEMENTS.items():
        if type(module) in ours:
            return "replaced already"
        if type(module) is original:
            break
    else:
        return _why_not_class(module)
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    if isinstance(module, Adapter):
        parts = _parts_of(module)
        return parts if isinstance(parts, str) else None
    return None


def _why_not_class(module: nn.Module) -> str:
    if isinstance(module, PrefixTuningLayer):
        return "its keys and values are joined to those of the model before attention is called"
    if isinstance(module, BertFusion):
        return "attention over the adapters of a token is left to PyTorch"
    if isinstance(module, ReftModule):
        return "it changes few positions only and is left to PyTorch"
    if isinstance(module, lora.LoRAMergedLinear):
        return "query, key and value are one layer here, with a LoRA of their own each"
    return f"the class is not known (adapters {adapters.__version__})"


def _upstream(original: type[nn.Module]) -> drift.Upstream:
    """What is overridden in a class, and what of the library our version copies."""
    if original is lora.LoRALinearTorch:
        return drift.Upstream(
            "adapters.methods.lora.LoRALinear.forward",
            (
                lora.LoRALinear.forward, lora.LoRALinear.compose_single, lora.LoRALinear.compose_stack,
                lora.LoRA.__init__, lora.LoRA.forward, lora.LoRA.com,
            ),
            frozenset({"25d720a0e3bd81f4"}),
            _lora_differs,
        )  # fmt: skip
    return drift.Upstream(
        f"adapters.methods.modeling.{original.__name__}.forward",
        (original.forward, Adapter.__init__, modeling.Activation_Function_Class.forward),
        frozenset({{Adapter: "01db744c1e2becab", ParallelAdapter: "cd17e828edec2bd9"}[original]}),
        functools.partial(_bottleneck_differs, original),
    )


def _bottleneck_differs(original: type[Adapter]) -> str | None:
    """The self-test of a bottleneck adapter: every part of it at once, except dropout."""
    config = adapters.BnConfig(
        mh_adapter=False, output_adapter=True, reduction_factor=2, non_linearity="gelu", ln_before=True, ln_after=True,
        scaling="channel", use_gating=True, adapter_residual_before_ln=True,
    )  # fmt: skip
    module = original("test", 6, 3, config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, residual = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)

    def run(forward: Callable[..., Any]) -> dict[str, Tensor | None]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_(), *module.parameters()]
        outs = [out + 0 for out in forward(*leaves[:2], output_gating=True)]
        weighted = sum(out.cos().sum() for out in outs)
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
        return {f"result {i}": value for i, value in enumerate((*outs, *gradients))}

    theirs = run(module)
    module.__class__ = _REPLACEMENTS[original][0]
    return drift.first_difference(run(module), theirs)


def _lora_differs() -> str | None:
    """The self-test of a LoRA layer."""
    known = adapters.ModelAdaptersConfig()
    known.add("test", config=adapters.LoRAConfig(r=2, alpha=3, init_weights="bert"))
    known.active_setup = Stack("test")
    module = lora.LoRALinear.wrap(nn.Linear(6, 5), "selfattn", None, known).double()
    module.add_adapter("test", 0)
    module.double().weight.requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def run() -> dict[str, Tensor | None]:
        leaves = [x.clone().requires_grad_(), *module.loras.parameters()]
        out = module(leaves[0])
        gradients = torch.autograd.grad(out.cos().sum(), leaves, allow_unused=True)
        return {f"result {i}": value for i, value in enumerate((out, *gradients))}

    theirs = run()
    module.__class__ = FusedLoRALinear
    return drift.first_difference(run(), theirs)
