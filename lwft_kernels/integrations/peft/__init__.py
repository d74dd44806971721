"""PEFT: LoRA layers (`lora`) and soft prompts (`prefix`)."""

from __future__ import annotations

from torch import nn

from lwft_kernels.integrations.peft import lora, prefix
from lwft_kernels.integrations.peft.mixed_batch import mixed_batch
from lwft_kernels.integrations.report import Change

__all__ = ["mixed_batch", "plan"]


def plan(model: nn.Module, *, strict: bool = False, prepack: bool = False) -> list[Change]:
    """A change per LoRA layer and per soft prompt of `model`; if `prepack`, one for the weight below each layer too."""
    return [*lora.plan(model, strict=strict, prepack=prepack), *prefix.plan(model, strict=strict)]
