"""``lwft::low_rank_linear_*``, ``lora_linear_*`` and ``lora_delta_*`` on a GPU: tensors to launches. There
``frozen_linear_*`` is the vendor's product.

Two implementations of the product with the frozen weight: "fused", a Triton kernel whose accumulator begins as the
branch, and "cublas", the branch written first and the vendor's product added to it. The fused one writes the result
once and reads nothing of it; the vendor's is the faster product. What the second writing costs does not grow with the
depth of the product, what a slower loop costs does: so the rule, where `tuning.choose` has not measured on the card, is
"fused" below a depth of 4096. That bound is an estimate, not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lwft_kernels.lowrank.triton_kernels import expand_kernel, gradients_kernel, linear_kernel, middle_kernel
from lwft_kernels.triton.cards import Card, card_of
from lwft_kernels.triton.launch import launch, launch_one_of
from lwft_kernels.triton.philox import seed_or, threshold_and_scale
from lwft_kernels.triton.reduction import reduced
from lwft_kernels.triton.rows import as_rows, wanted
from lwft_kernels.triton.tuning import Configuration, size_band

_CUBLAS_DEPTH = 4096  # from here on the vendor's product, see above
_SLICE_COLUMNS = 512  # a slice of a middle's columns is a multiple of it: as many as keep a program's loads in flight
_PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class _Dropout:
    """On a (T, d) matrix; `seed` is None where there is none."""

    seed: Tensor | None
    p: float

    @property
    def keep_scale(self) -> float:
        return threshold_and_scale(self.p)[1]


_NO_DROPOUT = _Dropout(None, 0.0)


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)


def _stacked(factor: Tensor) -> Tensor:
    """(rank, width) or (adapters, rank, width) as the latter."""
    return factor if factor.dim() == 3 else factor[None]


def _exact(x: Tensor, factor: Tensor) -> bool:
    """Whether their product is one of float32 by float32, which no matrix unit computes."""
    return x.dtype == factor.dtype == torch.float32


def _rank_tile(x: Tensor, factor: Tensor, most: int = 128) -> int:
    """A power of two, for tl.dot not below 16.

    Exact products hold their operands in registers, and those with a float32 factor its three parts: so they are small.
    """
    largest = 16 if _exact(x, factor) else 64 if factor.dtype == torch.float32 else 128
    return min(max(size_band(factor.shape[1]), 16), largest, most)


def _stages(card: Card, bytes_per_stage: int, programs: int = 1) -> int:
    """How many turns of a loop, at most 4, fit the shared memory that `programs` have on a large card, one on another.

    An eighth of it is left to what the compiler puts there.
    """
    return max(1, min(4, card.shared_memory * 7 // 8 // (bytes_per_stage * (programs if card.large else 1))))


# ---- middle = scale * dropout(x) F^T ----


def _middle_candidates(x: Tensor, factor: Tensor, stacked: bool) -> tuple[Configuration, ...]:
    """Bound by reading x: enough loads in flight count, and room for several programs on a multiprocessor."""
    rank_tile = _rank_tile(x, factor)
    rows = 16 if x.shape[0] <= 16 else 32
    cols = 128 if rank_tile <= 32 and factor.dtype != torch.float32 and not stacked else 64
    stage = cols * (rows * x.element_size() + rank_tile * factor.element_size())
    blocks = {"ROWS": rows, "COLS": cols, "RANK": rank_tile}
    card = card_of(x.device)
    # beside the parts of a float32 factor registers are few; a large card has more programs of 4 warps than of 8
    warps = 8 if factor.dtype == torch.float32 and not card.large else 4
    return (Configuration(blocks, warps, _stages(card, stage, 2)),)


def _middle(
    x: Tensor, factor: Tensor, adapter_index: Tensor | None, scale: float = 1.0, dropout: _Dropout = _NO_DROPOUT
) -> Tensor:
    """(T, rank) float32 of x (T, width) and factor (adapters, rank, width)."""
    tokens, width = x.shape
    adapters, rank, _ = factor.shape
    if tokens == 0:
        return x.new_empty((0, rank), dtype=torch.float32)
    candidates = _middle_candidates(x, factor, adapter_index is not None)
    rank_blocks = _ceil_div(rank, candidates[0].blocks["RANK"])
    programs = _ceil_div(tokens, candidates[0].blocks["ROWS"]) * rank_blocks
    wished = max(_PROGRAMS_PER_MULTIPROCESSOR * card_of(x.device).multiprocessors // programs, 1)
    columns = _ceil_div(_ceil_div(width, wished), _SLICE_COLUMNS) * _SLICE_COLUMNS
    slices = _ceil_div(width, columns)
    partials = x.new_empty((slices, tokens * rank), dtype=torch.float32)
    threshold, keep_scale = threshold_and_scale(dropout.p)
    launch(
        middle_kernel,
        x, factor, x if adapter_index is None else adapter_index, seed_or(dropout.seed, x), partials,
        tokens, width, rank, adapters, columns, x.stride(0), *factor.stride(), threshold, scale * keep_scale,
        STACKED=adapter_index is not None, DROPOUT=dropout.seed is not None,
        grid=lambda c: (_ceil_div(tokens, c.blocks["ROWS"]), slices, rank_blocks), candidates=candidates,
        band=(size_band(tokens), width, rank, x.dtype, factor.dtype, adapter_index is not None,
              dropout.seed is not None),
    )  # fmt: skip
    return partials.view(tokens, rank) if slices == 1 else reduced(partials, (tokens, rank), torch.float32)


# ---- out = base + bias + scale * mask (middle F) ----


def _expand_candidates(out: Tensor, factor: Tensor, stacked: bool) -> tuple[Configuration, ...]:
    """Bound by writing `out`: many small programs, so that some compute while others write."""
    rows = 16 if out.shape[0] <= 16 else 32
    cols = 64 if stacked else 128  # stacked, the sums of one adapter stand beside those of all
    rank_tile = _rank_tile(out, factor, 16 if factor.dtype == torch.float32 else 64)
    return (Configuration({"ROWS": rows, "COLS": cols, "RANK": rank_tile}, num_warps=4, num_stages=1),)


def _expand_into(
    out: Tensor,
    middle: Tensor,
    factor: Tensor,
    adapter_index: Tensor | None,
    *,
    scale: float,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: _Dropout = _NO_DROPOUT,
) -> None:
    """out (T, width), rows of unit stride; `base` may be `out` itself, so there is one configuration, never timed."""
    tokens, width = out.shape
    adapters, rank, _ = factor.shape
    if tokens == 0:
        return
    threshold, keep_scale = threshold_and_scale(dropout.p)
    launch(
        expand_kernel,
        middle, factor, out if base is None else base, out if bias is None else bias.contiguous(),
        out if adapter_index is None else adapter_index, seed_or(dropout.seed, out), out,
        tokens, width, rank, adapters, 0 if base is None else base.stride(0), out.stride(0), *factor.stride(),
        threshold, scale * keep_scale,
        BASE=base is not None, BIAS=bias is not None,
        STACKED=adapter_index is not None, DROPOUT=dropout.seed is not None,
        grid=lambda c: (_ceil_div(tokens, c.blocks["ROWS"]), _ceil_div(width, c.blocks["COLS"])),
        candidates=_expand_candidates(out, factor, adapter_index is not None),
    )  # fmt: skip


# ---- the same + x W ----


def _linear_candidates(x: Tensor, width: int, factor: Tensor, dropout: bool) -> tuple[Configuration, ...]:
    """Tiles of 16-bit products, the largest that leave no multiprocessor idle first."""
    card, tokens, rank_tile = card_of(x.device), x.shape[0], _rank_tile(x, factor, 64)

    def tile(rows: int, cols: int, depth: int, warps: int, programs: int = 1) -> Configuration:
        blocks = {"ROWS": rows, "COLS": cols, "DEPTH": depth, "RANK": rank_tile, "GROUP": 8}
        return Configuration(blocks, warps, _stages(card, (rows + cols) * depth * 2, programs))

    def fills(configuration: Configuration) -> bool:
        rows, cols = configuration.blocks["ROWS"], configuration.blocks["COLS"]
        return _ceil_div(tokens, rows) * _ceil_div(width, cols) >= card.multiprocessors

    if tokens <= 32:  # bound by reading W
        return (tile(16 if tokens <= 16 else 32, 64, 128, 4),)
    if not card.large:
        return (tile(128, 128, 32, 8), tile(64, 128, 32, 4))[tokens <= 64 :]
    # From Hopper on operands stay in shared memory, and registers are left for 128 sums a thread, if hardly for a mask.
    hopper = card.architecture >= 90
    small = tile(64, 128, 64, 4)
    middle = tile(128, 128, 64, 4, 2) if hopper and not dropout else tile(128, 128, 64, 8)
    large = tile(128, 256, 64, 8) if hopper else middle
    return tuple(
        dict.fromkeys((large, middle) if fills(large) else (middle, small) if fills(middle) else (small, middle))
    )


def _linear_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    middle: Tensor,
    factor: Tensor,
    adapter_index: Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: _Dropout = _NO_DROPOUT,
) -> None:
    """out (T, width) contiguous, of x (T, depth) and weight (depth, width)."""
    tokens, depth = x.shape
    width = weight.shape[1]
    adapters, rank, _ = factor.shape
    threshold, keep_scale = threshold_and_scale(dropout.p)
    launch(
        linear_kernel,
        x, weight, middle, factor, x if bias is None else bias.contiguous(),
        x if adapter_index is None else adapter_index, seed_or(dropout.seed, x), out,
        tokens, width, depth, rank, adapters, x.stride(0), *weight.stride(), *factor.stride(),
        threshold, scale * keep_scale,
        BIAS=bias is not None, STACKED=adapter_index is not None, DROPOUT=dropout.seed is not None,
        grid=lambda c: (_ceil_div(tokens, c.blocks["ROWS"]) * _ceil_div(width, c.blocks["COLS"]),),
        candidates=_linear_candidates(x, width, factor, dropout.seed is not None),
        band=(size_band(tokens), width, depth, rank, x.dtype, factor.dtype, weight.stride(0) == 1,
              adapter_index is not None, dropout.seed is not None),
    )  # fmt: skip


# ---- gradient = scale * middle^T dropout(wide) ----


def _gradients_candidates(wide: Tensor, factor: Tensor, dropout: bool) -> tuple[Configuration, ...]:
    """COLS is the same in all of them: so many columns share a partial sum of the other middle.

    The (COLS, RANK) sums stay in registers, and beside them what Philox draws, for four columns at a time.
    """
    exact = _exact(wide, factor)
    rank_tile = _rank_tile(wide, factor)
    card = card_of(wide.device)
    # AMD's matrix instructions take their operands from registers too
    sums = 2048 if exact or card.maker == "hip" else 4096 if dropout or factor.dtype == torch.float32 else 8192
    cols = max(min(sums // rank_tile, size_band(wide.shape[1])), 64)
    rows = 16  # short turns, several ahead
    stage = rows * (cols * wide.element_size() + rank_tile * 4)
    blocks = {"ROWS": rows, "COLS": cols, "RANK": rank_tile}
    return (Configuration(blocks, 8 if cols >= 256 or cols * rank_tile > 4096 else 4, _stages(card, stage, 2)),)


def _gradients(
    wide: Tensor,
    middle: Tensor,
    factor: Tensor,
    adapter_index: Tensor | None,
    parameter: Tensor,
    *,
    scale: float = 1.0,
    dropout: _Dropout = _NO_DROPOUT,
    transposed: bool = False,
    other_middle: bool = False,
    column_sum: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of `parameter`, which is `factor` (adapters, rank, width), or its transpose.

    Beside it scale * wide F^T (T, rank), where `other_middle` asks for it, and the sum over the tokens of `wide`, as
    `column_sum`. With an adapter_index there are no column sums, and the rows of no adapter are 0.
    """
    tokens, width = wide.shape
    adapters, rank, _ = factor.shape
    size = parameter.numel()
    candidates = _gradients_candidates(wide, factor, dropout.seed is not None)
    rank_blocks = _ceil_div(rank, candidates[0].blocks["RANK"])
    slices = _ceil_div(width, candidates[0].blocks["COLS"])
    wished = _PROGRAMS_PER_MULTIPROCESSOR * card_of(wide.device).multiprocessors
    parts = max(wished // (slices * rank_blocks * adapters), 1)
    chunk = _ceil_div(_ceil_div(tokens, parts), 64) * 64
    parts = _ceil_div(tokens, chunk)
    gradient = (
        parameter.new_empty(parameter.shape) if parts == 1 else wide.new_empty((parts, size), dtype=torch.float32)
    )
    empty = wide.new_empty if adapter_index is None else wide.new_zeros
    others = empty((slices, tokens * rank) if other_middle else (0,), dtype=torch.float32)
    sums = wide.new_empty((parts, width) if column_sum is not None else (0,), dtype=torch.float32)
    threshold, keep_scale = threshold_and_scale(dropout.p)
    launch(
        gradients_kernel,
        wide, middle, factor, wide if adapter_index is None else adapter_index, seed_or(dropout.seed, wide),
        gradient, others, sums,
        tokens, width, rank, adapters, chunk, rank_blocks, wide.stride(0), *factor.stride(),
        size, rank * width, *((1, rank) if transposed else (width, 1)), threshold, scale * keep_scale,
        MIDDLE=other_middle, SUM=column_sum is not None,
        STACKED=adapter_index is not None, DROPOUT=dropout.seed is not None,
        grid=lambda c: (slices, parts, adapters * rank_blocks), candidates=candidates,
        band=(size_band(tokens), width, rank, wide.dtype, factor.dtype, adapter_index is not None,
              dropout.seed is not None, other_middle, column_sum is not None),
    )  # fmt: skip
    return (
        gradient if parts == 1 else reduced(gradient, tuple(parameter.shape), parameter.dtype),
        reduced(others, (tokens, rank), torch.float32) if other_middle else None,
        None if column_sum is None else reduced(sums, (width,), column_sum),
    )


# ---- backward of the branch ----


@dataclass(frozen=True)
class _Branch:
    """scale * dropout(x) A^T B^T, differentiated: what the three ops have in common."""

    x: Tensor  # (T, d_in)
    a: Tensor  # (r, d_in) or (n, r, d_in)
    b: Tensor  # (d_out, r) or (n, d_out, r)
    adapter_index: Tensor | None = None
    scale: float = 1.0
    dropout: _Dropout = _NO_DROPOUT

    @property
    def down(self) -> Tensor:
        """(n, r, d_in)"""
        return _stacked(self.a)

    @property
    def up(self) -> Tensor:
        """(n, r, d_out)"""
        return _stacked(self.b).transpose(1, 2)

    def hidden(self) -> Tensor:
        return _middle(self.x, self.down, self.adapter_index, dropout=self.dropout)

    def backward(
        self, grad: Tensor, hidden: Tensor, for_x: bool, for_a: bool, for_b: bool, bias_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ds (T, r) float32 and the gradients of A, B and a bias of `bias_dtype`, empty where not wanted; T > 0."""
        da, db = self.a.new_empty(0), self.b.new_empty(0)
        ds: Tensor | None = None
        dbias: Tensor | None = None
        if for_b:
            db, ds, dbias = _gradients(
                grad, hidden.reshape(grad.shape[0], -1).contiguous(), self.up, self.adapter_index, self.b,
                scale=self.scale, transposed=True, other_middle=for_x or for_a,
                column_sum=bias_dtype if self.adapter_index is None else None,
            )  # fmt: skip
        elif for_x or for_a:
            ds = _middle(grad, self.up, self.adapter_index, self.scale)
        if for_a:
            assert ds is not None
            da = _gradients(self.x, ds, self.down, self.adapter_index, self.a, dropout=self.dropout)[0]
        if dbias is None:
            dbias = grad.new_empty(0) if bias_dtype is None else grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad.new_empty(0) if ds is None else ds, da, db, dbias


def _no_tokens(needs: int, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum over nothing, of the shapes of what they are the gradients of."""
    return tuple(like.new_zeros(like.shape if needs >> bit & 1 else (0,)) for bit, like in enumerate(gradients))


# ---- low_rank_linear ----


def low_rank_linear_forward(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    branch = _Branch(as_rows(x), down_weight, up_weight)
    hidden = branch.hidden()
    out = x.new_empty((hidden.shape[0], up_weight.shape[0]))
    _expand_into(out, hidden, branch.up, None, scale=1.0, bias=bias)
    return _shaped(out, x), _shaped(hidden, x)


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """(T, n) as (..., n) with the leading shape of x."""
    return rows.view(*x.shape[:-1], rows.shape[1])


def low_rank_linear_backward(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, hidden: Tensor, needs: int
) -> tuple[Tensor, ...]:
    grad = as_rows(grad_out)
    if grad.shape[0] == 0:
        return _no_tokens(needs, x, down_weight, up_weight, up_weight[:, 0])
    branch = _Branch(as_rows(x), down_weight, up_weight)
    bias_dtype = up_weight.dtype if needs & 8 else None
    ds, ddown, dup, dbias = branch.backward(grad, hidden, bool(needs & 1), bool(needs & 2), bool(needs & 4), bias_dtype)
    dx = wanted(needs, 0, x, x.shape)
    if needs & 1:
        _expand_into(as_rows(dx), ds, branch.down, None, scale=1.0)
    return dx, ddown, dup, dbias


# ---- lora_linear ----


def _add_base_product(
    direction: str,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    middle: Tensor,
    factor: Tensor,
    adapter_index: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    dropout: _Dropout = _NO_DROPOUT,
) -> None:
    """out = x weight + bias + scale * mask (middle factor), of x (T, depth), weight (depth, width); T > 0."""

    def fused() -> None:
        _linear_into(out, x, weight, middle, factor, adapter_index, scale=scale, bias=bias, dropout=dropout)

    def cublas() -> None:
        _expand_into(out, middle, factor, adapter_index, scale=scale, bias=bias, dropout=dropout)
        out.addmm_(x, weight)

    tokens, depth = x.shape
    implementations: dict[str, Callable[[], None]] = {"fused": fused, "cublas": cublas}
    if x.dtype == torch.float32:
        # exact float32 products are no work for the matrix units: a vendor's product is all there is to gain
        implementations = {"cublas": cublas}
    elif depth >= _CUBLAS_DEPTH:
        implementations = {"cublas": cublas, "fused": fused}
    launch_one_of(
        f"lora_linear_{direction}",
        implementations,
        device=x.device,
        band=(
            size_band(tokens), out.shape[1], depth, factor.shape[1], x.dtype, factor.dtype,
            adapter_index is not None, dropout.seed is not None,
        ),
    )  # fmt: skip


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    branch = _Branch(as_rows(x), lora_a, lora_b, adapter_index, scale, _Dropout(seed, dropout_p))
    hidden = branch.hidden()
    out = x.new_empty((hidden.shape[0], weight.shape[0]))
    if out.shape[0] > 0:
        _add_base_product("forward", out, branch.x, weight.t(), hidden, branch.up, adapter_index, scale, bias)
    return _shaped(out, x), _shaped(hidden, x)


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    grad = as_rows(grad_out)
    if grad.shape[0] == 0:
        return _no_tokens(needs, x, weight, weight[:, 0], lora_a, lora_b)
    dropout = _Dropout(seed, dropout_p)
    branch = _Branch(as_rows(x), lora_a, lora_b, adapter_index, scale, dropout)
    bias_dtype = weight.dtype if needs & 4 else None
    ds, da, db, dbias = branch.backward(grad, hidden, bool(needs & 1), bool(needs & 8), bool(needs & 16), bias_dtype)
    dx, dweight = wanted(needs, 0, x, x.shape), wanted(needs, 1, weight, weight.shape)
    if needs & 1:
        _add_base_product("backward", as_rows(dx), grad, weight, ds, branch.down, adapter_index, 1.0, dropout=dropout)
    if needs & 2:
        torch.mm(grad.t(), branch.x, out=dweight)
    return dx, dweight, dbias, da, db


# ---- lora_delta ----


def lora_delta_forward(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    branch = _Branch(as_rows(x), lora_a, lora_b, adapter_index, scale, _Dropout(seed, dropout_p))
    hidden = branch.hidden()
    out = base_out.new_empty((hidden.shape[0], base_out.shape[-1]))
    _expand_into(out, hidden, branch.up, adapter_index, scale=scale, base=as_rows(base_out))
    return _shaped(out, x), _shaped(hidden, x)


def lora_delta_forward_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    out = as_rows(base_out)
    if out.data_ptr() != base_out.data_ptr():
        raise RuntimeError(
            "lwft::lora_delta_forward_: base_out must be rows of unit stride, with one stride between them"
        )
    branch = _Branch(as_rows(x), lora_a, lora_b, adapter_index, scale, _Dropout(seed, dropout_p))
    hidden = branch.hidden()  # all of x is read before base_out, which may share its memory, is written
    _expand_into(out, hidden, branch.up, adapter_index, scale=scale, base=out)
    return _shaped(hidden, x)


def lora_delta_backward(
    grad_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    grad = as_rows(grad_out)
    if grad.shape[0] == 0:
        return _no_tokens(needs, x, lora_a, lora_b)
    dropout = _Dropout(seed, dropout_p)
    branch = _Branch(as_rows(x), lora_a, lora_b, adapter_index, scale, dropout)
    ds, da, db, _ = branch.backward(grad, hidden, bool(needs & 1), bool(needs & 2), bool(needs & 4), None)
    dx = wanted(needs, 0, x, x.shape)
    if needs & 1:
        _expand_into(as_rows(dx), ds, branch.down, adapter_index, scale=1.0, dropout=dropout)
    return dx, da, db


def frozen_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def frozen_linear_backward(grad_out: Tensor, weight: Tensor) -> Tensor:
    return grad_out @ weight
