"""The CUDA add_layer_norm in the emulation of csrc/common/cuda: its numbers, without a GPU."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from emulated import MODES, to_numpy, to_torch
from oracle import assert_accurate

from lwft_kernels.norm import reference

SEED, OFFSET, EPS = 11, 13, 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def arguments(tokens, d, dtype, parameters=None):
    parameters = parameters or dtype
    return {
        "x": torch.randn(tokens, d).to(dtype),
        "sublayer_out": torch.randn(tokens, d).to(dtype),
        "weight": torch.randn(d).to(parameters),
        "bias": torch.randn(d).to(parameters),
    }


def emulated(values, p=0.0):
    """Results and gradients along `direction`."""
    arrays = {name: to_numpy(value) for name, value in values.items()}
    x, u, weight, bias, direction = (arrays[name] for name in ("x", "sublayer_out", "weight", "bias", "direction"))
    out, mean, rstd = lwft_harness.add_layer_norm_forward("cuda", x, u, weight, bias, EPS, SEED, OFFSET, p)
    grads = lwft_harness.add_layer_norm_backward("cuda", direction, x, u, weight, mean, rstd, SEED, OFFSET, p)
    found = dict(zip(("out", "dx", "dsublayer_out", "dweight", "dbias"), (out, *grads), strict=True))
    return {name: to_torch(value) for name, value in found.items()}


def plain(values, dtype, p):
    """The reference in `dtype`; float32 parameters stay so beside 16-bit activations."""
    keeps = {"weight", "bias"} if dtype != torch.float64 else ()
    cast = {name: value.clone() if name in keeps else value.to(dtype) for name, value in values.items()}
    direction = cast.pop("direction")
    leaves = {name: value.requires_grad_() for name, value in cast.items()}
    out = reference.add_layer_norm(**leaves, eps=EPS, dropout_p=p, seed=torch.tensor([SEED, OFFSET]))
    grads = torch.autograd.grad(out, list(leaves.values()), direction)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(values, p=0.0):
    dtype = values["x"].dtype
    values["direction"] = torch.randn(values["x"].shape).to(dtype)
    assert_accurate(emulated(values, p), plain(values, dtype, p), plain(values, torch.float64, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,d", [(1, 8), (9, 72), (3, 1024), (5, 1032), (2, 2056), (2, 4104), (1, 8192)])
def test_accuracy(tokens, d, dtype):
    """Rows of 1, 2, 4 and 8 warps; more and fewer rows than a block holds."""
    check(arguments(tokens, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_is_that_of_the_stream(p, dtype):
    check(arguments(5, 136, dtype), p)


def test_all_is_dropped():
    check(arguments(2, 72, torch.float32), 1.0)


def test_float32_parameters_beside_bfloat16():
    check(arguments(5, 40, torch.bfloat16, torch.float32))


def test_more_rows_than_one_turn_of_the_blocks():
    """264 blocks of backward, a row each at 8 warps a row: the rest are added in a second turn."""
    check(arguments(267, 4104, torch.float32))


@pytest.mark.parametrize("schedule,early_copies", MODES)
def test_the_order_of_threads_does_not_matter(schedule, early_copies):
    values = arguments(5, 2056, torch.bfloat16)
    values["direction"] = torch.randn(5, 2056).bfloat16()
    expected = emulated(values, 0.1)
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for name, value in emulated(values, 0.1).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("d,words", [(12, "multiple of 8"), (8200, "at most 8192")])
def test_declines_what_it_cannot_serve(d, words):
    with pytest.raises(ValueError, match=words):
        check(arguments(2, d, torch.float16))


def test_declines_float64_and_rows_off_the_grid():
    with pytest.raises(ValueError, match="x must be bfloat16, float16 or float32"):
        check(arguments(2, 16, torch.float64))
    values = {name: to_numpy(value) for name, value in arguments(3, 17, torch.float32).items()}
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        lwft_harness.add_layer_norm_forward(
            "cuda", values["x"][:, 1:], values["sublayer_out"][:, 1:], values["weight"][1:], values["bias"][1:],
            EPS, SEED, OFFSET, 0.0,
        )  # fmt: skip


def test_zero_tokens():
    values = arguments(0, 16, torch.float16)
    values["direction"] = torch.randn(0, 16).half()
    found = emulated(values)
    assert found["out"].shape == (0, 16)
    assert not np.asarray(found["dweight"]).any()
