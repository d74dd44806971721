"""Masks that say what they mask instead of listing it: causal, a window, padding, sequences packed in a row.

transformers builds one mask per forward pass, (B, 1, S, L), by a function of the attention's name. Ours hands over a
`CompactMask`: to the model it is a tensor of that shape, to our attention a `Rule`, with which the kernel skips what
is masked. Whoever looks at its elements finds them, computed at that moment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lwft_kernels import registration
from lwft_kernels.attention.reference import may_attend

# Sequences packed in a row are computed one by one; of fewer tokens than this they cost more than the mask of all.
_SHORTEST_SEQUENCE = 16


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, in the words of `lwft_kernels.functional.attention`.

    Attributes:
        causal, window, lengths, mask: that function's arguments of these names.
        sequences: by row of the batch, the lengths of the sequences packed in it; None where each is one sequence.
        key_sequences: the same of the keys, where they differ.
    """

    causal: bool = False
    window: int | None = None
    lengths: Tensor | None = None  # (B,)
    mask: Tensor | None = None  # bool, broadcastable to (B, H, S, L)
    sequences: tuple[tuple[int, ...], ...] | None = None
    key_sequences: tuple[tuple[int, ...], ...] | None = None

    def elements(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The same as a bool tensor (B, 1, S, L), True = may attend."""
        allowed = may_attend(
            *shape[2:], causal=self.causal, window=self.window, mask=self.mask, lengths=self.lengths, device=device
        )
        if self.sequences is not None:
            number = torch.arange(shape[2], device=device)
            of = torch.stack(
                [number[: len(row)].repeat_interleave(torch.tensor(row, device=device)) for row in self.sequences]
            )
            allowed = allowed & (of[:, None, :, None] == of[:, None, None, :])
        return allowed.expand(shape).contiguous()


class _Content:
    """What a mask and its aliases share: the rule until somebody looks at the elements, which may be changed then."""

    def __init__(self, rule: Rule | None, elements: Tensor | Callable[[], Tensor]) -> None:
        self.rule = rule
        self._elements = elements

    def dense(self) -> Tensor:
        if not isinstance(self._elements, Tensor):
            self._elements, self.rule = self._elements(), None
        return self._elements


class CompactMask(Tensor):
    """A bool tensor (B, 1, S, L), True = may attend, whose elements are computed when an operation asks for them."""

    _content: _Content

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, content: _Content) -> CompactMask:
        mask: CompactMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._content = content
        return mask

    # no class of its own for the results of operations
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # reentrant checkpointing does it to every argument
            return cls(tuple(args[0].shape), args[0].device, args[0]._content)
        args, kwargs = pytree.tree_map_only(cls, lambda mask: mask.elements, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def elements(self) -> Tensor:
        """The plain tensor."""
        return self._content.dense()

    @property
    def rule(self) -> Rule | None:
        """What it says; None once somebody has looked at the elements, and perhaps changed them."""
        return self._content.rule

    # torch.compile of a part of the model meets the mask as an argument: to it this is a wrapper of its elements
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elements"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> CompactMask:
        content = _Content(None, inner["elements"])
        return CompactMask(tuple(size), inner["elements"].device, content)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.elements.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.elements.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CompactMask(shape={tuple(self.shape)}, {self.rule or 'its elements have been asked for'})"


def compact_mask(**arguments: Any) -> Tensor | None:
    """The mask function of our name: its arguments are `sdpa_mask`'s, and so is the result wherever this is not surely
    the same thing."""
    mask: Tensor | None = sdpa_mask(**arguments) if _must_be_dense(arguments) else _compact(arguments)
    return mask


def _must_be_dense(arguments: dict[str, Any]) -> bool:
    """Whether a graph is traced, in which no value may be looked at, or the mask of one query is wanted."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or registration.transforms_active()
        or _query_length(arguments) == 1
    )


def _query_length(arguments: dict[str, Any]) -> int:
    position = arguments.get("cache_position")  # how transformers 4 says it
    length: int = arguments["q_length"] if position is None else position.shape[0]
    return length


def _compact(arguments: dict[str, Any]) -> Tensor | None:
    position, batch = arguments.get("cache_position"), arguments["batch_size"]
    queries, keys = _query_length(arguments), arguments["kv_length"]
    query_offset = arguments.get("q_offset", 0) if position is None else int(position[0])
    key_offset = arguments.get("kv_offset", 0)
    device = torch.device(arguments.get("device", "cpu")) if position is None else position.device
    rule = _rule_of(arguments.get("mask_function", causal_mask_function))
    padding = arguments.get("attention_mask")
    if (
        rule is None
        # static caches have offsets on the device, and keys of the future at their end
        or not isinstance(query_offset, int)
        or not isinstance(key_offset, int)
        or query_offset - key_offset != keys - queries
        or (
            padding is not None and (padding.dtype != torch.bool or padding.shape[:1] != (batch,) or padding.dim() != 2)
        )
        or (rule.sequences is not None and (padding is not None or queries != keys or len(rule.sequences) != batch))
    ):
        dense: Tensor | None = sdpa_mask(**arguments)
        return dense
    if padding is not None:
        rule = _padded(rule, padding, key_offset, keys)
    if rule.window is not None and rule.window > keys:
        rule = replace(rule, window=None)
    # where transformers takes no mask for causal, or for everything, so do we
    if rule == Rule(causal=True) and queries == keys and arguments.get("allow_is_causal_skip", True):
        return None
    if rule == Rule() and arguments.get("allow_is_bidirectional_skip", False):
        return None
    shape = (batch, 1, queries, keys)
    return CompactMask(shape, device, _Content(rule, functools.partial(rule.elements, shape, device)))


def _padded(rule: Rule, padding: Tensor, offset: int, keys: int) -> Rule:
    valid = padding[:, offset : offset + keys]
    if valid.shape[1] < keys:
        valid = torch.nn.functional.pad(valid, (0, keys - valid.shape[1]))
    if valid.all():
        return rule
    lengths = valid.sum(-1)
    on_the_right = torch.arange(keys, device=valid.device) < lengths[:, None]
    if torch.equal(valid, on_the_right):
        return replace(rule, lengths=lengths)
    return replace(rule, mask=valid[:, None, None, :])


def _rule_of(function: Callable[..., Any]) -> Rule | None:
    """What a mask function of transformers says, or None where it says something else than a `Rule` can."""
    parts = _parts(function)
    if parts is None:
        return None
    causal, behind, around = "causal" in parts, parts.get("behind"), parts.get("around")
    if (around is not None and causal) or (behind is not None and not causal):
        return None
    # around includes the key at that distance, behind and our window do not
    rule = Rule(causal=causal, window=behind if around is None else around + 1)
    if (packed := parts.get("packed")) is not None:
        sequences = _sequences(packed, parts.get("positions"))
        return None if sequences is None else replace(rule, sequences=sequences)
    return rule if "positions" not in parts else None


def _parts(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The parts of a mask function, by their code and what it has been given; None if one is not known."""
    if function is causal_mask_function:
        return {"causal": True}
    if function is getattr(masking_utils, "bidirectional_mask_function", None):  # transformers 4 has none
        return {}
    code = getattr(function, "__code__", None)
    if code not in _known_code():
        return None
    given = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    kind = _known_code()[code]
    if kind == "all":
        inner = [_parts(part) for part in given["mask_functions"]]
    elif kind == "positions":
        inner = [_parts(given["mask_function"]), {"positions": given["position_ids"]}]
    else:
        (value,) = given.values()
        return {kind: value}
    merged: dict[str, Any] = {}
    for part in inner:
        if part is None or merged.keys() & part.keys():
            return None
        merged |= part
    return merged


@functools.cache
def _known_code() -> dict[CodeType, str]:
    """What the functions are that transformers' makers of mask functions return."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    makers = {
        "all": lambda: masking_utils.and_masks(causal_mask_function),
        "behind": lambda: masking_utils.sliding_window_overlay(1),
        "around": lambda: masking_utils.sliding_window_bidirectional_overlay(1),
        "packed": lambda: masking_utils.packed_sequence_mask_function(one),
        "positions": lambda: masking_utils.remap_positions_for_packed_sequence(causal_mask_function, one),
    }
    known: dict[CodeType, str] = {}
    for kind, make in makers.items():
        try:
            known[make().__code__] = kind
        except AttributeError:  # transformers 4 does not have all of them
            continue
    return known


def _sequences(packed: Tensor, positions: Tensor | None) -> tuple[tuple[int, ...], ...] | None:
    """The lengths of the sequences in each row, from their running numbers; None if they are too short to be worth it.

    Causality and window count in `positions`: those must run on by one within a sequence.
    """
    begins = torch.ones_like(packed, dtype=torch.bool)
    begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
    if positions is not None and not bool((begins[:, 1:] | (positions.diff(dim=-1) == 1)).all()):
        return None
    if begins.sum() * _SHORTEST_SEQUENCE > begins.numel() + _SHORTEST_SEQUENCE * begins.shape[0]:
        return None
    rows = []
    for row in begins:
        starts = [*row.nonzero().flatten().tolist(), row.numel()]
        rows.append(tuple(end - start for start, end in itertools.pairwise(starts)))
    return tuple(rows)
