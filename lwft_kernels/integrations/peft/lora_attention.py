"""PEFT's `lora.MultiheadAttention` by low-rank products: PEFT merges its adapter and takes it out again at each call.

What PEFT computes is kept, oddities included: LoRA dropout is not applied, and the branch of the output projection is
added twice (once by `MultiheadAttention.merge`, once by the `Linear.merge` it calls), of which only once with a
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.attention import modules as attention
from lwft_kernels.integrations import reached
from lwft_kernels.integrations.class_swap import has_hooks, is_plain

_OP = "peft lora.MultiheadAttention"  # as declined calls are named in stats()


class MultiheadAttention(lora.MultiheadAttention):
    """`peft.tuners.lora.MultiheadAttention` on `lora_linear` and `attention`."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As PEFT's: the result of the base layer with its adapter merged, and None for the attention weights."""
        try:
            call = _Call(query, *args, **kwargs)
            reason = _why_not_call(call) or _why_not(self, call)
        except TypeError:
            reason = "arguments that nn.MultiheadAttention does not take"
        if reason is not None:
            backend.record_decline(_OP, reason)
            declined: tuple[Tensor, Tensor | None] = super().forward(query, *args, **kwargs)
            return declined
        reached.mark(self)
        fused: Any = attention.MultiheadAttention._fused
        out: Tensor = fused(
            self, call.query, call.key, call.value, call.key_padding_mask, call.attn_mask, call.is_causal
        )
        return out.to(query.dtype), None

    # What `_fused` asks of its module besides nn.MultiheadAttention's attributes, which PEFT's class has as properties.
    _split_heads: Any = attention.MultiheadAttention._split_heads
    _masks: Any = attention.MultiheadAttention._masks
    _prefix: Any = attention.MultiheadAttention._prefix

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input projections; one product for what is one tensor."""
        base, name = self.get_base_layer(), _active(self)
        weight, bias = base.in_proj_weight.detach(), base.in_proj_bias  # the merged weight is cut off too
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

        def projected(x: Tensor, first: int, last: int) -> Tensor:
            rows = slice(first * base.embed_dim, last * base.embed_dim)
            return LF.lora_linear(x, weight[rows], None if bias is None else bias[rows], a, b[rows], scale=scale)

        if query is key and key is value:
            q, k, v = projected(query, 0, 3).chunk(3, dim=-1)
        elif key is value:
            q = projected(query, 0, 1)
            k, v = projected(key, 1, 3).chunk(2, dim=-1)
        else:
            q, k, v = projected(query, 0, 1), projected(key, 1, 2), projected(value, 2, 3)
        return q, k, v

    def _merge_heads(self, heads: Tensor) -> Tensor:
        """(B, H, S, D) -> the output projection, in the layout of the query."""
        x = (heads.transpose(1, 2) if self.batch_first else heads.permute(2, 0, 1, 3)).flatten(2)
        layer, name = self.get_base_layer().out_proj, _active(self)
        linear = layer.get_base_layer()
        a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        out = LF.lora_linear(x, linear.weight.detach(), linear.bias, a, b, scale=scale)
        return LF.lora_delta_(out, x, a.detach(), b.detach(), scale=scale)


class _Call:
    """The arguments of `nn.MultiheadAttention.forward`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.key_padding_mask, self.attn_mask = key_padding_mask, attn_mask
        self.need_weights, self.is_causal = need_weights, is_causal


def _why_not_call(call: _Call) -> str | None:
    """Why the attention op cannot serve these arguments, whatever the module."""
    if call.need_weights:
        return "need_weights=True asks for the attention matrix; pass need_weights=False"
    if call.is_causal and call.attn_mask is None:
        return "is_causal without attn_mask"
    if not all(
        is_plain(x) and x.layout == torch.strided and not x.is_nested for x in (call.query, call.key, call.value)
    ):
        return "the inputs are not plain tensors"
    if call.query.dim() not in (2, 3):
        return "the query is neither 2-D nor 3-D"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    return None


def _active(module: Any) -> str:
    name: str = next(name for name in module.active_adapters if name in module.lora_A)
    return name


def _why_not(module: Any, call: _Call) -> str | None:
    """Why the adapter cannot be served by low-rank products, or None."""
    base: Any = module.get_base_layer()
    out: Any = base.out_proj
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged or out.merged:
        return "the adapter is merged"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or out.active_adapters != module.active_adapters or active[0] not in out.lora_A:
        return f"{len(active)} adapters are active, or others in the output projection"
    if type(base) not in (nn.MultiheadAttention, attention.MultiheadAttention) or not isinstance(out, lora.Linear):
        return f"the base layer is a {type(base).__name__}"
    if has_hooks(base) or base.training != module.training:
        return "the base layer has hooks, or a training mode of its own"
    name = active[0]
    for layer in (module, out):
        if name in layer.lora_variant:
            return f"the LoRA variant {type(layer.lora_variant[name]).__name__}"
        factors: list[Any] = [layer.lora_A[name], layer.lora_B[name]]
        if any(
            type(f) is not nn.Linear or getattr(f, "bias", None) is not None or not is_plain(f.weight) for f in factors
        ):
            return "the adapter has a bias, or weights that are not plain"
        if factors[0].weight.dtype != factors[1].weight.dtype:
            return "lora_A and lora_B differ in dtype"
    linear, weight = out.get_base_layer(), base.in_proj_weight
    if not (is_plain(weight) and is_plain(linear.weight)):
        return "the base weights are sharded or of a tensor subclass"
    if checks.autocast_dtype(call.query.device) is None:
        dtypes = {t.dtype for t in (call.query, call.key, call.value, weight, linear.weight)}
        adapter = module.lora_A[name].weight.dtype
        if len(dtypes) > 1 or adapter not in (weight.dtype, torch.float32) or weight.dtype.itemsize > adapter.itemsize:
            return "inputs, weights and adapter differ in dtype"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not("attention", call.query.device)
