"""Triton's interpreter, with the arithmetic of bfloat16 that it lacks.

The interpreter holds a bfloat16 tile as uint16 and computes with its bits: sums, products, comparisons and tl.dot are
silently wrong in Triton 3.6 to 3.9, and a cast from float32 truncates where a GPU rounds to nearest even. Here such
tiles become float32 for the operation and are rounded as a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(tile: Any) -> Any:
    if not isinstance(tile, interpreter.TensorHandle) or tile.dtype.scalar != tl.bfloat16:
        return tile
    bits = np.ascontiguousarray(tile.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32).reshape(np.shape(tile.data)), tl.float32)


def _narrowed(tile: Any) -> Any:
    """To bfloat16, to nearest even."""
    values = np.ascontiguousarray(np.asarray(tile.data, np.float32))
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return interpreter.TensorHandle(rounded.reshape(np.shape(tile.data)), tl.bfloat16)


def repair_bfloat16() -> None:
    """Once per process, before the first launch."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_repaired", False):
        return
    builder.bfloat16_repaired = True
    dot, binary, unary, cast = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl
    reduce = interpreter.ReduceOps.apply_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *rest)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar):
            return binary(self, left, right, operation)
        found = binary(self, _widened(left), _widened(right), operation)
        return found if found.data.dtype == bool else _narrowed(found)

    def unary_op(self: Any, tile: Any, operation: Any) -> Any:
        found = unary(self, _widened(tile), operation)
        return _narrowed(found) if tile.dtype.scalar == tl.bfloat16 else found

    def cast_impl(self: Any, tile: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and tile.dtype.scalar == tl.float32:
            return _narrowed(tile)
        return cast(self, tile, target)

    def apply_impl(self: Any, tiles: Any) -> Any:
        if any(tile.handle.dtype.scalar == tl.bfloat16 for tile in tiles):
            raise NotImplementedError("a reduction of bfloat16: convert to float32 before it, as our kernels do")
        return reduce(self, tiles)

    builder.create_dot, builder.binary_op, builder.unary_op = create_dot, binary_op, unary_op
    builder.cast_impl = builder.create_fp_trunc = cast_impl
    interpreter.ReduceOps.apply_impl = apply_impl
