"""Drop-in modules: the constructor words and state_dict keys of what they replace."""

from lwft_kernels.adapter.modules import BottleneckAdapter
from lwft_kernels.attention.modules import MemoryAttention, MultiheadAttention, PrefixAttention
from lwft_kernels.lowrank.modules import LoRALinear, LowRankLinear
from lwft_kernels.norm.modules import AddLayerNorm

__all__ = [
    "AddLayerNorm",
    "BottleneckAdapter",
    "LoRALinear",
    "LowRankLinear",
    "MemoryAttention",
    "MultiheadAttention",
    "PrefixAttention",
]
