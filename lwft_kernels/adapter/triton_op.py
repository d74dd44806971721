"""``lwft::adapter_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lwft_kernels.adapter.triton_backward import (
    bottleneck_gradient_kernel,
    bottleneck_product_kernel,
    columns_kernel,
)
from lwft_kernels.adapter.triton_forward import adapter_forward_kernel, fold_norm_kernel
from lwft_kernels.triton.cards import card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.reduction import reduced
from lwft_kernels.triton.rows import as_rows, wanted
from lwft_kernels.triton.tuning import Configuration, size_band

_LARGEST_TILE = 128  # columns at a time; a split is a multiple of it
_TOKENS = 64  # tokens of a program of bottleneck_gradient_kernel; a part of the tokens is a multiple of it
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
    block, splits = _cut(tokens, d, 64, card_of(x.device).multiprocessors)
    width = _share(d, splits, _LARGEST_TILE)
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


def adapter_backward(
    grad_out: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    activation: int,
    scale: float,
    dropout_p: float,
    residual_is_x: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, d = down_weight.shape
    grad, rows, z = as_rows(grad_out), as_rows(x), hidden.contiguous()
    tokens = rows.shape[0]
    dx = wanted(needs, 0, x, x.shape)
    wants_dx, wants_down, wants_down_bias, wants_up, wants_up_bias, wants_norm, wants_norm_bias = (
        bool(needs >> bit & 1) for bit in range(7)
    )
    norm = norm_weight is not None
    threshold, keep_scale = threshold_and_scale(dropout_p)
    if seed is not None:
        scale *= keep_scale
    shared: dict[str, object] = {"EVEN": d % _LARGEST_TILE == 0, "M": _padded(m)}
    multiprocessors = card_of(x.device).multiprocessors
    dtypes = (x.dtype, grad.dtype, down_weight.dtype)

    def partial(wants: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if wants else (0,) * len(shape), dtype=torch.float32)

    # what is taken from a token as a whole: dz, h, and the means of LayerNorm's gradient
    wants_dz = wants_dx or wants_down or wants_down_bias or wants_norm or wants_norm_bias
    weight, projected = down_weight.contiguous(), mean
    if norm_weight is not None and wants_dx:
        weight, projected = _folded(down_weight, down_bias, norm_weight, norm_bias, x.dtype)
    dz, h = (x.new_empty((tokens, m) if wants else (0, m)) for wants in (wants_dz, wants_up))
    means = partial(norm and wants_dx, 2, tokens)
    block, splits = _cut(tokens, d, 128, multiprocessors)
    products = partial(wants_dz, splits, tokens, m)
    blocks = triton.cdiv(tokens, _TOKENS)
    ddown_bias = partial(wants_down_bias, blocks, m)
    if tokens > 0 and wants_dz:
        launch(
            bottleneck_product_kernel,
            grad, up_weight.contiguous(), seed_or(seed, x), products,
            tokens, d, m, grad.stride(0), _share(d, splits, _LARGEST_TILE), threshold,
            DROPOUT=seed is not None, **shared,
            grid=lambda c: (triton.cdiv(tokens, c.blocks["ROWS"]), splits),
            candidates=_product_candidates(block),
            band=(size_band(tokens), d, m, *dtypes, seed is not None),
        )  # fmt: skip
    if tokens > 0 and (wants_dz or wants_up):
        launch(
            bottleneck_gradient_kernel,
            products, z, rstd, projected, dz, h, means, ddown_bias,
            tokens, d, m, scale,
            ACTIVATION=activation, NORM=norm and wants_dx, DZ=wants_dz, H=wants_up, DDOWN_BIAS=wants_down_bias,
            SPLITS=splits, M=_padded(m),
            grid=lambda _: (blocks,),
            candidates=(Configuration({"ROWS": _TOKENS}, num_warps=8),),
        )  # fmt: skip

    # what is taken from a column as a whole
    parts = _parts(tokens, d, m, multiprocessors)
    ddown_weight, dup_weight = partial(wants_down, parts, m * d), partial(wants_up, parts, d * m)
    dup_bias, dnorm_weight, dnorm_bias = (
        partial(wants, parts, d) for wants in (wants_up_bias, wants_norm, wants_norm_bias)
    )
    if tokens > 0 and needs & ~0b100:
        launch(
            columns_kernel,
            grad, rows, _or(norm_weight, x), _or(norm_bias, x), down_weight.contiguous(), weight,
            mean, rstd, means, dz, h, seed_or(seed, x),
            dx, ddown_weight, dup_weight, dup_bias, dnorm_weight, dnorm_bias,
            tokens, d, m, grad.stride(0), rows.stride(0), _share(tokens, parts, _TOKENS), scale, threshold,
            NORM=norm, NORM_BIAS=norm_bias is not None, DROPOUT=seed is not None, RESIDUAL_IS_X=residual_is_x,
            DX=wants_dx, DDOWN=wants_down, DUP=wants_up, DUP_BIAS=wants_up_bias, DNORM=wants_norm,
            DNORM_BIAS=wants_norm_bias, **shared,
            grid=lambda c: (triton.cdiv(d, c.blocks["COLS"]), parts),
            candidates=_columns_candidates(),
            band=(size_band(tokens), d, m, *dtypes, norm, seed is not None, needs),
        )  # fmt: skip

    shapes = ((m, d), (m,), (d, m), (d,), (d,), (d,))
    sums = (ddown_weight, ddown_bias, dup_weight, dup_bias, dnorm_weight, dnorm_bias)
    return dx, *(  # type: ignore[return-value]
        reduced(total, shape, down_weight.dtype) if needs >> bit & 1 else down_weight.new_empty(0)
        for bit, (total, shape) in enumerate(zip(sums, shapes, strict=True), 1)
    )


def _share(size: int, parts: int, multiple: int) -> int:
    """The part of `size` that each of `parts` takes, a multiple of `multiple`."""
    return triton.cdiv(triton.cdiv(size, parts), multiple) * multiple


def _cut(tokens: int, d: int, largest: int, multiprocessors: int) -> tuple[int, int]:
    """Tokens of a program, and into how many splits the columns are cut, so that the card is full.

    Many tokens a program, since each program reads its share of the weights; but no more than 16 splits, since somebody
    has to add them up.
    """
    block = min(max(triton.next_power_of_2(tokens) // 8, 16), largest)
    splits = max(multiprocessors // max(triton.cdiv(tokens, block), 1), 1)
    return block, min(splits, 16, triton.cdiv(d, 2 * _LARGEST_TILE))


def _parts(tokens: int, d: int, m: int, multiprocessors: int) -> int:
    """Into how many parts the tokens are cut, so that the card is full and the partial sums are smaller than x."""
    if tokens == 0:
        return 0
    return max(min(multiprocessors // triton.cdiv(d, _LARGEST_TILE), tokens // (4 * m)), 1)


def _forward_candidates(block: int) -> tuple[Configuration, ...]:
    shapes = ((128, 8, 3), (64, 4, 4), (128, 8, 4))
    return tuple(Configuration({"ROWS": block, "COLS": c}, num_warps=w, num_stages=s) for c, w, s in shapes)


def _product_candidates(block: int) -> tuple[Configuration, ...]:
    shapes = ((64, 8, 4), (128, 8, 3))
    return tuple(Configuration({"ROWS": block, "COLS": c}, num_warps=w, num_stages=s) for c, w, s in shapes)


def _columns_candidates() -> tuple[Configuration, ...]:
    shapes = ((64, 128, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3))
    return tuple(Configuration({"ROWS": r, "COLS": c}, num_warps=w, num_stages=s) for r, c, w, s in shapes)
