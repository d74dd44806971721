"""Attention of Hugging Face transformers, through its attention interface.

Models look up, by the name in their config, a function that computes attention (`attention`) and another that builds
its mask (`masks`). Both are registered: without the second, models hand over no mask even where there is padding.
"""

from lwft_kernels.integrations.transformers.attention import attention_forward
from lwft_kernels.integrations.transformers.models import NAME, plan

__all__ = ["NAME", "attention_forward", "plan"]
