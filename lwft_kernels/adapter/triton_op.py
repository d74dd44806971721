"""``lwft::adapter_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lwft_kernels.adapter.triton_forward import adapter_forward_kernel, fold_norm_kernel
from lwft_kernels.triton.cards import card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.rows import as_rows
from lwft_kernels.triton.tuning import Configuration, size_band

_LARGEST_TILE = 128  # columns at a time; a split is a multiple of it
_FOLD = (Configuration({"COLS": 1024}, num_warps=4),)


def _padded(m: int) -> int:
    """The bottleneck as the matrix instructions take it."""
    return max(16, triton.next_power_of_2(m))


def _or(parameter: Tensor | None, other: Tensor) -> Tensor:
    """A pointer argument must be some tensor, also where nobody reads it."""
    return other if parameter is None else parameter.contiguous()


def _folded(
    down_weight: Tensor, down_bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The LayerNorm's parameters taken into the first layer's: W (m, d), and s and q, (2, m) float32."""
    m, d = down_weight.shape
    folded = down_weight.new_empty((m, d), dtype=dtype)
    projected = down_weight.new_empty((2, m), dtype=torch.float32)
    launch(
        fold_norm_kernel,
        norm_weight.contiguous(), _or(norm_bias, folded), down_weight.contiguous(), _or(down_bias, folded),
        folded, projected, d, m,
        NORM_BIAS=norm_bias is not None, DOWN_BIAS=down_bias is not None,
        grid=lambda _: (m,), candidates=_FOLD,
    )  # fmt: skip
    return folded, projected


def adapter_forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    eps: float,
    scale: float,
    dropout_p: float,
    residual_is_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, d = down_weight.shape
    leading = x.shape[:-1]
    out = x.new_empty(x.shape)
    hidden = down_weight.new_empty((*leading, m))
    mean, rstd = (x.new_empty((0,) if norm_weight is None else leading, dtype=torch.float32) for _ in range(2))
    rows = as_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return out, hidden, mean, rstd
    added = rows if residual_is_x or residual is None else as_rows(residual)
    weight, projected = down_weight.contiguous(), mean
    if norm_weight is not None:
        weight, projected = _folded(down_weight, down_bias, norm_weight, norm_bias, x.dtype)
    block, splits = _cut(tokens, d, card_of(x.device).multiprocessors)
    width = triton.cdiv(triton.cdiv(d, splits), _LARGEST_TILE) * _LARGEST_TILE
    partials = splits if splits > 1 else 0
    products, sums = (x.new_empty((partials, *shape), dtype=torch.float32) for shape in ((tokens, m), (2, tokens)))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    for down, up in ((True, True),) if splits == 1 else ((True, False), (False, True)):
        launch(
            adapter_forward_kernel,
            rows, weight, _or(down_bias, x), projected, up_weight.contiguous(), _or(up_bias, x), added,
            seed_or(seed, x), out, hidden, mean, rstd, products, sums,
            tokens, d, m, rows.stride(0), added.stride(0), width, eps, scale, threshold, keep_scale,
            ACTIVATION=activation, NORM=norm_weight is not None, DOWN_BIAS=down_bias is not None,
            UP_BIAS=up_bias is not None, RESIDUAL=residual_is_x or residual is not None, DROPOUT=seed is not None,
            DOWN=down, UP=up, SPLITS=splits, EVEN=d % _LARGEST_TILE == 0, M=_padded(m),
            grid=lambda c: (triton.cdiv(tokens, c.blocks["ROWS"]), splits),
            candidates=_forward_candidates(block),
            band=(size_band(tokens), d, m, x.dtype, down_weight.dtype, seed is not None, down, up),
        )  # fmt: skip
    return out, hidden, mean, rstd


def _cut(tokens: int, d: int, multiprocessors: int) -> tuple[int, int]:
    """Tokens of a program, and into how many splits the columns are cut, so that the card is full.

    Many tokens a program, since each program reads its share of the weights; but no more than 16 splits, since every
    program adds up the splits of its tokens.
    """
    block = min(max(triton.next_power_of_2(tokens) // 8, 16), 64)
    splits = max(multiprocessors // triton.cdiv(tokens, block), 1)
    return block, min(splits, 16, triton.cdiv(d, 2 * _LARGEST_TILE))


def _forward_candidates(block: int) -> tuple[Configuration, ...]:
    shapes = ((128, 8, 3), (64, 4, 4), (128, 8, 4))
    return tuple(Configuration({"ROWS": block, "COLS": c}, num_warps=w, num_stages=s) for c, w, s in shapes)
