"""The low-rank kernels of every instruction-set level this machine runs, without torch in between."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from oracle import RATIO, relative_error

from lwft_kernels.lowrank import reference

SEED, OFFSET, SCALE = 11, 13, 0.75
TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(
    "tokens,d_in,d_out,rank,p,mixed",
    [
        (1, 40, 9, 4, 0.0, False),
        (67, 150, 200, 20, 0.0, True),
        (67, 150, 200, 70, 0.25, False),
        (60, 64, 64, 8, 0.25, True),
    ],
)
def test_forward_and_backward(level, dtype, tokens, d_in, d_out, rank, p, mixed):
    random = np.random.default_rng(tokens + d_in)
    adapters = 3 if mixed else 1

    def array(*shape):
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)

    x, grad_out, bias = array(tokens, d_in), array(tokens, d_out), array(d_out)
    a, b = array(adapters, rank, d_in), array(adapters, d_out, rank)
    index = random.integers(-1, 2, tokens) if mixed else None
    base_out = array(tokens, d_out) if mixed else None
    stream = (SCALE, SEED, OFFSET, p)
    out, hidden = lwft_harness.low_rank_forward(level, x, a, b, bias, base_out, index, *stream)
    dx, da, db, dbias = lwft_harness.low_rank_backward(level, grad_out, x, a, b, hidden, index, *stream)

    def run(torch_dtype):
        leaves = [torch.from_numpy(value).to(torch_dtype).requires_grad_() for value in (x, a, b, bias)]
        delta = reference.lora_delta(
            leaves[0],
            *(leaves[1:3] if mixed else (leaves[1][0], leaves[2][0])),
            None if index is None else torch.from_numpy(index),
            scale=SCALE,
            dropout_p=p,
            seed=torch.tensor([SEED, OFFSET]),
        )
        result = delta + (leaves[3] if base_out is None else torch.from_numpy(base_out).to(torch_dtype))
        direction = torch.from_numpy(grad_out).to(torch_dtype)
        return [result.detach(), *torch.autograd.grad(result, leaves[:3], direction), direction.sum(0)]

    oracle, eager = run(torch.float64), run(TORCH_DTYPES[dtype])
    for mine, theirs, exact in zip((out, dx, da, db, dbias), eager, oracle, strict=True):
        allowed = max(relative_error(theirs, exact), relative_error(exact.to(TORCH_DTYPES[dtype]), exact))
        assert relative_error(torch.from_numpy(mine), exact) <= RATIO * allowed + 1e-6


@pytest.mark.parametrize("level", lwft_harness.levels())
def test_tasks_may_run_on_any_thread(level):
    """The harness hands tasks to whichever thread is free: the bits must not change."""
    random = np.random.default_rng(0)
    x, grad_out = (random.standard_normal((300, d)).astype("float32") for d in (200, 333))
    a, b = (random.standard_normal((2, *shape)).astype("float32") for shape in ((16, 200), (333, 16)))
    bias, index = np.zeros(333, "float32"), random.integers(-1, 2, 300)
    results = []
    try:
        for threads in (1, 3):
            lwft_harness.set_threads(threads)
            out, hidden = lwft_harness.low_rank_forward(level, x, a, b, bias, None, index, 1.0, SEED, OFFSET, 0.1)
            grads = lwft_harness.low_rank_backward(level, grad_out, x, a, b, hidden, index, 1.0, SEED, OFFSET, 0.1)
            results.append((out, hidden, *grads))
    finally:
        lwft_harness.set_threads(1)
    for one, three in zip(*results, strict=True):
        assert np.array_equal(one, three)


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows,depth,columns", [(1, 5, 3), (8, 130, 131), (9, 1, 17), (61, 513, 129), (800, 70, 40)])
def test_product_with_the_frozen_weight(level, transpose, rows, depth, columns):
    random = np.random.default_rng(rows + depth)
    a = (random.standard_normal((rows, depth + 3)) / depth**0.5).astype("float16")[:, :depth]
    b = random.standard_normal((columns, depth) if transpose else (depth, columns)).astype("float16")
    before = random.standard_normal((rows, columns + 5)).astype("float16")
    whole = before.copy()
    lwft_harness.base_product(level, a, b, transpose, whole[:, :columns])
    exact = before[:, :columns].astype("float64") + a.astype("float64") @ (b.T if transpose else b).astype("float64")
    exact = torch.from_numpy(exact)
    assert relative_error(torch.from_numpy(whole[:, :columns]), exact) <= RATIO * relative_error(exact.half(), exact)
    assert (whole[:, columns:] == before[:, columns:]).all()


@pytest.mark.parametrize("level", [level for level in lwft_harness.levels() if lwft_harness.splits_float(level)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows,depth,columns", [(1, 5, 16), (70, 300, 48), (300, 129, 1616), (600, 530, 272)])
def test_float32_product_with_the_frozen_weight(level, transpose, rows, depth, columns):
    random = np.random.default_rng(rows + depth)
    a = random.standard_normal((rows, depth + 3)).astype("float32")[:, :depth]
    b = (random.standard_normal((columns, depth) if transpose else (depth, columns)) / depth**0.5).astype("float32")
    before = random.standard_normal((rows, columns + 5)).astype("float32")
    results = []
    for threads in (1, 2, 7):
        whole = before.copy()
        lwft_harness.set_threads(threads)
        try:
            lwft_harness.base_product(level, a, b, transpose, whole[:, :columns])
        finally:
            lwft_harness.set_threads(1)
        assert np.array_equal(whole[:, columns:], before[:, columns:])
        results.append(whole[:, :columns])
    assert all(np.array_equal(results[0], other) for other in results[1:]), "other bits with other threads"
    w = b.T if transpose else b
    exact = torch.from_numpy(before[:, :columns].astype("float64") + a.astype("float64") @ w.astype("float64"))
    eager = torch.addmm(torch.from_numpy(before[:, :columns]), torch.from_numpy(a), torch.from_numpy(w))
    assert relative_error(torch.from_numpy(results[0]), exact) <= RATIO * relative_error(eager, exact) + 1e-6


# more and fewer rows than the two products take at once, one and several blocks and panels, edges of each
PACKED_SHAPES = [(1, 5, 3), (8, 130, 131), (9, 1, 17), (17, 300, 600), (61, 513, 129), (270, 140, 70), (800, 70, 40)]


@pytest.mark.parametrize("level", lwft_harness.levels())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows,d_in,d_out", PACKED_SHAPES)
def test_products_with_a_packed_weight(level, dtype, rows, d_in, d_out):
    random = np.random.default_rng(rows + d_in)
    weight = (random.standard_normal((d_out, d_in)) / d_in**0.5).astype(dtype)
    for transpose in (True, False):
        depth, columns = (d_in, d_out) if transpose else (d_out, d_in)
        a = random.standard_normal((rows, depth + 3)).astype(dtype)[:, :depth]
        before = random.standard_normal((rows, columns + 5)).astype(dtype)
        results = []
        for threads in (1, 3):
            whole = before.copy()
            lwft_harness.set_threads(threads)
            try:
                unpacked = lwft_harness.packed_product(level, a, weight, transpose, whole[:, :columns])
            finally:
                lwft_harness.set_threads(1)
            assert np.array_equal(unpacked, weight)
            assert np.array_equal(whole[:, columns:], before[:, columns:])
            results.append(whole[:, :columns])
        assert np.array_equal(*results), "other bits with other threads"
        w = weight.T if transpose else weight
        exact = torch.from_numpy(before[:, :columns].astype("float64") + a.astype("float64") @ w.astype("float64"))
        eager = torch.addmm(torch.from_numpy(before[:, :columns]), torch.from_numpy(a), torch.from_numpy(w))
        allowed = max(relative_error(eager, exact), relative_error(exact.to(eager.dtype), exact))
        assert relative_error(torch.from_numpy(results[0]), exact) <= RATIO * allowed + 1e-6
