"""The adapter kernels of every instruction-set level this machine runs, without torch in between."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from oracle import RATIO, relative_error

from lwft_kernels.adapter import reference
from lwft_kernels.adapter.functional import ACTIVATIONS

SEED, OFFSET = 11, 13
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def to_numpy(tensor):
    """numpy has no bfloat16: its bits travel as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_torch(array):
    return (
        torch.from_numpy(array)
        .view(torch.bfloat16 if array.dtype == np.uint16 else torch.uint8)
        .view(DTYPES["bfloat16" if array.dtype == np.uint16 else array.dtype.name])
    )


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("tokens,d,m", [(2, 100, 21), (37, 100, 21), (90, 150, 70)])
def test_forward_and_backward(level, dtype, activation, tokens, d, m):
    generator = torch.Generator().manual_seed(tokens + d)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DTYPES[dtype])

    x, grad_out = normal(tokens, d), normal(tokens, d)
    down_weight, down_bias = normal(m, d, scale=d**-0.5), normal(m)
    up_weight, up_bias = normal(d, m, scale=m**-0.5), normal(d)
    norm_weight, norm_bias = normal(d), normal(d)
    p, scale = 0.25, 0.7
    kind = ACTIVATIONS.index(activation)

    tensors = (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    arrays = [to_numpy(t) for t in tensors]
    out, hidden, mean, rstd = lwft_harness.adapter_forward(level, *arrays, kind, 1e-5, scale, SEED, OFFSET, p)
    grads = lwft_harness.adapter_backward(
        level, to_numpy(grad_out), arrays[0], arrays[1], arrays[3], arrays[5], arrays[6], hidden, mean, rstd,
        kind, scale, SEED, OFFSET, p,
    )  # fmt: skip

    def run(torch_dtype):
        leaves = [t.to(torch_dtype).requires_grad_() for t in tensors]
        result = reference.adapter(
            *leaves[:5], activation=activation, norm_weight=leaves[5], norm_bias=leaves[6], scale=scale,
            residual=leaves[0], dropout_p=p, seed=torch.tensor([SEED, OFFSET]),
        )  # fmt: skip
        return [result.detach(), *torch.autograd.grad(result, leaves, grad_out.to(torch_dtype))]

    for mine, theirs, exact in zip((out, *grads), run(DTYPES[dtype]), run(torch.float64), strict=True):
        allowed = max(relative_error(theirs, exact), relative_error(exact.to(DTYPES[dtype]), exact))
        assert relative_error(to_torch(mine), exact) <= RATIO * allowed + 1e-6
