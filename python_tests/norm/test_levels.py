"""The add_layer_norm kernels of every instruction-set level this machine runs, without torch in between."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from oracle import RATIO, relative_error

from lwft_kernels.norm import reference

SEED, OFFSET = 11, 13
TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("tokens,d,p", [(1, 9, 0.0), (37, 100, 0.0), (37, 100, 0.25)])
def test_forward_and_backward(level, dtype, tokens, d, p):
    random = np.random.default_rng(tokens + d)
    x, u, grad_out = (random.standard_normal((tokens, d)).astype(dtype) for _ in range(3))
    weight, bias = (random.standard_normal(d).astype(dtype) for _ in range(2))
    out, mean, rstd = lwft_harness.add_layer_norm_forward(level, x, u, weight, bias, 1e-5, SEED, OFFSET, p)
    grads = lwft_harness.add_layer_norm_backward(level, grad_out, x, u, weight, mean, rstd, SEED, OFFSET, p)

    def run(torch_dtype):
        leaves = [torch.from_numpy(a).to(torch_dtype).requires_grad_() for a in (x, u, weight, bias)]
        result = reference.add_layer_norm(*leaves, dropout_p=p, seed=torch.tensor([SEED, OFFSET]))
        direction = torch.from_numpy(grad_out).to(torch_dtype)
        return [result.detach(), *torch.autograd.grad(result, leaves, direction)]

    oracle, eager = run(torch.float64), run(TORCH_DTYPES[dtype])
    for mine, theirs, exact in zip((out, *grads), eager, oracle, strict=True):
        allowed = max(relative_error(theirs, exact), relative_error(exact.to(TORCH_DTYPES[dtype]), exact))
        assert relative_error(torch.from_numpy(mine), exact) <= RATIO * allowed + 1e-6


def test_levels_from_the_best_down_to_the_baseline():
    assert lwft_harness.levels()[0] == "baseline"
