"""Into which tiles attention's Triton kernels cut their work: the configurations that may serve a call."""

from __future__ import annotations

import torch
import triton

from lwft_kernels.triton.cards import Card
from lwft_kernels.triton.tuning import Configuration

_Tile = tuple[int, int, int, int]  # ROWS, COLS, warps, stages

# By kernel and bytes of a row of q. Of Hopper and Blackwell, where a product of 64 rows and more reads its operands
# from shared memory, of which there are 227 KiB: large tiles, and the loads of the next tiles under way meanwhile.
# What a program holds in registers sets the size: `forward` ROWS x D of sums, `keys` 2 x COLS x D, `queries` ROWS x D,
# and each some ROWS x COLS of scores; more than 255 registers of a thread would spill. The first of a line is for a
# card that nobody has measured.
_HOPPER: dict[str, dict[int, tuple[_Tile, ...]]] = {
    "forward": {
        128: ((128, 128, 8, 2), (128, 64, 8, 3)),
        256: ((128, 64, 8, 3), (64, 64, 4, 3)),
        512: ((128, 32, 8, 2),),
    },
    "queries": {128: ((128, 64, 8, 2),), 256: ((128, 64, 8, 2), (64, 64, 4, 2)), 512: ((64, 32, 8, 2),)},
    "keys": {128: ((64, 128, 8, 2), (32, 64, 4, 2)), 256: ((32, 128, 8, 3), (32, 64, 4, 2)), 512: ((32, 32, 8, 2),)},
    "statistics": {128: ((64, 64, 4, 1),), 256: ((64, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
}
# With a bias, a mask, a softcap or dropout a score takes more registers on its way to a weight.
_HOPPER_LADEN: dict[str, dict[int, tuple[_Tile, ...]]] = {
    **_HOPPER,
    "forward": {128: ((128, 64, 8, 3), (64, 64, 4, 3)), 256: ((128, 64, 8, 2), (64, 64, 8, 2)), 512: ((64, 64, 8, 2),)},
    "queries": {128: ((64, 64, 4, 2),), 256: ((128, 64, 8, 2), (64, 64, 4, 2)), 512: ((64, 32, 8, 2),)},
    "keys": {128: ((32, 128, 8, 2), (32, 64, 4, 2)), 256: ((32, 64, 4, 2), (32, 64, 8, 2)), 512: ((32, 32, 8, 2),)},
    "bias": {128: ((64, 64, 4, 2),), 256: ((64, 64, 8, 2),), 512: ((64, 32, 8, 1),)},
}
# Ampere and consumer cards hold operands in registers too, and 99 KiB of shared memory: tiles of half the size.
_AMPERE: dict[str, dict[int, tuple[_Tile, ...]]] = {
    "forward": {128: ((64, 64, 4, 2),), 256: ((64, 64, 4, 2),), 512: ((32, 32, 4, 2),)},
    "queries": {128: ((64, 64, 4, 2),), 256: ((64, 32, 4, 2),), 512: ((32, 32, 8, 1),)},
    "keys": {128: ((32, 64, 4, 2),), 256: ((32, 64, 4, 2),), 512: ((32, 32, 8, 1),)},
    "statistics": {128: ((64, 64, 4, 1),), 256: ((32, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
}
_AMPERE_LADEN: dict[str, dict[int, tuple[_Tile, ...]]] = {
    "forward": {128: ((64, 64, 8, 2),), 256: ((64, 64, 8, 2),), 512: ((32, 32, 8, 2),)},
    "queries": {128: ((32, 64, 4, 2),), 256: ((32, 64, 8, 2),), 512: ((32, 32, 8, 1),)},
    "keys": {128: ((16, 64, 4, 2),), 256: ((32, 64, 8, 2),), 512: ((32, 32, 8, 1),)},
    "bias": {128: ((32, 64, 4, 1),), 256: ((32, 64, 8, 1),), 512: ((32, 32, 8, 1),)},
    "statistics": {128: ((32, 64, 4, 1),), 256: ((32, 64, 8, 1),), 512: ((32, 32, 4, 1),)},
}
# AMD's have 64 KiB, and warps of 64 threads: of eight, a thread has half the registers.
_AMD: dict[str, dict[int, tuple[_Tile, ...]]] = {
    "forward": {128: ((64, 64, 4, 1),), 256: ((64, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
    "queries": {128: ((32, 64, 4, 1),), 256: ((32, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
    "keys": {128: ((32, 64, 4, 1),), 256: ((32, 64, 4, 1),), 512: ((16, 32, 4, 1),)},
    "bias": {128: ((32, 64, 4, 1),), 256: ((32, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
    "statistics": {128: ((32, 64, 4, 1),), 256: ((32, 64, 4, 1),), 512: ((32, 32, 4, 1),)},
}
# float32: three products of halves, all of which are held at a time.
_FLOAT32: dict[str, dict[int, tuple[_Tile, ...]]] = {
    kernel: {128: (tile,), 256: (tile,), 512: (large,), 1024: (largest,)}
    for kernel, tile, large, largest in (
        ("forward", (32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        ("queries", (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
        ("keys", (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        ("bias", (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
        ("statistics", (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
    )
}
_DECODING: _Tile = (16, 64, 4, 2)  # reads the keys once; the matrix units are idle however they are used


def candidates(
    kernel: str, card: Card, dtype: torch.dtype, dims: int, *, few_rows: bool, laden: bool, prefix: int
) -> tuple[Configuration, ...]:
    """The configurations that may serve a call.

    Args:
        kernel: "forward", "statistics", "queries", "keys" or "bias".
        dims: head size as the kernels pad it, a power of two.
        few_rows: of forward: no more than 16 rows of queries.
        laden: whether there is a bias, a mask, a softcap or dropout.
        prefix: keys of the prefix.
    """
    width = max(dims * dtype.itemsize, 128)
    if dtype == torch.float32:
        table = _FLOAT32
    elif card.maker == "cuda" and card.large and card.architecture >= 90:
        table = _HOPPER_LADEN if laden else _HOPPER
    elif card.maker == "cuda":
        table = _AMPERE_LADEN if laden else _AMPERE
    else:
        table = _AMD
    tiles = table[kernel][width]
    if few_rows and kernel == "forward" and width <= 512:
        tiles = (_DECODING if width <= 256 else (16, 32, 4, 2),)
    found = []
    for rows, cols, warps, stages in tiles:
        blocks = {"ROWS": rows, "COLS": cols}
        if kernel in ("forward", "statistics", "queries"):
            blocks["PREFIX_COLS"] = min(cols, max(16, triton.next_power_of_2(prefix)))  # short as a rule
        found.append(Configuration(blocks, warps, stages))
    return tuple(found)
