"""``attention``: scaled dot-product attention with what lightweight fine-tuning adds to it, in one pass."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lwft_kernels import backend, checks, dropout
from lwft_kernels.attention import autograd, reference

_OP = "attention"
_SMALL = backend.Small(forward=128 << 10, backward=1 << 20)  # multiply-adds of q k^T
_LARGEST_TRITON_HEAD = 256  # tiles of whole heads lie in the registers and the shared memory of one program


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    prefix_k: Tensor | None = ...,
    prefix_v: Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    prefix_k: Tensor | None = ...,
    prefix_v: Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(softcap(scale * q k^T) + bias, masked)) v over prefix and keys, no (S, L) matrix.

    Vaswani et al. 2017, eq. 1, computed as FlashAttention-2 (Dao 2023). B batch, H query heads, Hkv key
    heads (H a multiple of Hkv: grouped-query attention, Ainslie et al. 2023), S queries, L keys, P prefix
    keys, D head size.

    Args:
        q: (B, H, S, D), float64, float32, bfloat16 or float16; any strides, as k and v.
        k, v: (B, Hkv, L, D), the dtype of q. Zero keys are allowed.
        bias: added to the scores (ALiBi, T5 position bias, an additive mask), broadcastable to (B, H, S,
            L), in the dtype of q or float32 beside 16-bit q. Its gradient has its own shape.
        mask: bool, broadcastable to (B, H, S, L); True = may attend, as in `scaled_dot_product_attention`.
        prefix_k, prefix_v: (B or 1, Hkv, P, D), the dtype of q: learned keys and values that every query
            sees whatever the masks say (prefix tuning, Li & Liang 2021). They have no bias, and no
            position.
        scale: factor of the scores; None for 1/sqrt(D).
        causal: a query sees no later key. Query i stands at i' = i + L - S: the *last* query beside the
            last key, as in FlashAttention, which is right for a KV cache.
            `scaled_dot_product_attention(is_causal=True)` puts the *first* query beside the first key; the
            two agree when S = L.
        window: a query sees the keys with i' - window < j and, when not causal, j < i' + window (sliding
            window, Beltagy et al. 2020); at least 1.
        softcap: scores s become softcap * tanh(s / softcap) before bias and masks (Gemma 2, 2024, section
            2); positive.
        lengths: (B,) integer, number of valid keys of each sequence; below 0 counts as 0, above L as L.
        dropout_p: probability of an attention weight to be zeroed. It is applied whenever it is above 0 (as
            in `scaled_dot_product_attention`): pass 0.0 in evaluation.
        return_lse: return also the log-sum-exp of each row of scores, over prefix and keys and before
            dropout, to merge results of parts of the keys; differentiable.

    Returns:
        out, (B, H, S, D) in the dtype of q, laid out so that ``out.transpose(1, 2).reshape(B, S, H * D)``
        copies nothing; with `return_lse` also lse, (B, H, S), float32, or float64 for float64 inputs. A query
        that may attend to nothing gets zeros, lse -inf and zero gradients, never NaN. Under autocast q, k, v,
        prefix and bias are cast to its dtype, as for `scaled_dot_product_attention`. On the CPU a small plain or causal
        call is left to that, which takes less time; `stats()` counts it.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; the message names it.
    """
    if (
        bias is None and mask is None and prefix_k is None and prefix_v is None
        and window is None and softcap is None and lengths is None and return_lse is False
    ):  # fmt: skip
        small = _by_torch(q, k, v, scale, causal, dropout_p)
        if small is not None:
            return small
    if (
        backend.attempts(q)
        and q.dim() == 4
        and _are_plain(bias, mask, lengths)
        and dropout.is_probability(dropout_p)
        and type(causal) is bool
        and type(return_lse) is bool
        and (scale is None or type(scale) is float)
        and (window is None or (type(window) is int and window > 0))
        and (softcap is None or (type(softcap) is float and softcap > 0.0))
    ):
        found: tuple[Tensor, Tensor] | None = autograd.try_attention(
            q, k, v, bias, mask, prefix_k, prefix_v, lengths,
            dropout.draw_seed(q.device) if dropout_p else None,
            1.0 / math.sqrt(q.shape[3] or 1) if scale is None else scale,  # the op refuses a head size of zero
            causal, window or 0, softcap or 0.0, dropout_p,
        )  # fmt: skip
        if found is not None:
            return found if return_lse else found[0]

    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.floating(_OP, name, value)
    autocast = checks.autocast_dtype(q.device)
    if autocast is not None:
        q, k, v = (value if value.dtype == torch.float64 else value.to(autocast) for value in (q, k, v))
        bias, prefix_k, prefix_v = (
            checks.cast(value, autocast) if isinstance(value, Tensor) else value for value in (bias, prefix_k, prefix_v)
        )

    _check_keys(q, k, v, prefix_k, prefix_v)
    batch, heads, queries, head_dim = q.shape
    full = (batch, heads, queries, k.shape[2])
    if bias is not None:
        checks.floating(_OP, "bias", bias)
        checks.parameter_dtype(_OP, "bias", bias, "q", q)
        bias = _broadcastable("bias", bias, full, q)
    if mask is not None:
        checks.tensor(_OP, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{_OP}: mask must be bool (True = may attend), got {mask.dtype}; pass an additive mask as bias"
            )
        mask = _broadcastable("mask", mask, full, q)
    if lengths is not None:
        lengths = _checked_lengths(lengths, q)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else checks.number(_OP, "scale", scale)
    softcap = None if softcap is None else checks.positive(_OP, "softcap", softcap)
    dropout_p = checks.probability(_OP, "dropout_p", dropout_p)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{_OP}: {name} must be True or False, got {type(flag).__name__}")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(f"{_OP}: window must be an int, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"{_OP}: window must be at least 1 (a query sees itself), got {window}")

    seed = dropout.draw_seed(q.device) if dropout_p > 0.0 else None
    if not backend.use_kernels(_OP, q, triton_limit=lambda: _triton_limit(head_dim)):
        return reference.attention(
            q, k, v, bias=bias, mask=mask, prefix_k=prefix_k, prefix_v=prefix_v, scale=scale, causal=causal,
            window=window, softcap=softcap, lengths=lengths, dropout_p=dropout_p, return_lse=return_lse,
            seed=seed,
        )  # fmt: skip
    out: Tensor
    lse: Tensor
    out, lse = autograd.attention(
        q, k, v, bias, mask, prefix_k, prefix_v, lengths, seed,
        scale, causal, window or 0, softcap or 0.0, dropout_p,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, dropout_p: float) -> Tensor | None:
    """A small call by `scaled_dot_product_attention`, where every query sees a key; else None."""
    try:
        if not (type(dropout_p) is float and dropout_p == 0.0 and type(causal) is bool and backend.may_be_small()):
            return None
        _, heads, queries, head_dim = shape = q.shape
        keys = queries if k.shape == shape else k.shape[2]
        work = q.numel() * keys
        any_layout = heads == 1 or queries == 1
        if not (
            0 < work <= _SMALL.backward
            and q.is_cpu
            and v.shape == k.shape
            and (any_layout or q.stride(1) == head_dim)
            and (work <= _SMALL.forward or backend.wants_gradient(q, k, v))
            and (k.shape == shape or (not causal and k.shape == (*shape[:2], keys, head_dim)))
            and (scale is None or (type(scale) is float and math.isfinite(scale)))
        ):
            return None
        if scale is None and not causal:  # arguments by name take half a microsecond
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        if any_layout or out.stride(1) == head_dim:
            backend.small_calls[_OP] += 1
            return out
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
        pass  # the checks that follow say which argument it was
    return None


def _triton_limit(head_dim: int) -> str | None:
    if head_dim <= _LARGEST_TRITON_HEAD:
        return None
    return f"Triton's kernels take heads of at most {_LARGEST_TRITON_HEAD} elements, not {head_dim}"


def _are_plain(bias: object, mask: object, lengths: object) -> bool:
    """Whether these are in the form in which the op takes them: four dimensions, lengths of 64 bits."""
    return (
        (bias is None or (isinstance(bias, Tensor) and bias.dim() == 4))
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4))
        and (lengths is None or (isinstance(lengths, Tensor) and lengths.dtype == torch.int64))
    )


def _check_keys(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None) -> None:
    """Shapes, dtypes and devices of q, k, v and the prefix."""
    checks.shape(_OP, "q", q, (None, None, None, None), "(B, H, S, D)")
    batch, heads, _, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"{_OP}: the last dimension of q, the head size, is empty")
    checks.shape(_OP, "k", k, (batch, None, None, head_dim), "(B, Hkv, L, D)")
    kv_heads, keys = k.shape[1:3]
    checks.shape(_OP, "v", v, (batch, kv_heads, keys, head_dim), "(B, Hkv, L, D), that of k,")
    if heads != 0 if kv_heads == 0 else heads % kv_heads != 0:
        raise ValueError(
            f"{_OP}: the number of heads of q must be a multiple of that of k and v, got {heads} and {kv_heads}"
        )
    if (prefix_k is None) != (prefix_v is None):
        missing, given = ("prefix_k", "prefix_v") if prefix_k is None else ("prefix_v", "prefix_k")
        raise ValueError(f"{_OP}: {missing} is None but {given} is given; pass both or neither")
    others = [("k", k), ("v", v)]
    if prefix_k is not None and prefix_v is not None:
        for name, value in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
            checks.floating(_OP, name, value)
            meaning = "(B or 1, Hkv, P, D)"
            checks.shape(_OP, name, value, (None, kv_heads, None, head_dim), meaning)
            if value.shape[0] not in (1, batch):
                raise ValueError(f"{_OP}: {name} must have shape {meaning} with B = {batch}, got {tuple(value.shape)}")
        checks.shape(_OP, "prefix_v", prefix_v, tuple(prefix_k.shape), "that of prefix_k")
        others += [("prefix_k", prefix_k), ("prefix_v", prefix_v)]
    for name, value in others:
        checks.same_device(_OP, name, value, "q", q)
        checks.same_dtype(_OP, name, value, "q", q)


def _broadcastable(name: str, value: Tensor, full: tuple[int, int, int, int], q: Tensor) -> Tensor:
    """`value` as a 4-D view, every dimension of the full size or 1."""
    checks.same_device(_OP, name, value, "q", q)
    missing = 4 - value.dim()
    if missing >= 0:
        view = value[(None,) * missing] if missing else value
        if all(size == 1 or size == want for size, want in zip(view.shape, full, strict=True)):
            return view
    raise ValueError(f"{_OP}: {name} must be broadcastable to (B, H, S, L) = {full}, got {tuple(value.shape)}")


def _checked_lengths(lengths: Tensor, q: Tensor) -> Tensor:
    checks.tensor(_OP, "lengths", lengths)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"{_OP}: lengths must be integers (number of valid keys), got {lengths.dtype}")
    checks.shape(_OP, "lengths", lengths, (q.shape[0],), "(B,)")
    checks.same_device(_OP, "lengths", lengths, "q", q)
    return lengths.to(torch.int64)
