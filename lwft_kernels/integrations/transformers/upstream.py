"""What this room builds on in transformers, and whether a release still has it as we know it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lwft_kernels.integrations import drift
from lwft_kernels.integrations.transformers.attention import attention_forward
from lwft_kernels.integrations.transformers.masks import compact_mask

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Attention classes of transformers 4 whose whole model follows the name in its config, AdapterHub's subclasses too.
# Of the others, some ask their config once, when they are made, and some know the names they do not expect as "eager".
KNOWN_IN_4 = frozenset(
    f"{family}Attention"
    for family in (
        "Bart", "CLIP", "Gemma", "Gemma2", "GPT2", "GPTNeoX", "Llama", "MBart", "Mistral", "OPT", "Phi", "Phi3",
        "Qwen2", "Qwen3", "ViTSelf", "Whisper",
    )
)  # fmt: skip

# Fingerprints, by what they are of, of the releases that the tests have run with: 5.24.0 and 4.57.6.
_SDPA = frozenset({"954b7d8c37d7dd05", "ba591fe67a3255e4"})
_MASKS = frozenset({"d1d39083c264170a", "763d1ac7410d7f91"})
_EAGER = frozenset({
    "f52f2ade6c69bb3c",  # softcap: gemma2 and its kin
    "832fbae2223a415d",
    "1f931bda6e925556",  # sinks: gpt_oss, deepseek_v4, hy_v4
    "f67f1a76204d9258",
    "514fcb5c33321b0a",  # granite_swa
    "6fb01cf887d0fd9a",  # mimo_v2_flash
    "ecbec85f1393a7d3",  # flint
    "07307371d99db721",  # openai_privacy_filter
})  # fmt: skip

_MASK_FUNCTIONS = (
    "and_masks", "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay",
    "sliding_window_bidirectional_overlay", "padding_mask_function", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)  # fmt: skip


def why_not(strict: bool) -> str | None:
    """Why no attention of this release may be replaced, or None."""
    makers = [getattr(masking_utils, name) for name in _MASK_FUNCTIONS if hasattr(masking_utils, name)]
    sdpa = drift.Upstream(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", (sdpa_attention_forward,), _SDPA, _test_sdpa
    )
    masks = drift.Upstream("transformers.masking_utils.sdpa_mask", (sdpa_mask, *makers), _MASKS, _test_masks)
    return drift.why_not(sdpa, strict) or drift.why_not(masks, strict)


def why_not_like_eager(module: nn.Module, strict: bool) -> str | None:
    """Why softcap or sinks, of which SDPA knows nothing, may be others in `module` than ours, or None."""
    name = type(module).__module__
    eager = getattr(sys.modules.get(name), "eager_attention_forward", None)
    if eager is None or not _has_own_arithmetic(eager):
        return None
    full = f"{name}.eager_attention_forward"
    return drift.why_not(drift.Upstream(full, (eager,), _EAGER, functools.partial(_test_eager, eager)), strict)


@functools.cache
def _has_own_arithmetic(eager: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(eager)
    except (OSError, TypeError):
        return False
    return "softcap" in source or "module.sinks" in source


class _Layer(nn.Module):
    """What an attention function looks at in the module that calls it."""

    num_key_value_groups = 2
    head_dim = 8
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(4, dtype=torch.float64))


def _tensors(queries: int, keys: int) -> tuple[Tensor, ...]:
    shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    made = (torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes)
    return tuple(made)


def _difference(
    theirs: Callable[..., Any], layer: _Layer, tensors: tuple[Tensor, ...], mask: Tensor | None, **options: Any
) -> str | None:
    """The first of output and gradients in which our function differs from `theirs`."""
    functions: tuple[Callable[..., Any], ...] = (attention_forward, theirs)
    results: list[dict[str, Tensor | None]] = []
    for function in functions:
        leaves = [*tensors, *(t for t in options.values() if isinstance(t, Tensor)), layer.sinks]
        out, _ = function(layer, *tensors, mask, scaling=0.3, **options)
        gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append({"the result": out, **{f"gradient {i}": g for i, g in enumerate(gradients)}})
    # some eager functions round the softmax to float32
    return drift.first_difference(results[0], results[1], limit=1e-6)


def _test_sdpa() -> str | None:
    layer = _Layer()
    bias = inspect.signature(sdpa_attention_forward).parameters.keys() & {"position_bias"}
    for queries, keys in ((5, 5), (1, 7), (5, 7)):
        tensors = _tensors(queries, keys)
        allowed = torch.rand(2, 1, queries, keys) < 0.7
        allowed[..., 0] = True
        masks = [allowed, torch.randn(2, 1, queries, keys, dtype=torch.float64)]
        for mask in masks if keys > queries > 1 else [None, *masks]:
            found = _difference(sdpa_attention_forward, layer, tensors, mask)
            if bias and found is None:
                learned = torch.randn(1, 4, queries, keys, dtype=torch.float64, requires_grad=True)
                found = _difference(sdpa_attention_forward, layer, tensors, mask, position_bias=learned)
            if found is not None:
                return found
    return None


def _test_eager(eager: Callable[..., Any]) -> str | None:
    layer, tensors = _Layer(), _tensors(5, 5)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e300)
    if "softcap" in inspect.signature(eager).parameters:
        return _difference(eager, layer, tensors, mask, softcap=0.5)
    return _difference(eager, layer, tensors, mask, s_aux=layer.sinks)


def _test_masks() -> str | None:
    causal = masking_utils.causal_mask_function
    functions = [causal, masking_utils.sliding_window_causal_mask_function(3)]
    for name, given in (("bidirectional_mask_function", None), ("sliding_window_bidirectional_mask_function", 2)):
        function = getattr(masking_utils, name, None)  # transformers 4 has neither
        if function is not None:
            functions.append(function if given is None else function(given))
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, 5:] = False
    for function in functions:
        for past in (0, 2):
            arguments: dict[str, Any] = {"batch_size": 2, "kv_length": 7, "mask_function": function}
            arguments |= {"attention_mask": padding, "allow_is_causal_skip": False}
            if "cache_position" in inspect.signature(sdpa_mask).parameters:
                arguments["cache_position"] = torch.arange(past, 7)
            else:
                arguments |= {"q_length": 7 - past, "q_offset": past}
            ours, theirs = compact_mask(**arguments), sdpa_mask(**arguments)
            if ours is None or theirs is None or not torch.equal(ours.logical_not(), ~theirs):
                return "its masks are others"
    return None
