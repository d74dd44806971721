"""The result of a bitsandbytes layer for few tokens: by `quantized_linear`, which reads its codes once.

Of many tokens the layer's own forward is as good: it dequantises the weight and multiplies (4 bits), or multiplies int8
by int8 (8 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lwft_kernels import backend, checks
from lwft_kernels import functional as LF
from lwft_kernels.functional import QuantizedWeight
from lwft_kernels.integrations.class_swap import has_hooks
from lwft_kernels.quantized.functional import few_tokens

_FOUR_BITS, _EIGHT_BITS = "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"
_PARAMETERS = ("Params4bit", "Int8Params")  # another class, and the weight is sharded or somebody else's


def result(base: nn.Module, x: Tensor) -> Tensor | None:
    """base(x) where `base` is a bitsandbytes layer and `x` (..., d_in) few tokens on a GPU; else None.

    Of a `Linear8bitLt` it is more accurate than the layer's own: the weight is int8, the activations are not rounded.
    """
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if kind not in (_FOUR_BITS, _EIGHT_BITS) or not _on_a_gpu(x) or has_hooks(base):
        return None
    module: Any = base
    if type(module.weight).__name__ not in _PARAMETERS:
        return None
    dtype = x.dtype
    if kind == _FOUR_BITS:
        # the first call of a layer sets the dtype that it computes in
        if not module.compute_type_is_set or getattr(module.weight, "quant_state", None) is None:
            return None
        dtype = module.compute_dtype or dtype
    elif module.state.has_fp16_weights or (module.weight.CB is None and module.state.CB is None):
        return None
    if not 0 < x.numel() <= few_tokens(dtype) * x.shape[-1] or checks.autocast_dtype(x.device) not in (None, dtype):
        return None
    weight = QuantizedWeight.from_bitsandbytes(module)
    if weight.shape[1] != x.shape[-1] or weight.device != x.device:
        return None  # the layer says what is wrong
    bias = None if module.bias is None else module.bias.to(dtype)
    return LF.quantized_linear(x.to(dtype), weight, bias).to(x.dtype)


def _on_a_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels take `x`; on the CPU only where a test asks for them."""
    chosen = backend.current_backend()
    return (
        (chosen == "triton" or (chosen == "auto" and not x.is_cpu))
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and backend.why_not_triton(x.device) is None
    )
