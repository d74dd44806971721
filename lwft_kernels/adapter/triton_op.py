"""``lwft::adapter_forward`` / ``_backward`` on a GPU: tensors to launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from lwft_kernels.adapter.triton_backward import (
    bottleneck_gradient_kernel,
    bottleneck_product_kernel,
    columns_kernel,
    weights_kernel,
)
from lwft_kernels.adapter.triton_forward import adapter_forward_kernel, fold_norm_kernel
from lwft_kernels.triton.cards import Card, card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.rows import as_rows, wanted
from lwft_kernels.triton.tuning import Configuration, size_band

_LARGEST_TILE = 128  # columns at a time; a split is a multiple of it
_TOKENS = 64  # tokens of a program of bottleneck_gradient_kernel; a part of the tokens is a multiple of it
_SCRATCH = 16 << 10  # of shared memory, left for exchanges between threads and for what is not staged
_FOLD = (Configuration({"COLS": 1024}, num_warps=4),)


def _padded(m: int) -> int:
    """The bottleneck as the matrix instructions take it."""
    return max(16, int(triton.next_power_of_2(m)))


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
    card = card_of(x.device)
    block, splits = _cut(tokens, d, 64, card.multiprocessors)
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
            candidates=_forward_candidates(card, block, _padded(m), rows, up_weight),
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
    card = card_of(x.device)
    dtypes = (x.dtype, grad.dtype, down_weight.dtype)

    def partial(wants: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if wants else (0,) * len(shape), dtype=torch.float32)

    # what is taken from a token as a whole: dz, h, and the means of LayerNorm's gradient
    wants_sums = wants_down_bias or wants_norm_bias or (wants_down and norm_bias is not None)
    wants_product = wants_down or wants_norm
    wants_dz = wants_dx or wants_product or wants_sums
    weight, projected = down_weight.contiguous(), mean
    if norm_weight is not None and wants_dx:
        weight, projected = _folded(down_weight, down_bias, norm_weight, norm_bias, x.dtype)
    dz, h = (x.new_empty((tokens, m) if wants else (0, m)) for wants in (wants_dz, wants_up))
    means = partial(norm and wants_dx, 2, tokens)
    block, splits = _cut(tokens, d, 128, card.multiprocessors)
    products = partial(wants_dz or seed is not None, splits, tokens, m)
    blocks = triton.cdiv(tokens, _TOKENS)
    dz_sums = partial(wants_sums, blocks, m)
    kept_stride = triton.cdiv(d, 64) * 16
    kept_elements = x.new_empty((0 if seed is None else tokens, kept_stride), dtype=torch.int8)
    if tokens > 0 and (wants_dz or seed is not None):
        launch(
            bottleneck_product_kernel,
            grad, up_weight.contiguous(), seed_or(seed, x), products, kept_elements,
            tokens, d, m, grad.stride(0), kept_stride, _share(d, splits, _LARGEST_TILE), threshold,
            DROPOUT=seed is not None, **shared,
            grid=lambda c: (triton.cdiv(tokens, c.blocks["ROWS"]), splits),
            candidates=_product_candidates(card, block, _padded(m), grad, up_weight),
            band=(size_band(tokens), d, m, *dtypes, seed is not None),
        )  # fmt: skip
    if tokens > 0 and (wants_dz or wants_up):
        launch(
            bottleneck_gradient_kernel,
            products, z, rstd, projected, dz, h, means, dz_sums,
            tokens, d, m, scale,
            ACTIVATION=activation, NORM=norm and wants_dx, DZ=wants_dz, H=wants_up, DZ_SUMS=wants_sums,
            SPLITS=splits, M=_padded(m),
            grid=lambda _: (blocks,),
            candidates=(Configuration({"ROWS": _TOKENS}, num_warps=16 if m > 128 else 8),),
        )  # fmt: skip

    # what is taken from a column as a whole: dx, and sums over parts of the tokens
    parts = _parts(tokens, d, m, card.multiprocessors)
    down_sums, up_sums = partial(wants_product, parts, d, m), partial(wants_up, parts, d, m)
    up_bias_sums = partial(wants_up_bias, parts, d)
    if tokens > 0 and (wants_dx or wants_product or wants_up or wants_up_bias):
        launch(
            columns_kernel,
            grad, rows, weight, mean, rstd, means, dz, h, kept_elements,
            dx, down_sums, up_sums, up_bias_sums,
            tokens, d, m, grad.stride(0), rows.stride(0), kept_stride, _share(tokens, parts, _TOKENS), scale,
            NORM=norm, DROPOUT=seed is not None, RESIDUAL_IS_X=residual_is_x,
            DX=wants_dx, DOWN=wants_product, UP=wants_up, UP_BIAS=wants_up_bias, **shared,
            grid=lambda c: (triton.cdiv(d, c.blocks["COLS"]), parts),
            candidates=_columns_candidates(card, _padded(m), rows),
            band=(size_band(tokens), d, m, *dtypes, norm, seed is not None, needs),
        )  # fmt: skip

    shapes = ((m, d), (m,), (d, m), (d,), (d,), (d,))
    gradients = tuple(wanted(needs, bit, down_weight, shape) for bit, shape in enumerate(shapes, 1))
    if needs & ~1:
        launch(
            weights_kernel,
            down_sums, up_sums, up_bias_sums, dz_sums, _or(norm_weight, x), _or(norm_bias, x),
            down_weight.contiguous(), *gradients,
            parts, blocks, d, m,
            NORM=norm, NORM_BIAS=norm_bias is not None,
            DDOWN=wants_down, DDOWN_BIAS=wants_down_bias, DUP=wants_up, DUP_BIAS=wants_up_bias, DNORM=wants_norm,
            DNORM_BIAS=wants_norm_bias, M=_padded(m),
            grid=lambda c: (triton.cdiv(d, c.blocks["COLS"]),),
            candidates=(Configuration({"COLS": 16}, num_warps=4),),
        )  # fmt: skip
    return dx, *gradients  # type: ignore[return-value]


def _share(size: int, parts: int, multiple: int) -> int:
    """The part of `size` that each of `parts` takes, a multiple of `multiple`."""
    return -(-size // (parts * multiple)) * multiple


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
    return max(min(multiprocessors // -(-d // _LARGEST_TILE), tokens // (4 * m)), 1)


Shape = tuple[int, int, int, int]  # ROWS, COLS, num_warps, num_stages


def _candidates(card: Card, stage_bytes: Callable[[int, int], int], *shapes: Shape) -> tuple[Configuration, ...]:
    """`shapes` with as many stages as the card's shared memory holds, each stage_bytes(ROWS, COLS) large."""
    room = card.shared_memory - _SCRATCH
    found: list[Configuration] = []
    for rows, cols, warps, stages in shapes:
        fitting = min(stages, room // stage_bytes(rows, cols))
        if fitting > 0 or not found:
            found.append(Configuration({"ROWS": rows, "COLS": cols}, num_warps=warps, num_stages=max(fitting, 1)))
    return tuple(found)


def _forward_candidates(card: Card, block: int, m: int, x: Tensor, weight: Tensor) -> tuple[Configuration, ...]:
    # A stage: a tile of x and one of Wd, or one of Wu. Warps for 16 rows or more of a tile each, as matrix instructions
    # want it; wide tiles, since the loop itself costs as much as many an element.
    def stage(rows: int, cols: int) -> int:
        return cols * (rows * x.element_size() + m * weight.element_size())

    if x.dtype == torch.float32:
        return _candidates(card, stage, (16, 64, 4, 2))
    narrow = (block, 64, 4, 4)
    if m > 128 or block <= 32 or not card.large:
        return _candidates(card, stage, narrow)
    return _candidates(card, stage, (block, 128, 8, 3), narrow)


def _product_candidates(card: Card, block: int, m: int, grad: Tensor, weight: Tensor) -> tuple[Configuration, ...]:
    def stage(rows: int, cols: int) -> int:
        return cols * (rows * grad.element_size() + m * weight.element_size())

    if grad.dtype == torch.float32:
        return _candidates(card, stage, (16, 64, 4, 2))
    return _candidates(card, stage, (block, 64, 8 if block > 64 else 4, 4))


def _columns_candidates(card: Card, m: int, x: Tensor) -> tuple[Configuration, ...]:
    def stage(rows: int, cols: int) -> int:
        return rows * (2 * cols + 2 * m) * x.element_size()

    if x.dtype == torch.float32:
        return _candidates(card, stage, (16, 64, 8 if card.maker == "cuda" else 4, 2))
    if not card.large or card.architecture < 90:
        # matrix instructions take W from registers here, and a larger tile would spill
        return _candidates(card, stage, (32, 64, 8 if card.maker == "cuda" else 4, 3))
    if m > 64:
        return _candidates(card, stage, (64, 64, 8, 3))
    return _candidates(card, stage, (64, 128, 8, 3), (64, 64, 4, 3))
