"""``quantized_linear``: a linear layer whose frozen weight stays in four or eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lwft_kernels import backend, checks
from lwft_kernels.quantized import autograd, reference
from lwft_kernels.quantized.weight import QuantizedWeight

_OP = "quantized_linear"


def few_tokens(dtype: torch.dtype) -> int:
    """Up to so many tokens in `dtype`, W is dequantised in the product on a GPU; of more it is written out first.

    Each tile of 64 tokens dequantises W once more, where writing it out costs, once, 5 (4 bits) or 3 times (8 bits) the
    bytes of its codes. In float32 the product in the kernel has no matrix instructions. Where the two cross has not
    been measured; LWFT_AUTOTUNE=full does so.
    """
    return 16 if dtype == torch.float32 else 64


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, W frozen and quantised: `torch.nn.functional.linear` on W as it is stored.

    On a GPU a call of few tokens reads the codes once and dequantises them in registers, forward and backward; for many
    tokens W is dequantised to the dtype of `x` first, and the product is PyTorch's. W never gets a gradient. The LoRA
    branch beside it is `lora_delta_` on the result.

    Args:
        x: (..., d_in), float64, float32, bfloat16 or float16.
        weight: (d_out, d_in); see `QuantizedWeight` and `QuantizedWeight.from_bitsandbytes`. Its values are computed in
            float32 (in float64 for a float64 `x`); what is rounded to the dtype of `x` is rounded once.
        bias: (d_out,) in the dtype of `x`, or None.

    Returns:
        (..., d_out) in the dtype of `x`. Under autocast `x` and `bias` become the autocast dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device; the message names it.
    """
    checks.floating(_OP, "x", x)
    checks.at_least_dims(_OP, "x", x, 1, "(..., d_in)")
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(
            f"{_OP}: weight must be a QuantizedWeight, got {type(weight).__name__}; "
            "QuantizedWeight.from_bitsandbytes(layer) makes one"
        )
    d_out, d_in = weight.shape
    checks.shape(_OP, "x", x, (*x.shape[:-1], d_in), "(..., d_in)")
    checks.same_device(_OP, "weight", weight.codes, "x", x)
    dtype = checks.autocast_dtype(x.device)
    if dtype is not None:
        x, bias = checks.cast(x, dtype), checks.cast(bias, dtype)
    if bias is not None:
        checks.floating(_OP, "bias", bias)
        checks.shape(_OP, "bias", bias, (d_out,), "(d_out,)")
        checks.same_device(_OP, "bias", bias, "x", x)
        checks.same_dtype(_OP, "bias", bias, "x", x)

    if not backend.use_kernels(_OP, x, _no_cpu_kernel(x), lambda: _triton_limit(weight)):
        return reference.quantized_linear(x, weight, bias)
    out: Tensor = autograd.quantized_linear(
        x, weight.codes, weight.absmax, weight.table, weight.absmax_codes, weight.absmax_table, weight.absmax_offset,
        weight.blocksize, weight.absmax_blocksize, bias, d_out,
    )  # fmt: skip
    return out


def _no_cpu_kernel(x: Tensor) -> str | None:
    return f"there is no CPU kernel of {_OP}" if x.is_cpu and backend.current_backend() != "triton" else None


def _triton_limit(weight: QuantizedWeight) -> str | None:
    if weight.table is None or weight.shape[1] % 2 == 0:
        return None
    return f"Triton's kernels take 4-bit rows of whole bytes, not of {weight.shape[1]} weights"
