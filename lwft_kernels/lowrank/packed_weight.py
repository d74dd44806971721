"""`PackedWeight`: a frozen parameter whose memory is laid out for the products with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class PackedWeight(Tensor):
    """A parameter (d_out, d_in) of which only the packed form is in memory: ``blocks``, a vector of bytes.

    `lora_linear` multiplies with the blocks. To everything else it is the parameter that it was: an operation computes
    with an unpacked copy, and one that writes packs the result again. Copies, pickles, what ``.to(...)`` has converted
    and what a state_dict holds are plain tensors, the same bits.

    The results of views (``weight[0]``, ``weight.T``, ``weight.detach()``) are copies: writing into them does not reach
    the weight. ``weight[0] = ...``, ``weight.data`` and the in-place methods do.
    """

    blocks: Tensor
    moved: bool = False  # whether it is the result of a `.to(...)` that had nothing to do

    # every operation goes to __torch_dispatch__, below autograd
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, blocks: Tensor, shape: Sequence[int], dtype: torch.dtype) -> PackedWeight:
        self: PackedWeight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=blocks.device)
        self.blocks = blocks
        self._is_param = True  # which makes it an nn.Parameter to isinstance
        return self

    @classmethod
    def pack(cls, weight: Tensor) -> PackedWeight:
        """A packed copy of a plain `weight` (d_out, d_in) on the CPU."""
        return cls(torch.ops.lwft.pack_weight(weight.detach()), weight.shape, weight.dtype)

    def unpack(self) -> Tensor:
        """The plain tensor, every bit of it."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.blocks.device)
        torch.ops.lwft.unpack_weight_(weight, self.blocks)
        return weight

    @classmethod
    def _of(cls, weight: PackedWeight) -> PackedWeight:
        """Another tensor of the same memory."""
        return cls(weight.blocks, weight.shape, weight.dtype)

    def parameter(self) -> PackedWeight:
        """This one or, where it is what `to` returned, one whose `detach` is plain."""
        return self._of(self) if self.moved else self

    def _write(self, weight: Tensor) -> None:
        self.blocks.copy_(torch.ops.lwft.pack_weight(weight.detach()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and args[0].moved:
            return cls._of(args[0])
        plain: dict[int, Tensor] = {}  # a weight that is given twice is unpacked once

        def unpacked(weight: PackedWeight) -> Tensor:
            if id(weight) not in plain:
                plain[id(weight)] = weight.unpack()
            return plain[id(weight)]

        kwargs = kwargs or {}
        result = func(*tree_map_only(cls, unpacked, args), **tree_map_only(cls, unpacked, kwargs))
        if not func._schema.is_mutable:
            return result
        written: dict[int, PackedWeight] = {}  # by the plain tensor that was written, which the result may be
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                value._write(unpacked(value))
                written[id(unpacked(value))] = value
        return tree_map_only(Tensor, lambda out: written.get(id(out), out), result)

    @property
    def data(self) -> PackedWeight:
        """Another tensor of the same memory, without autograd."""
        return self._of(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            # as a parameter does, it becomes what it is given, a plain one: nn.Module.to comes here
            torch.utils.swap_tensors(self, nn.Parameter(value, self.requires_grad))
        elif not isinstance(value, PackedWeight):
            self._write(value)
        elif value.blocks is not self.blocks:
            self.blocks.copy_(value.blocks)

    def __setitem__(self, index: Any, value: Any) -> None:
        weight = self.unpack()
        weight[index] = value.unpack() if isinstance(value, PackedWeight) else value
        self._write(weight)

    def numpy(self, *, force: bool = False) -> Any:
        return self.unpack().numpy(force=force)

    def tolist(self) -> Any:
        return self.unpack().tolist()

    def share_memory_(self) -> Any:
        """Plain from here on: other processes need not pack as this one does."""
        torch.utils.swap_tensors(self, nn.Parameter(self.unpack(), self.requires_grad))
        return self.share_memory_()  # the parameter's

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.unpack(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.unpack(), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, requires_grad={self.requires_grad})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["blocks"], (tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedWeight:
        return cls(inner["blocks"], *context)


def _keeps_packed(name: str) -> Callable[..., Tensor]:
    """`Tensor.to` and its like: packed still where nothing is to be converted or moved, else plain.

    nn.Module makes a parameter of what they return, by way of its `detach`, which must then be packed too.
    """
    convert = getattr(Tensor, name)

    def method(self: PackedWeight, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = convert(self, *args, **kwargs)
        if result is self:
            result = PackedWeight._of(self)
            result.moved = True
        return result

    method.__name__, method.__doc__ = name, convert.__doc__
    return method


for _name in ("to", "cpu", "type", "float", "double", "half", "bfloat16"):
    setattr(PackedWeight, _name, _keeps_packed(_name))


def hold_packed(linear: nn.Linear) -> None:
    """Make the weight of `linear` a `PackedWeight`: the same object, so that whoever holds it still does.

    Raises:
        RuntimeError: somebody needs the tensor as it is (a graph saved it for its backward, say).
    """
    torch.utils.swap_tensors(linear.weight, PackedWeight.pack(linear.weight))


def hold_plain(linear: nn.Linear) -> None:
    """Undo `hold_packed`: the same object, the same bits. Nothing happens where the weight is not packed.

    Where somebody needs the packed one (a graph saved it for its backward, say), the layer gets a new parameter.
    """
    weight: Any = linear.weight
    if type(weight) is not PackedWeight:
        return
    plain = nn.Parameter(weight.unpack(), weight.requires_grad)
    try:
        torch.utils.swap_tensors(weight, plain)
    except RuntimeError:
        linear.weight = plain


def operand(weight: Tensor) -> Tensor:
    """What the op `lora_linear` takes for `weight`: the blocks of a packed one that is frozen."""
    if type(weight) is PackedWeight and not weight.requires_grad:
        return weight.blocks
    return weight
