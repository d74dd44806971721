"""The attention function of our name: transformers' arguments in the words of `lwft_kernels.functional.attention`.

What the op cannot serve is computed by the library's own path and counted, with the reason, in `stats`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations import reached
from lwft_kernels.integrations.class_swap import PLAIN
from lwft_kernels.integrations.transformers.masks import CompactMask, Rule
from lwft_kernels.integrations.transformers.packing import Packing, by_sequence

_OP = "transformers attention"  # as declined calls are named in stats()

# The argument by which another room's function is called in the place of ours, from within the model's attention
INSTEAD = "lwft_instead"

# Arguments that change the result and that the op does not know; others that models hand along do not.
_SPARSE = ("block_indices", "indices")  # known to neither SDPA nor eager
_EAGER = ("s_aux", "sinks", "softcap", "head_mask")  # known to the eager function of the model, and not to SDPA
_UNKNOWN = ("sinks", "head_mask", "cache")


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, S, D), a transposed view
    key: Tensor,  # (B, Hkv, L, D)
    value: Tensor,  # (B, Hkv, L, D)
    attention_mask: Tensor | None,  # (B or 1, H or 1, S, L): bool, True = may attend, or float to be added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # (B or 1, H, S, L), T5's: learned, wants a gradient
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,), GPT-OSS' sinks: a learned score that takes weight and gives no value
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The attention function models call; its arguments are transformers'. Returns ((B, S, H, D), None)."""
    if (instead := kwargs.pop(INSTEAD, None)) is not None:
        result: tuple[Tensor, Any] = instead(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, softcap=softcap, s_aux=s_aux, **kwargs,
        )  # fmt: skip
        return result
    for name in _SPARSE:
        if kwargs.get(name) is not None:  # SDPA would attend to everything and not say so
            raise NotImplementedError(f"attention over {name} only is not supported: use accelerate(attention=False)")
    packing = Packing.of(kwargs)
    reason = why_not(query, key, value, attention_mask, scaling, s_aux, packing, kwargs)
    if reason is not None:
        backend.record_decline(_OP, reason)
        own = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: argument for name, argument in own.items() if argument is not None}
        return _original(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    reached.mark(module)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, one for the batch
    queries = query.shape[2]
    if packing is None and attention_mask is None and key.shape[2] > queries > 1 and is_causal:
        # a static cache that was empty: the rest of it is not to be seen
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    rule, bias = _rule_and_bias(query, key, attention_mask, bool(is_causal), position_bias)
    if packing is not None:
        rule = packing.restrict(rule, queries, key.shape[2], bias)

    by_rule = functools.partial(attend, bias=bias, sinks=s_aux, scale=scaling, softcap=softcap, dropout_p=dropout)
    if rule.sequences is None:
        return by_rule(query, key, value, rule), None
    return by_sequence(by_rule, query, key, value, rule), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    bias: Tensor | None,
    sinks: Tensor | None,
    **options: Any,
) -> Tensor:  # (B, S, H, D)
    """`lwft_kernels.functional.attention` for what `why_not` has nothing against; `options` are its own."""
    width = value.shape[-1]
    if width < query.shape[-1]:  # multi-head latent attention
        value = F.pad(value, (0, query.shape[-1] - width))
    options |= {"mask": rule.mask, "causal": rule.causal, "window": rule.window, "lengths": rule.lengths}
    if sinks is None:
        out = LF.attention(query, key, value, bias=bias, **options)
    else:
        # exp(sink) more in the denominator of the softmax: sum / (sum + exp(sink)) is sigmoid(lse - sink)
        out, lse = LF.attention(query, key, value, bias=bias, return_lse=True, **options)
        out = out * torch.sigmoid(lse - sinks[:, None]).to(out.dtype)[..., None]
    by_token: Tensor = out.transpose(1, 2)[..., :width]
    return by_token


def _rule_and_bias(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool, position_bias: Tensor | None
) -> tuple[Rule, Tensor | None]:
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        # transformers' rule: no mask and several queries mean causal, aligned to the first key (ours to the last)
        if not is_causal or queries == 1:
            return Rule(), position_bias
        if keys < queries:
            return Rule(mask=torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()), position_bias
        return Rule(causal=True), position_bias
    if isinstance(attention_mask, CompactMask) and not torch.compiler.is_compiling():
        rule = attention_mask.rule
        if rule is not None and attention_mask.shape == (query.shape[0], 1, queries, keys):
            return rule, position_bias
    attention_mask = attention_mask[..., :keys]  # of a compact one, the elements
    if attention_mask.dtype == torch.bool:
        return Rule(mask=attention_mask), position_bias
    if position_bias is None:  # additive
        return Rule(), attention_mask.to(query.dtype)
    return Rule(), position_bias + attention_mask


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: object,
    s_aux: Tensor | None,
    packing: Packing | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the op cannot serve this call, or None."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    if kwargs.get("output_attentions"):
        return "output_attentions asks for the attention matrix"
    if not torch.compiler.is_compiling() and not (type(query) in PLAIN and type(key) in PLAIN and type(value) in PLAIN):
        return "query, key or value is sharded or of a tensor subclass"
    if not (query.dtype == key.dtype == value.dtype) and checks.autocast_dtype(query.device) is None:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}"
    if key.shape[-1] != query.shape[-1] or value.shape[-1] > query.shape[-1]:
        return "the head sizes of query, key and value differ"
    if query.shape[0] not in (1, key.shape[0]):
        return "one key batch is broadcast over the queries"
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        return "s_aux is not one number for each head"
    if attention_mask is not None and attention_mask.dim() > 4:
        return "the mask has more than four dimensions"
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, *checks.FLOATING):
        return f"the mask is {attention_mask.dtype}, neither bool nor floating"
    if scaling is not None and not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is under way"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if backend.current_backend() != "reference":
        reason = backend.why_not("attention", query.device)
        if reason is not None:
            return reason
    # last, for it reads values, and a device without the kernel should not be waited for
    return None if packing is None else packing.why_not(query, key)


def _original(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The library's own path: SDPA, or the model's eager function for what SDPA does not know."""
    if isinstance(attention_mask, CompactMask):
        attention_mask = attention_mask.elements
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    needs_eager = kwargs.get("output_attentions") or any(kwargs.get(name) is not None for name in _EAGER)
    if eager is None or not needs_eager:
        result: tuple[Tensor, Any] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and is_causal and queries > 1:  # the eager function knows masks only
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    out: tuple[Tensor, Any] = eager(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out
