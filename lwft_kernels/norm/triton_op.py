"""``lwft::add_layer_norm_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lwft_kernels.norm.triton_kernels import add_layer_norm_backward_kernel, add_layer_norm_forward_kernel
from lwft_kernels.triton.cards import card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.reduction import reduced
from lwft_kernels.triton.rows import as_rows, wanted
from lwft_kernels.triton.tuning import Configuration

_PROGRAMS_PER_MULTIPROCESSOR = 2  # of backward, each with partial sums of dweight and dbias


def _candidates(d: int) -> tuple[Configuration, ...]:
    cols = max(64, triton.next_power_of_2(d))  # keep_tile draws for 64 columns
    # 16 elements a thread, or 8: fewer leave the memory idle, more than 32 spill beside the sums of backward
    first = min(max(cols // (32 * 16), 1), 16)
    return tuple(Configuration({"COLS": cols}, num_warps=w) for w in dict.fromkeys((first, min(first * 2, 16))))


def add_layer_norm_forward(
    x: Tensor,
    sublayer_out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    dtype = torch.promote_types(x.dtype, sublayer_out.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    rows, added = as_rows(x), as_rows(sublayer_out)
    tokens = rows.shape[0]
    if tokens == 0:
        return out, mean, rstd
    threshold, keep_scale = threshold_and_scale(dropout_p)
    launch(
        add_layer_norm_forward_kernel,
        rows, added, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
        seed_or(seed, x), out, mean, rstd,
        tokens, d, rows.stride(0), added.stride(0), eps, threshold, keep_scale,
        WEIGHT=weight is not None, BIAS=bias is not None, DROPOUT=seed is not None,
        grid=lambda _: (tokens,), candidates=_candidates(d), band=(d, x.dtype, dtype, seed is not None),
    )  # fmt: skip
    return out, mean, rstd


def add_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    sublayer_out: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    grad, rows, added = as_rows(grad_out), as_rows(x), as_rows(sublayer_out)
    tokens = rows.shape[0]
    parameter = x if weight is None else weight
    dx, dsublayer_out = wanted(needs, 0, x, x.shape), wanted(needs, 1, sublayer_out, x.shape)
    programs = min(tokens, int(_PROGRAMS_PER_MULTIPROCESSOR * card_of(x.device).multiprocessors))
    partials = [x.new_empty((programs, d) if needs >> bit & 1 else (0, d), dtype=torch.float32) for bit in (2, 3)]
    threshold, keep_scale = threshold_and_scale(dropout_p)
    if tokens > 0:
        launch(
            add_layer_norm_backward_kernel,
            grad, rows, added, x if weight is None else weight.contiguous(), mean, rstd, seed_or(seed, x),
            dx, dsublayer_out, *partials,
            tokens, d, grad.stride(0), rows.stride(0), added.stride(0), threshold, keep_scale,
            WEIGHT=weight is not None, DROPOUT=seed is not None,
            DX=bool(needs & 1), DSUBLAYER=bool(needs & 2), DWEIGHT=bool(needs & 4), DBIAS=bool(needs & 8),
            grid=lambda _: (programs,), candidates=_candidates(d),
            band=(d, x.dtype, grad.dtype, needs, seed is not None),
        )  # fmt: skip
    dweight, dbias = (
        reduced(partial, (d,), parameter.dtype) if needs >> bit & 1 else parameter.new_empty(0)
        for bit, partial in zip((2, 3), partials, strict=True)
    )
    return dx, dsublayer_out, dweight, dbias
