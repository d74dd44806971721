"""The speed layer for lightweight fine-tuning of transformers.

`functional` holds the ops, `nn` the modules, `accelerate(model)` puts them into a model that is there already.
"""

from lwft_kernels import functional, nn
from lwft_kernels.backend import current_backend, reset_stats, stats, use_backend
from lwft_kernels.integrations import accelerate, accelerated, explain

__version__ = "0.1.0"
__all__ = [
    "accelerate",
    "accelerated",
    "current_backend",
    "explain",
    "functional",
    "nn",
    "reset_stats",
    "stats",
    "use_backend",
]
