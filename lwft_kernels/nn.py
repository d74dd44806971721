"""Drop-in modules: the constructor words and state_dict keys of what they replace."""

from lwft_kernels.lowrank.modules import LoRALinear, LowRankLinear
from lwft_kernels.norm.modules import AddLayerNorm

__all__ = ["AddLayerNorm", "LoRALinear", "LowRankLinear"]
