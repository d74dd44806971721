"""`accelerate` and `explain`: ask every library's file what it would change, and change it."""

from __future__ import annotations

import importlib
import sys

import torch
from torch import nn

from lwft_kernels.integrations.report import Change, Report


def _plans(model: nn.Module, attention: bool, lora: bool) -> tuple[list[Change], dict[str, str]]:
    """What there is to change. A library that was not imported cannot have made a part of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    changes: list[Change] = []
    versions = {"torch": str(torch.__version__)}
    for library, wanted in (("transformers", attention), ("peft", lora)):
        if library in sys.modules and hasattr(sys.modules[library], "__version__"):
            versions[library] = sys.modules[library].__version__
            if wanted:
                changes += _plan(library, versions[library], model)
    return changes, versions


def _plan(library: str, version: str, model: nn.Module) -> list[Change]:
    try:
        room = importlib.import_module(f"lwft_kernels.integrations.{library}")
    except ImportError as error:  # a release without what the room builds on
        return [Change("", library, reason=f"{library} {version} is not supported: {error}")]
    changes: list[Change] = room.plan(model)
    return changes


def accelerate(model: nn.Module, *, attention: bool = True, lora: bool = True) -> Report:
    """Put the kernels into `model`, in place.

    - transformers 5.x: every attention that goes through the attention interface computes with
      `lwft_kernels.functional.attention`.
    - PEFT: every `lora.Linear` computes with `lora_linear`, or `lora_delta_` where the base layer is not a
      plain frozen `nn.Linear`.

    A call that a kernel cannot serve is computed by the library's own code and counted, with the reason, in
    `lwft_kernels.stats`. state_dict, checkpoints, hooks and `save_pretrained` are unchanged. Calling it again
    finds what has been added since. The kernels have no second derivative: `create_graph=True` raises.

    Args:
        model: any module; a `PreTrainedModel`, a `PeftModel`, or one that contains them.
        attention, lora: which of the two to replace.

    Returns:
        the `Report`: a table when printed, and ``undo()``.

    Raises:
        TypeError: `model` is not a module.
    """
    changes, versions = _plans(model, attention, lora)
    for change in changes:
        if change.now is not None:
            change.reason = change.apply()
            if change.reason is not None:
                change.now = None
    return Report(changes, versions, applied=True)


def explain(model: nn.Module, *, attention: bool = True, lora: bool = True) -> Report:
    """The report that `accelerate` would give, changing nothing."""
    changes, versions = _plans(model, attention, lora)
    return Report(changes, versions, applied=False)
