"""The holder of a quantised weight, in the two formats of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lwft_kernels import checks

_NAME = "QuantizedWeight"


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen weight (d_out, d_in) in a format of bitsandbytes. Nothing is copied: it holds the tensors themselves.

    Of 4 bits (NF4 or FP4; QLoRA, Dettmers et al. 2023, sections 2 and 3), with a `table`: W lies row after row, in
    blocks of `blocksize` weights, W = table[code] * absmax of the block. Where the absmax are quantised themselves
    ("double quantisation"), that of block i is absmax_table[absmax_codes[i]] * absmax[i // absmax_blocksize] +
    absmax_offset.

    Of 8 bits (LLM.int8(), Dettmers et al. 2022, section 2), without one: W = codes * absmax of the row / 127.

    Attributes:
        codes: uint8 of any shape, two weights a byte, the first in the high bits; or int8 (d_out, d_in).
        absmax: float32, one per block of weights, or per row; or per block of `absmax_codes`.
        shape: (d_out, d_in).
        table: (16,) float32, or None.
        blocksize: weights per absmax, a power of two; 0 without `table`.
        absmax_codes: uint8, one per block of weights, or None.
        absmax_table: (256,) float32, or None.
        absmax_offset: float32 of one element, or None.
        absmax_blocksize: `absmax_codes` per absmax, a power of two; 0 without them.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device; the message names it.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    table: Tensor | None = None
    blocksize: int = 0
    absmax_codes: Tensor | None = None
    absmax_table: Tensor | None = None
    absmax_offset: Tensor | None = None
    absmax_blocksize: int = 0

    def __post_init__(self) -> None:
        d_out, d_in = self.shape
        if self.table is None:
            _tensor("codes", self.codes, torch.int8, self.codes)
            checks.shape(_NAME, "codes", self.codes, (d_out, d_in), "(d_out, d_in)")
            _tensor("absmax", self.absmax, torch.float32, self.codes)
            checks.shape(_NAME, "absmax", self.absmax, (d_out,), "(d_out,)")
            return
        _tensor("codes", self.codes, torch.uint8, self.codes)
        _elements("codes", self.codes, -(-d_out * d_in // 2), f"half a byte for each of {d_out} x {d_in} weights")
        _tensor("table", self.table, torch.float32, self.codes)
        _elements("table", self.table, 16, "one for each code of four bits")
        _power_of_two("blocksize", self.blocksize)
        blocks = -(-d_out * d_in // self.blocksize)
        if self.absmax_codes is None:
            _tensor("absmax", self.absmax, torch.float32, self.codes)
            _elements("absmax", self.absmax, blocks, f"one per block of {self.blocksize} weights")
            return
        if self.absmax_table is None or self.absmax_offset is None:
            raise ValueError(f"{_NAME}: absmax_codes need absmax_table, absmax_offset and absmax_blocksize as well")
        _tensor("absmax_codes", self.absmax_codes, torch.uint8, self.codes)
        _elements("absmax_codes", self.absmax_codes, blocks, f"one per block of {self.blocksize} weights")
        _tensor("absmax_table", self.absmax_table, torch.float32, self.codes)
        _elements("absmax_table", self.absmax_table, 256, "one for each code of eight bits")
        _tensor("absmax_offset", self.absmax_offset, torch.float32, self.codes)
        _elements("absmax_offset", self.absmax_offset, 1, "the mean that was taken off")
        _power_of_two("absmax_blocksize", self.absmax_blocksize)
        _tensor("absmax", self.absmax, torch.float32, self.codes)
        outer = -(-blocks // self.absmax_blocksize)
        _elements("absmax", self.absmax, outer, f"one per block of {self.absmax_blocksize} absmax_codes")

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @classmethod
    def from_bitsandbytes(cls, source: Any) -> QuantizedWeight:
        """The weight of a `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, or of their `Params4bit` or `Int8Params`.

        Args:
            source: a layer that has been moved to its device, which is when bitsandbytes quantises. Of an 8-bit layer
                that has run, only the layer itself knows the scales.

        Raises:
            TypeError: `source` is no such thing.
            ValueError: it is not quantised, or laid out for bitsandbytes' CPU kernel (after a call in evaluation).
        """
        weight = getattr(source, "weight", source)
        kind = type(weight).__name__
        if kind == "Params4bit":
            return cls._four_bits(weight)
        if kind == "Int8Params":
            return cls._eight_bits(weight, getattr(source, "state", None))
        raise TypeError(
            f"{_NAME}.from_bitsandbytes: source must be a Linear4bit, Linear8bitLt, Params4bit or Int8Params of "
            f"bitsandbytes, got {type(source).__name__}" + (f" with a weight of {kind}" if weight is not source else "")
        )

    @classmethod
    def _four_bits(cls, weight: Any) -> QuantizedWeight:
        state = weight.quant_state
        if state is None:
            raise ValueError(f"{_NAME}.from_bitsandbytes: source is not quantised yet; move it to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{_NAME}.from_bitsandbytes: source is laid out for bitsandbytes' CPU kernel; build it before the "
                "layer is called in evaluation, or move the layer to a GPU"
            )
        codes = weight.data.as_subclass(Tensor).view(torch.uint8)  # whatever `quant_storage` calls them
        d_out, d_in = state.shape
        if not state.nested:
            return cls(codes, state.absmax, (d_out, d_in), state.code, state.blocksize)
        outer = state.state2
        return cls(
            codes, outer.absmax, (d_out, d_in), state.code, state.blocksize,
            state.absmax, outer.code, state.offset, outer.blocksize,
        )  # fmt: skip

    @classmethod
    def _eight_bits(cls, weight: Any, state: Any) -> QuantizedWeight:
        # the layer takes both away from its parameter when it is first called
        codes, absmax = weight.CB, weight.SCB
        if codes is None and state is not None:
            codes, absmax = state.CB, state.SCB
        if codes is None or absmax is None:
            raise ValueError(
                f"{_NAME}.from_bitsandbytes: source is not quantised yet (move it to its device first, with "
                "has_fp16_weights=False), or is the parameter of a layer that has run: pass the layer"
            )
        d_out, d_in = codes.shape
        return cls(codes, absmax, (d_out, d_in))


def _tensor(name: str, value: object, dtype: torch.dtype, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{_NAME}: {name} must be {dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{_NAME}: {name} is on {value.device} but codes is on {like.device}; move one with .to(...)")


def _elements(name: str, value: Tensor, count: int, meaning: str) -> None:
    if value.numel() != count:
        raise ValueError(f"{_NAME}: {name} must have {count} elements, {meaning}, got {value.numel()}")


def _power_of_two(name: str, value: int) -> None:
    if value < 2 or value & (value - 1):
        raise ValueError(f"{_NAME}: {name} must be a power of two of at least 2, got {value}")
