"""Argument checks of the functional layer: which argument, what it was, what it must be.

All raise before any kernel runs: ``TypeError`` for what is of the wrong kind, ``ValueError`` for the wrong size or
value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def floating(op: str, name: str, value: object) -> None:
    """`value` must be a tensor of one of the four floating types."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def same_device(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} but {other} is on {reference.device}; move one with .to(...)"
        )


def same_dtype(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.dtype != reference.dtype:
        raise TypeError(
            f"{op}: {name} is {value.dtype} but {other} is {reference.dtype}; cast one, or run under torch.autocast"
        )


def parameter_dtype(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """A parameter has the dtype of the activation, or is float32 beside 16-bit activations."""
    if value.dtype == reference.dtype:
        return
    if value.dtype == torch.float32 and reference.dtype in (torch.bfloat16, torch.float16):
        return
    raise TypeError(
        f"{op}: {name} is {value.dtype}, which does not go with {other} of {reference.dtype}; use the same dtype (or "
        "float32 beside 16-bit activations), or run under torch.autocast"
    )


def shape(op: str, name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """`value` must have the shape `expected`, None standing for any size; `meaning` names the dimensions."""
    if value.shape == expected or (
        value.dim() == len(expected)
        and all(want is None or size == want for size, want in zip(value.shape, expected, strict=True))
    ):
        return
    wanted = ", ".join("any" if want is None else str(want) for want in expected)
    raise ValueError(f"{op}: {name} must have shape {meaning} = ({wanted}), got {tuple(value.shape)}")


def at_least_dims(op: str, name: str, value: Tensor, dims: int, meaning: str) -> None:
    if value.dim() < dims:
        raise ValueError(f"{op}: {name} must have shape {meaning}, got {tuple(value.shape)}")


def size(op: str, name: str, value: object, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return value


def number(op: str, name: str, value: object) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # a float that torch.compile(dynamic=True) keeps symbolic is not finite or infinite yet
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def positive(op: str, name: str, value: object) -> float:
    result = number(op, name, value)
    if result <= 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    return result


def probability(op: str, name: str, value: object) -> float:
    """`value` as a probability in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:  # NaN fails too
        raise ValueError(f"{op}: {name} must be a probability between 0 and 1, got {value}")
    return float(value)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is on for `device`, or None. An unlisted op must follow it by hand."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@overload
def cast(value: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an argument: floating tensors but float64 become `dtype`, the rest passes."""
    if value is None or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
        return value
    return value.to(dtype)
