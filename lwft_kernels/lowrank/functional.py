"""``low_rank_linear``, ``lora_linear`` and ``lora_delta_``: products with a matrix of rank r."""

from __future__ import annotations

import torch
from torch import Tensor

from lwft_kernels import backend, checks, dropout
from lwft_kernels.lowrank import autograd, reference
from lwft_kernels.lowrank.packed_weight import PackedWeight, operand


def low_rank_linear(x: Tensor, down_weight: Tensor, up_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x down_weight^T up_weight^T + bias: a linear layer whose weight is a product of two thin matrices.

    The (..., r) middle between the two never leaves the cache, but for the copy that backward needs.

    Args:
        x: (..., d_in), float64, float32, bfloat16 or float16.
        down_weight: (r, d_in), in the dtype of `x` or float32 beside 16-bit `x`.
        up_weight: (d_out, r), in the dtype of `down_weight`.
        bias: (d_out,), in the dtype of `down_weight`, or None.

    Returns:
        (..., d_out) in the dtype of `x`. Under autocast `x` and 16-bit weights become the autocast dtype;
        float32 weights are read as they are.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it.
    """
    op = "low_rank_linear"
    if backend.attempts(x):
        found: Tensor | None = autograd.try_low_rank_linear(x, down_weight, up_weight, bias)
        if found is not None:
            return found

    _check_input(op, x)
    checks.floating(op, "down_weight", down_weight)
    checks.floating(op, "up_weight", up_weight)
    if bias is not None:
        checks.floating(op, "bias", bias)
    dtype = checks.autocast_dtype(x.device)
    if dtype is not None:
        x = _autocast(x, dtype)
        down_weight, up_weight = _autocast_adapter(down_weight, dtype), _autocast_adapter(up_weight, dtype)
        bias = None if bias is None else _autocast(bias, down_weight.dtype)
    checks.at_least_dims(op, "up_weight", up_weight, 2, "(d_out, rank)")
    d_out = up_weight.shape[0]
    _check_factors(op, ("down_weight", down_weight), ("up_weight", up_weight), x, d_out, stacked=False)
    checks.parameter_dtype(op, "down_weight", down_weight, "x", x)
    if bias is not None:
        checks.shape(op, "bias", bias, (d_out,), "(d_out,)")
        checks.same_device(op, "bias", bias, "x", x)
        checks.same_dtype(op, "bias", bias, "down_weight", down_weight)

    function = autograd.low_rank_linear if backend.use_kernels(op, x) else reference.low_rank_linear
    out: Tensor = function(x, down_weight, up_weight, bias)
    return out


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias + scale * dropout(x) lora_a^T lora_b^T: a linear layer with a LoRA branch.

    LoRA: Hu et al. 2021, eq. 3; `scale` is its alpha / r. Made for a frozen `weight`: beside `x`, only the
    (..., r) middle is kept for backward, and the dropout mask is drawn again. A `weight` or `bias` that
    requires a gradient gets it all the same.

    Args:
        x: (..., d_in), float64, float32, bfloat16 or float16.
        weight: (d_out, d_in), in the dtype of `x`; a packed one (`LoRALinear.prepack`) is read as it is.
        bias: (d_out,), in the dtype of `x`, or None.
        lora_a: (r, d_in), or (n, r, d_in) with `adapter_index`; in the dtype of `x`, or float32 beside 16-bit
            `x`, which is not copied to float32 then.
        lora_b: (d_out, r), or (n, d_out, r) with `adapter_index`; in the dtype of `lora_a`.
        scale: finite factor of the branch.
        dropout_p: probability of an element of `x` to be zeroed on the way to the branch. It is applied
            whenever it is above 0 (as in `scaled_dot_product_attention`): pass 0.0 in evaluation.
        adapter_index: (B,) int64 or int32 where `x` is (B, ..., d_in): the adapter of each row of the batch,
            -1 for the base alone (S-LoRA, Sheng et al. 2023, serves mixed batches so).

    Returns:
        (..., d_out) in the dtype of `x`. Under autocast `x`, `weight`, `bias` and 16-bit adapters become the
        autocast dtype; float32 adapters are read as they are.

        On a CPU with matrix registers (Intel AMX), products with a float32 `weight` of 256 x 256 and more are summed,
        for 64 tokens and more, from three bfloat16 parts of every number: as accurately as in float32, but an infinity
        in `x` or `weight` gives NaN wherever it goes, and numbers below 2^-110 lose their last bits.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; the message names it.
            Indices are looked at here (for the B of them, not per token) when they are on the CPU; while
            torch.compile traces that is left to the kernel, which raises RuntimeError.
            On a GPU, where to look at them would be to wait for it, rows of a wrong index become NaN.
    """
    op = "lora_linear"
    if adapter_index is None and backend.attempts(x) and dropout.is_probability(dropout_p) and type(scale) is float:
        seed = dropout.draw_seed(x.device) if dropout_p else None
        found: Tensor | None = autograd.try_lora_linear(
            x, operand(weight), bias, lora_a, lora_b, None, seed, scale, dropout_p
        )
        if found is not None:
            return found

    _check_input(op, x)
    checks.floating(op, "weight", weight)
    if bias is not None:
        checks.floating(op, "bias", bias)
    checks.floating(op, "lora_a", lora_a)
    checks.floating(op, "lora_b", lora_b)
    dtype = checks.autocast_dtype(x.device)
    declined = None
    if dtype is not None:
        if type(weight) is PackedWeight and weight.dtype != dtype:
            declined = f"autocast to {dtype} unpacks and casts a packed weight of {weight.dtype}"
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        lora_a, lora_b = _autocast_adapter(lora_a, dtype), _autocast_adapter(lora_b, dtype)
    d_in = x.shape[-1]
    checks.shape(op, "weight", weight, (*_leading(weight, 1), d_in), "(d_out, d_in)")
    d_out = weight.shape[0]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.same_device(op, name, value, "x", x)
            checks.same_dtype(op, name, value, "x", x)
    if bias is not None:
        checks.shape(op, "bias", bias, (d_out,), "(d_out,)")
    _check_factors(op, ("lora_a", lora_a), ("lora_b", lora_b), x, d_out, stacked=adapter_index is not None)
    checks.parameter_dtype(op, "lora_a", lora_a, "x", x)
    scale = checks.number(op, "scale", scale)
    dropout_p = checks.probability(op, "dropout_p", dropout_p)
    index = _token_adapters(op, adapter_index, x, lora_a.shape[0])

    seed = dropout.draw_seed(x.device) if dropout_p > 0.0 else None
    if backend.use_kernels(op, x, declined):
        # Triton's kernels read a plain weight
        base = weight.unpack() if type(weight) is PackedWeight and backend.by_triton(op, x) else operand(weight)
        out: Tensor = autograd.lora_linear(x, base, bias, lora_a, lora_b, index, seed, scale, dropout_p)
        return out
    rows = x.reshape(-1, d_in)
    out = reference.lora_linear(rows, weight, bias, lora_a, lora_b, index, scale=scale, dropout_p=dropout_p, seed=seed)
    return out.view(*x.shape[:-1], d_out)


def lora_delta_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """base_out += scale * dropout(x) lora_a^T lora_b^T, in place: the LoRA branch on any base result.

    Hu et al. 2021, eq. 3, for a base layer that is quantised, offloaded or hooked. As any in-place op it
    invalidates what others saved of `base_out` for their backward; a linear layer saves nothing of its
    result.

    Args:
        base_out: (..., d_out), overwritten; any strides, but no element twice (no `expand`), and no leaf that
            requires a gradient.
        x: (..., d_in) with the leading shape of `base_out`.
        lora_a, lora_b, scale, dropout_p, adapter_index: as in `lora_linear`.

        The dtypes of `base_out`, `x` and the adapter are all float64, or any of float32, bfloat16 and
        float16: each is read, and its gradient written, as it is. So autocast has nothing to cast here.

    Returns:
        `base_out`, or a view of the same memory and shape.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; the message names it.
            Indices as in `lora_linear`.
    """
    op = "lora_delta_"
    checks.floating(op, "base_out", base_out)
    _check_input(op, x)
    checks.floating(op, "lora_a", lora_a)
    checks.floating(op, "lora_b", lora_b)
    checks.at_least_dims(op, "base_out", base_out, 1, "(..., d_out)")
    d_out = base_out.shape[-1]
    checks.shape(op, "base_out", base_out, (*x.shape[:-1], d_out), "the leading shape of x and d_out")
    checks.same_device(op, "base_out", base_out, "x", x)
    if d_out == 0:
        raise ValueError(f"{op}: the last dimension of base_out is empty; there is nothing to add to")
    _check_factors(op, ("lora_a", lora_a), ("lora_b", lora_b), x, d_out, stacked=adapter_index is not None)
    for name, value in (("x", x), ("lora_a", lora_a)):
        if (value.dtype == torch.float64) != (base_out.dtype == torch.float64):
            raise TypeError(
                f"{op}: {name} is {value.dtype} but base_out is {base_out.dtype}; float64 goes with float64 only"
            )
    scale = checks.number(op, "scale", scale)
    dropout_p = checks.probability(op, "dropout_p", dropout_p)
    _check_writable(op, base_out)
    index = _token_adapters(op, adapter_index, x, lora_a.shape[0])

    seed = dropout.draw_seed(x.device) if dropout_p > 0.0 else None
    if not backend.use_kernels(op, x):
        rows = x.reshape(-1, x.shape[-1])
        delta = reference.lora_delta(rows, lora_a, lora_b, index, scale=scale, dropout_p=dropout_p, seed=seed)
        return base_out.add_(delta.view(base_out.shape))
    rest = (x, lora_a, lora_b, index, seed, scale, dropout_p)
    # torch.compile differentiates no op that writes into an argument; autograd.lora_delta refuses torch.func.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or not _is_rows(base_out):
        return base_out.copy_(autograd.lora_delta(base_out, *rest))
    whole = base_out._base if torch.is_grad_enabled() and base_out.is_contiguous() else None
    if (
        whole is not None
        and whole.is_contiguous()
        and whole.shape[-1:] == (d_out,)
        and whole.numel() == base_out.numel()
    ):
        # A linear layer's result for (B, S, d_in) is a view of its (B S, d_out) product. Written through the
        # view, autograd would copy the gradient three times; written as a whole, not once.
        return autograd.lora_delta_(whole, *rest).view(base_out.shape)
    return autograd.lora_delta_(base_out, *rest)


def _check_input(op: str, x: Tensor) -> None:
    checks.floating(op, "x", x)
    checks.at_least_dims(op, "x", x, 1, "(..., d_in)")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: the last dimension of x is empty; there is nothing to multiply")


def _check_factors(
    op: str, down: tuple[str, Tensor], up: tuple[str, Tensor], x: Tensor, d_out: int, *, stacked: bool
) -> None:
    """Shapes (n,) (r, d_in) and (n,) (d_out, r), one dtype, the device of x."""
    (down_name, a), (up_name, b) = down, up
    if a.dim() == 3 and not stacked and down_name == "lora_a":
        raise ValueError(f"{op}: {down_name} is stacked {tuple(a.shape)}: pass adapter_index, or one of them")
    leading, words = (2, "n, ") if stacked else (1, "")
    checks.shape(op, down_name, a, (*_leading(a, leading), x.shape[-1]), f"({words}rank, d_in)")
    if a.shape[-2] == 0:
        raise ValueError(f"{op}: {down_name} of shape {tuple(a.shape)} has rank 0; it must be at least 1")
    if stacked and a.shape[0] == 0:
        raise ValueError(f"{op}: {down_name} of shape {tuple(a.shape)} holds no adapter; pass at least 1")
    checks.shape(op, up_name, b, (*a.shape[:-2], d_out, a.shape[-2]), f"({words}d_out, rank)")
    if d_out == 0:
        raise ValueError(f"{op}: {up_name} of shape {tuple(b.shape)} has d_out 0; it must be at least 1")
    checks.same_dtype(op, up_name, b, down_name, a)
    checks.same_device(op, down_name, a, "x", x)
    checks.same_device(op, up_name, b, "x", x)


def _leading(value: Tensor, dims: int) -> tuple[int | None, ...]:
    """The leading sizes of `value`, any of which will do; its dimensions may be too many or too few."""
    return tuple(value.shape[:dims]) if value.dim() == dims + 1 else (None,) * dims


def _check_writable(op: str, base_out: Tensor) -> None:
    """What autograd would refuse after the kernel has written already."""
    strides = zip(base_out.shape, base_out.stride(), strict=True)
    if not base_out.is_contiguous() and any(stride == 0 and size > 1 for size, stride in strides):
        raise ValueError(f"{op}: base_out is expanded (one element in many places); pass base_out.clone()")
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and base_out.requires_grad):
        return
    source = base_out if base_out._base is None else base_out._base
    if source.is_leaf and source.requires_grad:
        raise ValueError(f"{op}: base_out is a leaf that requires a gradient, not to be written; pass base_out.clone()")


def _token_adapters(op: str, adapter_index: Tensor | None, x: Tensor, adapters: int) -> Tensor | None:
    """The adapter of each token, (T,) int64, from that of each row of the batch."""
    if adapter_index is None:
        return None
    checks.tensor(op, "adapter_index", adapter_index)
    if adapter_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: adapter_index must be int64 or int32, got {adapter_index.dtype}")
    checks.at_least_dims(op, "x", x, 2, "(B, ..., d_in) with adapter_index")
    checks.shape(op, "adapter_index", adapter_index, (x.shape[0],), "(B,)")
    checks.same_device(op, "adapter_index", adapter_index, "x", x)
    if adapter_index.device.type == "cpu" and adapter_index.numel() > 0 and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in torch.aminmax(adapter_index))
        if lowest < -1 or highest >= adapters:
            raise ValueError(
                f"{op}: adapter_index must lie between -1 (no adapter) and {adapters - 1}, got values from "
                f"{lowest} to {highest}"
            )
    index = adapter_index.to(torch.int64)
    return index.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]).reshape(-1)


def _autocast(value: Tensor, dtype: torch.dtype) -> Tensor:
    result = checks.cast(value, dtype)
    assert result is not None
    return result


def _autocast_adapter(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Not for float32: beside 16-bit activations the kernel reads such adapters as they are."""
    return value if value.dtype == torch.float32 else _autocast(value, dtype)


def _is_rows(base_out: Tensor) -> bool:
    """Whether (..., d_out) collapses to (T, d_out) rows of unit stride without a copy."""
    if base_out.is_contiguous():
        return True
    if base_out.stride(-1) != 1 and base_out.shape[-1] > 1:
        return False
    inner = base_out.dim() - 2
    return all(base_out.stride(i) == base_out.stride(i + 1) * base_out.shape[i + 1] for i in range(inner))
