"""The attention kernels of every instruction-set level this machine runs, without torch in between."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from oracle import RATIO, relative_error

from lwft_kernels.attention import reference

SEED, OFFSET = 11, 13
TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "uint16": torch.bfloat16,
}


def to_torch(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "queries,keys,head_dim,causal,window,softcap,p",
    [
        (1, 530, 20, False, 0, 0.0, 0.0),
        (50, 70, 33, True, 0, 0.0, 0.25),
        (30, 200, 72, True, 90, 3.0, 0.0),
    ],
)
def test_forward_and_backward(level, dtype, threads, queries, keys, head_dim, causal, window, softcap, p):
    generator = torch.Generator().manual_seed(keys)
    kind = TORCH_DTYPES[dtype]
    statistics = torch.float64 if kind == torch.float64 else torch.float32

    def draw(*shape, dtype=kind):
        tensor = torch.randn(shape, generator=generator).to(dtype)
        return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()

    q, grad_out = draw(2, 4, queries, head_dim), draw(2, 4, queries, head_dim)
    k, v = draw(2, 2, keys, head_dim), draw(2, 2, keys, head_dim)
    prefix_k, prefix_v = draw(1, 2, 5, head_dim), draw(1, 2, 5, head_dim)
    bias, grad_lse = draw(1, 4, queries, keys), draw(2, 4, queries, dtype=statistics)
    inputs = (q, k, v, bias, prefix_k, prefix_v)
    rule = (0.3, causal, window, softcap, SEED, OFFSET, p)

    lwft_harness.set_threads(threads)
    try:
        out, lse = lwft_harness.attention_forward(level, *inputs, *rule)
        grads = lwft_harness.attention_backward(level, grad_out, grad_lse, *inputs, out, lse, *rule)
    finally:
        lwft_harness.set_threads(1)

    def run(kind):
        leaves = [to_torch(a).to(kind).requires_grad_() for a in inputs]
        results = reference.attention(
            *leaves[:3], bias=leaves[3], prefix_k=leaves[4], prefix_v=leaves[5], scale=0.3, causal=causal,
            window=window or None, softcap=softcap or None, dropout_p=p, seed=torch.tensor([SEED, OFFSET]),
            return_lse=True,
        )  # fmt: skip
        directions = [to_torch(g).to(r.dtype) for g, r in zip((grad_out, grad_lse), results, strict=True)]
        return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, directions))

    oracle, eager = run(torch.float64), run(kind)
    for mine, theirs, exact in zip((out, lse, *grads), eager, oracle, strict=True):
        assert relative_error(to_torch(mine), exact) <= RATIO * relative_error(theirs, exact) + 1e-6
