"""The ops, under the names and argument order of `torch.nn.functional` where it has a word for the thing."""

from lwft_kernels.adapter.functional import adapter
from lwft_kernels.attention.functional import attention
from lwft_kernels.lowrank.frozen import frozen_linear
from lwft_kernels.lowrank.functional import lora_delta_, lora_linear, low_rank_linear
from lwft_kernels.norm.functional import add_layer_norm
from lwft_kernels.quantized.functional import quantized_linear
from lwft_kernels.quantized.weight import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "adapter",
    "add_layer_norm",
    "attention",
    "frozen_linear",
    "lora_delta_",
    "lora_linear",
    "low_rank_linear",
    "quantized_linear",
]
