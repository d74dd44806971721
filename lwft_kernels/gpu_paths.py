"""Which kernels serve an op on a GPU where both could: the CUDA C++ ones where a card has shown them right and faster.

`gpu_paths.json` holds what `benchmarks.gpu_proof` measured: the card, op, dtype, width of a row and rows up to the next
power of two for which the CUDA C++ kernels won, forward alone and with backward. All else goes to Triton.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_suffix(".json")


class Place(NamedTuple):
    """A row of the table: where the CUDA C++ kernels of `op` serve. `rows` is a power of two, `dtype` as "bfloat16"."""

    card: str
    op: str
    dtype: str
    width: int
    rows: int


def place(card: str, op: str, dtype: str, width: int, rows: int) -> Place:
    """The row that speaks for a call on so many rows of the op's first tensor."""
    return Place(card, op, dtype, width, 1 << max(rows - 1, 0).bit_length())


@functools.cache
def places() -> frozenset[Place]:
    """What has been measured; ValueError where the table is none."""
    found = json.loads(TABLE.read_text())["measured"]
    try:
        return frozenset(Place(**row) for row in found)
    except TypeError as error:
        raise ValueError(f"{TABLE.name}: a row must have {', '.join(Place._fields)}: {error}") from None


@functools.cache
def _card(index: int) -> str:
    return torch.cuda.get_device_name(index)


def to_cuda(op: str, x: Tensor) -> bool:
    """Whether a call of `op` on `x` goes to the CUDA C++ kernels; where nothing was measured it does not."""
    measured = places()
    if not measured or x.dim() == 0 or x.numel() == 0:
        return False
    width = x.size(-1)
    dtype = str(x.dtype).removeprefix("torch.")
    return place(_card(x.get_device()), op, dtype, width, x.numel() // width) in measured
