"""Attention of Hugging Face transformers 5.x, through its attention interface.

Models look up, by the name in their config, a function that computes attention and another that builds its
mask. Both must be registered: without the second, models hand over no mask even where there is padding.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations.report import Change

NAME = "lwft"
_OP = "transformers attention"  # as declined calls are named in stats()

# Arguments that change the result and that the op does not know; others that models hand along do not.
_SINKS = ("s_aux", "sinks")  # known to the eager function of the model alone
_SPARSE = ("block_indices", "indices")  # known to neither SDPA nor eager
_UNKNOWN = (*_SINKS, "cache")

# Implementations that give the results of SDPA; anything else was chosen by hand, for its own reasons.
_INTERCHANGEABLE = (None, "eager", "sdpa")
# Code that does something else, sparse attention above all, for implementations of these names only.
_TREATS_SDPA_BY_NAME = re.compile(r"""_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*["']sdpa["']""")

_BY_NAME = "its code does something else for implementations that are not called sdpa or eager"


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, S, D), a transposed view
    key: Tensor,  # (B, Hkv, L, D)
    value: Tensor,  # (B, Hkv, L, D)
    attention_mask: Tensor | None,  # (B or 1, H or 1, S, L): bool, True = may attend, or float to be added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # (B or 1, H, S, L), T5's: learned, wants a gradient
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function models call; its arguments are transformers'. Returns ((B, S, H, D), None)."""
    for name in _SPARSE:
        if kwargs.get(name) is not None:  # SDPA would attend to everything and not say so
            raise NotImplementedError(f"attention over {name} only is not supported: use accelerate(attention=False)")
    reason = _why_not(query, key, value, attention_mask, scaling, kwargs)
    if reason is not None:
        backend.record_decline(_OP, reason)
        if softcap is not None:
            kwargs["softcap"] = softcap
        return _original(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, kwargs)
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # transformers' rule: no mask and several queries mean causal, aligned to the first key (ours to the last); an
    # empty static cache is longer than the queries then, and its tail is not to be seen
    causal = bool(queries > 1 and attention_mask is None and is_causal)
    if causal and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask, bias = None, position_bias
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        if mask.dtype != torch.bool:  # additive
            bias = mask.to(query.dtype) if position_bias is None else position_bias + mask
            mask = None
    if causal and keys < queries:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        causal = False
    out = LF.attention(
        query, key, value, bias=bias, mask=mask, scale=scaling, causal=causal, softcap=softcap, dropout_p=dropout
    )
    return out.transpose(1, 2), None


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: object,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the op cannot serve this call, or None."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    if kwargs.get("output_attentions"):
        return "output_attentions asks for the attention matrix"
    if not (query.dtype == key.dtype == value.dtype) and checks.autocast_dtype(query.device) is None:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}"
    if key.shape[-1] != value.shape[-1] or key.shape[-1] != query.shape[-1]:
        return "the head sizes of query, key and value differ"
    if query.shape[0] != key.shape[0]:
        return "one query batch is broadcast over the keys"
    if attention_mask is not None and attention_mask.dim() != 4:
        return "the mask is not 4-D"
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, *checks.FLOATING):
        return f"the mask is {attention_mask.dtype}, neither bool nor floating"
    if scaling is not None and not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
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
    needs_eager = kwargs.get("output_attentions") or any(kwargs.get(name) is not None for name in (*_SINKS, "softcap"))
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
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    out: tuple[Tensor, Any] = eager(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
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
    what = f"attention of {type(model).__name__}"
    reason = _why_not_model(model)
    if reason is not None:
        return [Change(prefix or type(model).__name__, what, reason=reason)]
    modules: list[tuple[str, nn.Module]] = list(model.named_modules(prefix=prefix))
    attentions = [(name, module) for name, module in modules if _calls_interface(type(module).forward)]
    # One config may serve several modules: a reason against one of them is a reason against all.
    refused: dict[int, str] = {}
    changes = []
    for name, part in modules:
        if isinstance(part, PreTrainedModel) and (reason := _why_not_model(part)) is not None:
            if id(part.config) not in refused and not part._can_set_attn_implementation():
                changes.append(Change(name, f"attention of {type(part).__name__}", reason=reason))
            refused.setdefault(id(part.config), reason)
    for _, module in attentions:
        if _treats_sdpa_by_name(type(module).__module__):
            refused.setdefault(id(_config_of(module, model)), _BY_NAME)
    switch = _Switch(model, refused)
    for name, module in attentions:
        config = _config_of(module, model)
        implementation = config._attn_implementation
        was = f"{type(module).__name__}: {implementation}"
        reason = refused.get(id(config))
        if implementation == NAME:
            reason = "replaced already"
        elif implementation not in _INTERCHANGEABLE:
            reason = f"{implementation} was chosen by hand; set 'sdpa' to have it replaced"
        if reason is not None:
            refused[id(config)] = reason
            changes.append(Change(name, was, reason=reason))
        else:
            changes.append(Change(name, was, NAME, apply=switch.on_for(config), revert=switch.off))
    return changes or [Change(prefix or type(model).__name__, what, reason="no module calls the attention interface")]


def _why_not_model(model: PreTrainedModel) -> str | None:
    """Why attention under our name would not be reached, or not be the same, in this model itself."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return f"transformers {transformers.__version__}: 5.0 or newer is supported"
    if not model._can_set_attn_implementation():
        return "its code does not go through transformers' attention interface"
    if _treats_sdpa_by_name(type(model).__module__):
        return _BY_NAME
    if model.config.output_attentions:
        return "config.output_attentions asks for the attention matrices"
    return None


@functools.cache
def _calls_interface(forward: Callable[..., Any]) -> bool:
    """Whether a module's own forward looks its attention up by name. The library's test is of this kind."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


@functools.cache
def _treats_sdpa_by_name(module: str) -> bool:
    try:
        return _TREATS_SDPA_BY_NAME.search(inspect.getsource(sys.modules[module])) is not None
    except (KeyError, OSError, TypeError):
        return False


def _config_of(module: nn.Module, model: PreTrainedModel) -> PretrainedConfig:
    """The config by which an attention module looks its function up."""
    config = getattr(module, "config", None)
    return config if isinstance(config, PretrainedConfig) else model.config


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """Every config that setting the attention of `model` can reach: of its modules, and theirs in turn."""
    waiting = [getattr(module, "config", None) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            waiting += [getattr(config, name, None) for name in config.sub_configs]
            yield config


class _Switch:
    """Turns the attention of one model to our name and back, once for all its modules.

    Args:
        model: the model.
        refused: by the id of a config, why it must stay as it is.
    """

    def __init__(self, model: PreTrainedModel, refused: dict[int, str]) -> None:
        self.model = model
        self.refused = refused
        self.before = [(config, config._attn_implementation_internal) for config in _configs(model)]
        self.failure: str | None = None
        self.done = False

    def on_for(self, config: PretrainedConfig) -> Callable[[], str | None]:
        """What applies the change of a module with this config: None, or why it did not come about."""

        def on() -> str | None:
            if not self.done:
                self._on()
            if self.failure is None and config._attn_implementation != NAME:
                return "transformers did not pass the setting on to it"
            return self.failure

        return on

    def _on(self) -> None:
        self.done = True
        _register()
        try:
            self.model.set_attn_implementation(NAME)
        except (ImportError, ValueError) as error:
            self.off()
            self.failure = f"transformers refuses: {error}"
        for config, implementation in self.before:
            if id(config) in self.refused and config._attn_implementation_internal == NAME:
                config._attn_implementation_internal = implementation

    def off(self) -> None:
        for config, implementation in self.before:
            if config._attn_implementation_internal == NAME:  # nobody has set another since
                config._attn_implementation_internal = implementation


def _register() -> None:
    # a name once registered stays: another model may be using it, and it does nothing by itself
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
