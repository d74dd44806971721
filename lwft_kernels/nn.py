"""Drop-in modules: the constructor words and state_dict keys of what they replace."""

from lwft_kernels.adapter.modules import BottleneckAdapter
from lwft_kernels.norm.modules import AddLayerNorm

__all__ = ["AddLayerNorm", "BottleneckAdapter"]
