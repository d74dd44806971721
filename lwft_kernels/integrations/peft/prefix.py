"""Prefix and prompt tuning."""

from __future__ import annotations

from torch import nn

from lwft_kernels.integrations.report import Change


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """Nothing yet."""
    return []
