"""Arguments of the low-rank ops, and ours beside the reference on the same dropout seed."""

from __future__ import annotations

import torch

import lwft_kernels
from lwft_kernels import functional as LF

# Runs, single tokens, the base alone, adapters without a token.
INDICES = {
    "runs": [0] * 20 + [-1] * 3 + [2] * 30 + [0] * 17,
    "mixed": [(7 * i * i) % 4 - 1 for i in range(70)],
    "one unused": [1] * 70,
    "base alone": [-1] * 70,
}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def factors(d_in, d_out, rank, adapters=()):
    """A and B of about the scale that makes x A^T B^T as large as x."""
    a = randn(*adapters, rank, d_in, seed=1) / d_in**0.5
    b = randn(*adapters, d_out, rank, seed=2) / rank**0.5
    return a.requires_grad_(), b.requires_grad_()


def low_rank_arguments(tokens, d_in, d_out, rank, bias=True):
    down, up = factors(d_in, d_out, rank)
    return {
        "x": randn(tokens, d_in, seed=3).requires_grad_(),
        "down_weight": down,
        "up_weight": up,
        "bias": randn(d_out, seed=4).requires_grad_() if bias else None,
    }


def lora_arguments(tokens, d_in, d_out, rank, *, bias=True, dropout_p=0.0, adapter_index=None, adapters=3):
    a, b = factors(d_in, d_out, rank, () if adapter_index is None else (adapters,))
    return {
        "x": randn(tokens, d_in, seed=3).requires_grad_(),
        "weight": (randn(d_out, d_in, seed=5) / d_in**0.5).requires_grad_(),
        "bias": randn(d_out, seed=4).requires_grad_() if bias else None,
        "lora_a": a,
        "lora_b": b,
        "scale": 0.75,
        "dropout_p": dropout_p,
        "adapter_index": adapter_index,
    }


def delta_arguments(*args, **options):
    arguments = lora_arguments(*args, **options)
    del arguments["weight"], arguments["bias"]
    base_out = randn(arguments["x"].shape[0], arguments["lora_b"].shape[-2], seed=6).requires_grad_()
    return {"base_out": base_out, **arguments}


def lora_delta(base_out, **arguments):
    """On a base result that is no leaf."""
    return LF.lora_delta_(base_out * 1.0, **arguments)


def both(op):
    """(ours, the reference), drawing the same dropout seed."""

    def ours(**arguments):
        torch.manual_seed(0)
        return op(**arguments)

    def reference(**arguments):
        with lwft_kernels.use_backend("reference"):
            return ours(**arguments)

    return ours, reference
