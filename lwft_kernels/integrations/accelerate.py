"""`accelerate`, `accelerated` and `explain`: ask every library's room what it would change, and change it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lwft_kernels.integrations.report import Change, Report

# The rooms, in the order in which they are asked: their library, and the keyword that switches them off.
_ROOMS = (
    ("transformers", "transformers", "attention"),
    ("transformers_blocks", "transformers", "layer_norm"),
    ("peft", "peft", "lora"),
    ("adapters", "adapters", "adapters"),
    ("torch_nn", "torch", "torch_nn"),
    ("frozen_linear", "torch", "frozen_linear"),
)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    lora: bool = True,
    adapters: bool = True,
    torch_nn: bool = True,
    layer_norm: bool = True,
    frozen_linear: bool = True,
    prepack: bool = False,
    strict: bool = False,
) -> Report:
    """Put the kernels into `model`, in place.

    - transformers: attention that goes through the attention interface computes with
      `lwft_kernels.functional.attention`; blocks that end in a residual sum and LayerNorm with `add_layer_norm`.
    - PEFT: LoRA layers compute with `lora_linear`, or `lora_delta_` where the base layer must be called; prefix
      tuning hands its prefix to `attention`.
    - AdapterHub: bottleneck adapters compute with `adapter`, LoRA layers with `lora_linear`.
    - torch.nn: `MultiheadAttention` computes with `attention`, encoder and decoder layers whose norms come last with
      `add_layer_norm` too; linear layers that are frozen and carry no adapter with `frozen_linear`, on processors where
      that is faster (float32 with Intel AMX).

    A call that a kernel cannot serve is computed by the library's own code and counted, with the reason, in
    `lwft_kernels.stats`. state_dict, checkpoints, hooks and `save_pretrained` are unchanged. Calling it again
    finds what has been added since. The kernels have no second derivative: `create_graph=True` raises.

    Args:
        model: any module; a `PreTrainedModel`, a `PeftModel`, or one that contains them.
        attention: the attention of transformers.
        lora: the layers of PEFT.
        adapters: the layers of AdapterHub.
        torch_nn: attention, encoder and decoder layers of torch.nn.
        layer_norm: the blocks of transformers that end in a residual sum and LayerNorm.
        frozen_linear: the linear layers that are frozen and carry no adapter.
        prepack: hold the frozen weights below PEFT's LoRA layers in packed form, and no longer in plain, where that is
            measured to be faster: on the CPU, for some 16 to some hundred tokens a call. The first weight of a kind
            takes a second or so; the report tells what was measured.
        strict: leave what lwft_kernels was not tested with as it is, even where its self-test would pass.

    Returns:
        the `Report`: a table when printed, and ``undo()``.

    Raises:
        TypeError: `model` is not a module.
    """
    wanted = {
        "attention": attention, "lora": lora, "adapters": adapters, "torch_nn": torch_nn, "layer_norm": layer_norm,
        "frozen_linear": frozen_linear,
    }  # fmt: skip
    changes, versions = _plans(model, wanted, strict, prepack)
    applied: list[Change] = []
    try:
        for change in changes:
            if change.now is not None:
                applied.append(change)
                change.reason = change.apply()
                if change.reason is not None:
                    change.now = None
    except BaseException:  # half a model is nobody's
        for change in reversed(applied):
            change.revert()
        raise
    return Report(model, changes, versions, applied=True)


@contextmanager
def accelerated(
    model: nn.Module,
    *,
    attention: bool = True,
    lora: bool = True,
    adapters: bool = True,
    torch_nn: bool = True,
    layer_norm: bool = True,
    frozen_linear: bool = True,
    prepack: bool = False,
    strict: bool = False,
) -> Iterator[Report]:
    """`accelerate(model)` for the length of a ``with`` block; what it replaced is restored however the block ends."""
    report = accelerate(
        model, attention=attention, lora=lora, adapters=adapters, torch_nn=torch_nn, layer_norm=layer_norm,
        frozen_linear=frozen_linear, prepack=prepack, strict=strict,
    )  # fmt: skip
    try:
        yield report
    finally:
        report.undo()


def explain(
    model: nn.Module,
    *,
    attention: bool = True,
    lora: bool = True,
    adapters: bool = True,
    torch_nn: bool = True,
    layer_norm: bool = True,
    frozen_linear: bool = True,
    prepack: bool = False,
    strict: bool = False,
) -> Report:
    """The report that `accelerate` would give, changing nothing."""
    wanted = {
        "attention": attention, "lora": lora, "adapters": adapters, "torch_nn": torch_nn, "layer_norm": layer_norm,
        "frozen_linear": frozen_linear,
    }  # fmt: skip
    changes, versions = _plans(model, wanted, strict, prepack)
    return Report(model, changes, versions, applied=False)


def _plans(
    model: nn.Module, wanted: dict[str, bool], strict: bool, prepack: bool
) -> tuple[list[Change], dict[str, str]]:
    """What there is to change. A library that was not imported cannot have made a part of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    changes: list[Change] = []
    versions = {"torch": str(torch.__version__)}
    for room, library, keyword in _ROOMS:
        # A directory of the same name, not yet a library, has no version.
        if library in sys.modules and hasattr(sys.modules[library], "__version__"):
            versions[library] = str(sys.modules[library].__version__)
            if wanted[keyword]:
                options = {"prepack": True} if prepack and room == "peft" else {}
                changes += _plan(room, f"{library} {versions[library]}", model, strict=strict, **options)
    return changes, versions


def _plan(room: str, library: str, model: nn.Module, **options: bool) -> list[Change]:
    try:
        module = importlib.import_module(f"lwft_kernels.integrations.{room}")
    except ImportError as error:
        if (error.name or "").startswith("lwft_kernels"):
            raise
        # a release without what the room builds on
        return [Change("", library, reason=f"{library} is not supported: {error}")]
    changes: list[Change] = module.plan(model, **options)
    return changes
