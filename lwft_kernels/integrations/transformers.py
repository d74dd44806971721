"""Attention of Hugging Face transformers 5.x, through its attention interface.

Models look up, by the name in their config, a function that computes attention and another that builds its mask. Both
must be registered: without the second, models hand over no mask even where there is padding.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lwft_kernels import backend
from lwft_kernels import functional as LF
from lwft_kernels.integrations.report import Change

NAME = "lwft"
_OP = "transformers attention"  # as declined calls are named in stats()

# Arguments that change the result and that the op does not know; others that models hand along do not.
_UNKNOWN = ("s_aux", "sinks", "cache", "block_indices", "indices")


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, S, D), a transposed view
    key: Tensor,  # (B, Hkv, L, D)
    value: Tensor,  # (B, Hkv, L, D)
    attention_mask: Tensor
    | None,  # bool True = may attend, or float added to the scores; (B or 1, H or 1, S, L)
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # (B or 1, H, S, L), T5's: learned, wants a gradient
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function models call; its arguments are transformers'. Returns ((B, S, H, D), None)."""
    reason = _why_not(query, key, value, attention_mask, kwargs)
    if reason is not None:
        backend.record_decline(_OP, reason)
        if softcap is not None:
            kwargs["softcap"] = softcap
        return _original(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, kwargs
        )
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # transformers' rule: no mask and several queries mean causal, aligned to the first key; an empty static cache is
    # longer than the queries then, and its tail is not to be seen
    causal = bool(queries > 1 and attention_mask is None and is_causal)
    if causal and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask, bias = attention_mask, position_bias
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype != torch.bool:
            mask, bias = None, mask.to(query.dtype) if bias is None else bias + mask
    out = LF.attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scaling,
        causal=causal,
        softcap=softcap,
        dropout_p=dropout,
    )
    return out.transpose(1, 2), None


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Why the op cannot serve this call, or None."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    if key.shape[-1] != value.shape[-1] or key.shape[-1] != query.shape[-1]:
        return "the head sizes of query, key and value differ"
    if query.shape[0] != key.shape[0]:
        return "one query batch is broadcast over the keys"
    if attention_mask is not None and attention_mask.dim() != 4:
        return "the mask is not 4-D"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not_native("attention", query.device)


def _original(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The library's own path: SDPA, or the model's eager function for what SDPA does not know."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    needs_eager = any(kwargs.get(name) is not None for name in ("s_aux", "sinks", "softcap"))
    if eager is None or not needs_eager:
        result: tuple[Tensor, Any] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return result
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and is_causal and queries > 1:  # the eager function knows masks only
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, lowest
        )
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    out: tuple[Tensor, Any] = eager(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def plan(model: nn.Module) -> list[Change]:
    """A change per attention module of every `PreTrainedModel` in `model`."""
    changes: list[Change] = []
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(_inside(name, outer) for outer in seen):
            continue
        seen.append(name)
        changes += _plan_pretrained(name, module)
    return changes


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(f"{outer}.")


def _plan_pretrained(prefix: str, model: PreTrainedModel) -> list[Change]:
    reason = _why_not_model(model)
    if reason is not None:
        return [Change(prefix or type(model).__name__, f"attention of {type(model).__name__}", reason=reason)]
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    switch = _Switch(model, list(configs.values()))
    changes = []
    for name, module in model.named_modules(prefix=prefix):
        if not _calls_interface(type(module)):
            continue
        config = getattr(module, "config", model.config)
        was = f"{type(module).__name__}: {config._attn_implementation}"
        if config._attn_implementation == NAME:
            changes.append(Change(name, was, reason="replaced already"))
        else:
            changes.append(Change(name, was, NAME, apply=switch.on, revert=switch.off))
    if not changes:
        what = f"attention of {type(model).__name__}"
        return [
            Change(prefix or type(model).__name__, what, reason="no module calls the attention interface")
        ]
    return changes


def _why_not_model(model: PreTrainedModel) -> str | None:
    if int(transformers.__version__.split(".")[0]) < 5:
        return f"transformers {transformers.__version__}: 5.0 or newer is supported"
    if not model._can_set_attn_implementation():
        return "its code does not go through transformers' attention interface"
    if model.config.output_attentions:
        return "config.output_attentions asks for the attention matrices"
    return None


@functools.cache
def _calls_interface(cls: type[nn.Module]) -> bool:
    """Whether the module's own forward looks its attention up by name. The library's own test is of the same kind."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


class _Switch:
    """Turns the attention of one model to our name and back, once for all its modules."""

    def __init__(self, model: PreTrainedModel, configs: list[PretrainedConfig]) -> None:
        self.model = model
        self.before = [(config, config._attn_implementation) for config in configs]

    def on(self) -> None:
        _register()
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)

    def off(self) -> None:
        for config, implementation in self.before:
            config._attn_implementation_internal = implementation


def _register() -> None:
    # a name once registered stays: another model may be using it, and it does nothing by itself
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
