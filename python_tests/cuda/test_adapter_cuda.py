"""The CUDA adapter in the emulation of csrc/common/cuda: its numbers, without a GPU."""

from __future__ import annotations

import lwft_harness
import pytest
import torch
from emulated import MODES, to_numpy, to_torch
from oracle import assert_accurate

from lwft_kernels.adapter import reference
from lwft_kernels.adapter.functional import ACTIVATIONS

SEED, OFFSET, EPS = 11, 13, 1e-5
DTYPES = (torch.bfloat16, torch.float16)


def arguments(tokens, d, m, dtype, norm):
    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    return {
        "x": normal(tokens, d),
        "down_weight": normal(m, d, scale=d**-0.5),
        "down_bias": normal(m),
        "up_weight": normal(d, m, scale=m**-0.5),
        "up_bias": normal(d),
        "norm_weight": normal(d) if norm else None,
        "norm_bias": normal(d) if norm else None,
    }


def emulated(values, activation="relu", scale=0.7, p=0.0):
    arrays = [None if value is None else to_numpy(value) for value in values.values()]
    kind = ACTIVATIONS.index(activation)
    return lwft_harness.adapter_forward("cuda", *arrays, kind, EPS, scale, SEED, OFFSET, p)


def check(values, dtype, activation="relu", scale=0.7, p=0.0):
    out, hidden, mean, rstd = emulated(values, activation, scale, p)

    def run(torch_dtype):
        cast = {name: None if value is None else value.to(torch_dtype) for name, value in values.items()}
        x, down_weight, down_bias = cast["x"], cast["down_weight"], cast["down_bias"]
        n = x
        if cast["norm_weight"] is not None:
            n = torch.nn.functional.layer_norm(x, x.shape[-1:], cast["norm_weight"], cast["norm_bias"], EPS)
        return {
            "out": reference.adapter(
                **cast, activation=activation, scale=scale, residual=x, dropout_p=p, eps=EPS,
                seed=torch.tensor([SEED, OFFSET]),
            ),
            "hidden": torch.nn.functional.linear(n, down_weight, down_bias),
        }  # fmt: skip

    assert_accurate({"out": to_torch(out), "hidden": to_torch(hidden)}, run(dtype), run(torch.float64))
    if values["norm_weight"] is not None:
        exact = values["x"].double()
        eager = values["x"].float()
        assert_accurate(
            {"mean": torch.from_numpy(mean), "rstd": torch.from_numpy(rstd)},
            {"mean": eager.mean(-1), "rstd": (eager.var(-1, correction=0) + EPS).rsqrt()},
            {"mean": exact.mean(-1), "rstd": (exact.var(-1, correction=0) + EPS).rsqrt()},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "tokens,d,m", [(1, 8, 8), (63, 64, 64), (64, 72, 56), (65, 136, 72), (130, 264, 128), (20, 72, 136), (3, 200, 256)]
)
def test_accuracy(tokens, d, m, norm, dtype):
    check(arguments(tokens, d, m, dtype, norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    check(arguments(17, 40, 16, dtype, False), dtype, activation)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_that_of_the_stream(p):
    check(arguments(70, 136, 24, torch.float16, False), torch.float16, p=p)


def test_without_biases():
    values = arguments(20, 72, 24, torch.bfloat16, True)
    values["norm_bias"] = None
    check(values, torch.bfloat16)


@pytest.mark.parametrize("schedule,early_copies", MODES)
def test_the_order_of_threads_and_copies_does_not_matter(schedule, early_copies):
    values = arguments(70, 200, 72, torch.bfloat16, True)
    lwft_harness.set_cuda_emulation("round_robin", False)
    expected = emulated(values)
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for mine, theirs in zip(emulated(values), expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    "tokens,d,m,words",
    [(3, 12, 8, "model dimension must be a multiple of 8"), (3, 16, 12, "multiple of 8 and at most 256"),
     (3, 16, 264, "multiple of 8 and at most 256")],
)  # fmt: skip
def test_declines_what_it_cannot_serve(tokens, d, m, words):
    with pytest.raises(ValueError, match=words):
        emulated(arguments(tokens, d, m, torch.float16, False))


def test_declines_other_dtypes():
    with pytest.raises(ValueError, match="x must be bfloat16 or float16"):
        emulated(arguments(3, 16, 8, torch.float32, False))


def test_zero_tokens():
    out, hidden, *_ = emulated(arguments(0, 16, 8, torch.float16, True))
    assert out.shape == (0, 16)
    assert hidden.shape == (0, 8)


# ---- backward ----

GRADIENTS = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


def check_backward(values, activation="gelu", scale=0.7, p=0.0):
    """Gradients along a random direction, with the residual x, from what forward kept."""
    dtype = values["x"].dtype
    direction = torch.randn(values["x"].shape).to(dtype)
    arrays = {name: None if value is None else to_numpy(value) for name, value in values.items()}
    kind = ACTIVATIONS.index(activation)
    _, hidden, mean, rstd = emulated(values, activation, scale, p)
    grads = lwft_harness.adapter_backward(
        "cuda", to_numpy(direction), arrays["x"], arrays["down_weight"], arrays["up_weight"], arrays["norm_weight"],
        arrays["norm_bias"], to_numpy(to_torch(hidden)), mean, rstd, kind, scale, SEED, OFFSET, p,
    )  # fmt: skip
    ours = {name: to_torch(grad) for name, grad in zip(GRADIENTS, grads, strict=True) if values[name] is not None}

    def run(torch_dtype):
        leaves = {
            name: None if value is None else value.to(torch_dtype, copy=True).requires_grad_()
            for name, value in values.items()
        }
        out = reference.adapter(
            **leaves, activation=activation, scale=scale, residual=leaves["x"], dropout_p=p, eps=EPS,
            seed=torch.tensor([SEED, OFFSET]),
        )  # fmt: skip
        named = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        return dict(zip(named, torch.autograd.grad(out, list(named.values()), direction.to(torch_dtype)), strict=True))

    assert_accurate(ours, run(dtype), run(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "tokens,d,m", [(1, 8, 8), (63, 64, 64), (65, 136, 24), (130, 264, 64), (70, 72, 72), (65, 136, 128)]
)
def test_backward(tokens, d, m, norm, dtype):
    check_backward(arguments(tokens, d, m, dtype, norm))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_of_activations(activation):
    check_backward(arguments(17, 40, 16, torch.float16, False), activation)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_backward_of_dropout(p, norm):
    check_backward(arguments(70, 136, 24, torch.bfloat16, norm), p=p)


@pytest.mark.parametrize("tokens,d", [(600, 8), (300, 4352)])
def test_backward_of_several_ranges_of_tokens(tokens, d):
    """Ranges of a tile each for one chunk of columns, and of two tiles each for 68."""
    check_backward(arguments(tokens, d, 8, torch.float16, True))


@pytest.mark.parametrize("schedule,early_copies", MODES)
def test_the_order_of_threads_and_copies_does_not_matter_to_backward(schedule, early_copies):
    values = arguments(70, 136, 24, torch.bfloat16, True)
    arrays = {name: to_numpy(value) for name, value in values.items()}
    direction = to_numpy(torch.randn(70, 136).bfloat16())
    _, hidden, mean, rstd = emulated(values, "gelu", 0.7, 0.1)

    def run():
        return lwft_harness.adapter_backward(
            "cuda", direction, arrays["x"], arrays["down_weight"], arrays["up_weight"], arrays["norm_weight"],
            arrays["norm_bias"], to_numpy(to_torch(hidden)), mean, rstd, 1, 0.7, SEED, OFFSET, 0.1,
        )  # fmt: skip

    expected = run()
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for mine, theirs in zip(run(), expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_backward_declines_what_it_cannot_serve():
    with pytest.raises(ValueError, match="multiple of 8 and at most 128"):
        check_backward(arguments(3, 16, 136, torch.float16, False))
