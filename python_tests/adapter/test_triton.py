"""adapter's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracle import check_op

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.adapter.functional import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
EVERYTHING = {"norm": True, "residual": "x", "activation": "gelu", "scale": 0.7, "dropout_p": 0.3}


def make(device, tokens, d, m, *, norm=False, residual=None, without=(), **options):
    """Arguments for `ours`; residual is None, "x" or "other", `without` names parameters to leave out."""
    generator = torch.Generator().manual_seed(tokens * 1000 + d * 10 + m + 1)

    def normal(*shape, scale=1.0, shift=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * scale + shift).to(device).requires_grad_()

    arguments = {
        "x": normal(tokens, d),
        "down_weight": normal(m, d, scale=d**-0.5),
        "down_bias": normal(m),
        "up_weight": normal(d, m, scale=m**-0.5),
        "up_bias": normal(d),
        "norm_weight": normal(d, scale=0.3, shift=1.0) if norm else None,
        "norm_bias": normal(d) if norm else None,
        "residual": normal(tokens, d) if residual == "other" else None,
        "residual_is_x": residual == "x",
        **options,
    }
    return {name: None if name in without else value for name, value in arguments.items()}


def ours(*, residual_is_x=False, **arguments):
    torch.manual_seed(0)
    if residual_is_x:
        arguments["residual"] = arguments["x"]
    return LF.adapter(**arguments)


def reference(**arguments):
    with lwft_kernels.use_backend("reference"):
        return ours(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 37])
@pytest.mark.parametrize("tokens, d", [(1, 5), (3, 64), (70, 200)])
def test_accuracy(triton_device, tokens, d, m, dtype):
    check_op(ours, reference, make(triton_device, tokens, d, m), dtype, backward=False)
    check_op(ours, reference, make(triton_device, tokens, d, m, **EVERYTHING), dtype, backward=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(triton_device, activation):
    check_op(ours, reference, make(triton_device, 9, 50, 21, activation=activation), torch.float32, backward=False)
