"""Which attention modules of a model are put on our name, and why the others are not."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from lwft_kernels.integrations.report import Change
from lwft_kernels.integrations.transformers import upstream
from lwft_kernels.integrations.transformers.attention import attention_forward
from lwft_kernels.integrations.transformers.masks import compact_mask

NAME = "lwft"

# Implementations that give the results of SDPA; anything else was chosen by hand, for its own reasons.
_INTERCHANGEABLE = (None, "eager", "sdpa")
# Code that does something else, sparse attention above all, for implementations of these names only.
_TREATS_SDPA_BY_NAME = re.compile(r"""_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*["']sdpa["']""")

_BY_NAME = "its code does something else for implementations that are not called sdpa or eager"


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per attention module of every `PreTrainedModel` in `model`.

    Args:
        model: any module.
        strict: refuse a release of transformers whose functions are not those the tests know.
    """
    changes: list[Change] = []
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(_inside(name, outer) for outer in seen):
            continue
        seen.append(name)
        changes += _plan_pretrained(name, module, strict)
    # asked where there is something to replace only, for it may warn
    if any(change.now is not None for change in changes) and (reason := upstream.why_not(strict)) is not None:
        changes = [c if c.now is None else Change(c.module, c.was, reason=reason) for c in changes]
    return changes


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(f"{outer}.")


def _plan_pretrained(prefix: str, model: PreTrainedModel, strict: bool) -> list[Change]:
    what = f"attention of {type(model).__name__}"
    reason = _why_not_model(model)
    if reason is not None:
        return [Change(prefix or type(model).__name__, what, reason=reason)]
    modules: list[tuple[str, nn.Module]] = list(model.named_modules(prefix=prefix))
    attentions = [(name, module) for name, module in modules if calls_interface(module)]
    # One config may serve several modules: a reason against one of them is a reason against all.
    refused: dict[int, str] = {}
    changes = []
    for name, part in modules:
        if isinstance(part, PreTrainedModel) and (reason := _why_not_model(part)) is not None:
            if id(part.config) not in refused and not _follows(part):
                changes.append(Change(name, f"attention of {type(part).__name__}", reason=reason))
            refused.setdefault(id(part.config), reason)
    for _, module in attentions:
        config = _config_of(module, model)
        if id(config) in refused or config._attn_implementation not in _INTERCHANGEABLE:
            continue
        by_name = upstream.RELEASE >= (5,) and _treats_sdpa_by_name(type(module).__module__)
        reason = _BY_NAME if by_name else upstream.why_not_like_eager(module, strict)
        if reason is not None:
            refused[id(config)] = reason
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
    if upstream.RELEASE < (5,):
        # code of many generations, of which only these have been found to follow the name in every part
        if not any(calls_interface(module) for module in model.modules()):
            return f"transformers {transformers.__version__}: its attention is not one known to follow the interface"
        return "config.output_attentions asks for the attention matrices" if model.config.output_attentions else None
    if not model._can_set_attn_implementation():
        return "its code does not go through transformers' attention interface"
    if _treats_sdpa_by_name(type(model).__module__):
        return _BY_NAME
    if model.config.output_attentions:
        return "config.output_attentions asks for the attention matrices"
    return None


def _follows(model: PreTrainedModel) -> bool:
    """Whether the code of `model` itself looks attention up by name at all."""
    if upstream.RELEASE < (5,):
        return any(calls_interface(module) for module in model.modules())
    follows: bool = model._can_set_attn_implementation()
    return follows


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's own forward looks its attention up by name."""
    if upstream.RELEASE < (5,) and not any(kind.__name__ in upstream.KNOWN_IN_4 for kind in type(module).__mro__):
        return False
    return _looks_up_by_name(type(module).forward)


@functools.cache
def _looks_up_by_name(forward: Callable[..., Any]) -> bool:
    try:  # the library's own test is of this kind
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


# Not only where a model is switched: one that was pickled while it was accelerated asks for the name in a new process.
# The names stay, for other models may be using them, and do nothing by themselves.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, compact_mask)
