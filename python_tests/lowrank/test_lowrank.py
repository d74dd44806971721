"""low_rank_linear, lora_linear and lora_delta_ against the float64 oracle, forward and backward."""

from __future__ import annotations

import pytest
import torch
from low_rank_cases import (
    INDICES,
    both,
    delta_arguments,
    lora_arguments,
    lora_delta,
    low_rank_arguments,
)
from oracle import check_op

from lwft_kernels import functional as LF

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENS = (0, 1, 3, 17, 130)
# d_in, d_out, rank
SHAPES = ((24, 33, 4), (33, 24, 16), (100, 768, 64), (768, 100, 16), (130, 24, 70))
# Here a gradient can be a single number, or a vector times one. Which of us rounding and cancellation hit is
# luck then, so gradients are compared in float64 only, and results without cancellation.
THIN_SHAPES = ((1, 1, 1), (33, 1, 4), (1, 100, 1), (33, 40, 1), (1, 768, 16))


def positive(arguments):
    return {
        name: value.detach().abs().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_linear(shape, dtype):
    for tokens in TOKENS:
        check_op(*both(LF.low_rank_linear), low_rank_arguments(tokens, *shape), dtype, note=f"{tokens} tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linear(shape, dtype):
    for tokens in TOKENS:
        check_op(*both(LF.lora_linear), lora_arguments(tokens, *shape), dtype, note=f"{tokens} tokens")


# Sizes at which a float32 weight is multiplied by our own product, on matrix registers; and not quite.
BASES = ((300, 272, 16), (256, 800, 4), (255, 304, 8), (272, 260, 8))


@pytest.mark.parametrize("shape", BASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.25}, {"adapter_index": True, "dropout_p": 0.1}], ids=str)
def test_lora_linear_on_many_tokens(shape, options):
    for tokens in (130, 333):
        if "adapter_index" in options:
            options = {**options, "adapter_index": torch.arange(tokens) // 40 % 4 - 1}
        check_op(
            *both(LF.lora_linear), lora_arguments(tokens, *shape, **options), torch.float32, note=f"{tokens} tokens"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_delta(shape, dtype):
    for tokens in TOKENS:
        check_op(*both(lora_delta), delta_arguments(tokens, *shape), dtype, note=f"{tokens} tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_larger_than_the_cache(dtype):
    """Past 4 MiB they are written by other stores, where a row is made of whole vectors."""
    for d_out in (1088, 1089):
        check_op(*both(LF.low_rank_linear), low_rank_arguments(2100, 1040, d_out, 8), dtype, backward=d_out == 1088)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bias(dtype):
    check_op(*both(LF.low_rank_linear), low_rank_arguments(19, 40, 72, 8, bias=False), dtype)
    check_op(*both(LF.lora_linear), lora_arguments(19, 40, 72, 8, bias=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_reference_dropout(p, dtype):
    for tokens in (5, 70):
        check_op(*both(LF.lora_linear), lora_arguments(tokens, 133, 70, 8, dropout_p=p), dtype)
        check_op(*both(lora_delta), delta_arguments(tokens, 133, 70, 8, dropout_p=p), dtype)


def test_dropout_drops_the_same_elements():
    """With A the identity, hidden shows every element of dropout(x)."""
    x = torch.randn(70, 96, dtype=torch.float64)
    arguments = {
        "x": x,
        "lora_a": torch.eye(96, dtype=torch.float64),
        "lora_b": torch.eye(96, dtype=torch.float64),
    }
    results = [op(base_out=torch.zeros_like(x), dropout_p=0.3, **arguments) for op in both(lora_delta)]
    assert torch.equal(*results)
    assert 0.2 < (results[0] == 0).double().mean() < 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_adapter_index(index, p, dtype):
    options = {"adapter_index": torch.tensor(INDICES[index]), "dropout_p": p}
    check_op(*both(LF.lora_linear), lora_arguments(70, 100, 65, 4, **options), dtype)
    check_op(*both(lora_delta), delta_arguments(70, 100, 65, 4, **options), dtype)


def test_adapter_index_of_a_batch_is_one_lora_linear_per_row():
    x = torch.randn(4, 6, 24)
    weight, bias = torch.randn(40, 24), torch.randn(40)
    a, b = torch.randn(3, 8, 24), torch.randn(3, 40, 8)
    index = torch.tensor([2, -1, 0, 2])
    out = LF.lora_linear(x, weight, bias, a, b, scale=2.0, adapter_index=index)
    for row, adapter in enumerate(index.tolist()):
        expected = torch.nn.functional.linear(x[row], weight, bias)
        if adapter >= 0:
            expected = expected + 2.0 * x[row] @ a[adapter].T @ b[adapter].T
        torch.testing.assert_close(out[row], expected)
    assert torch.equal(out, LF.lora_linear(x, weight, bias, a, b, scale=2.0, adapter_index=index.int()))
    assert torch.equal(out[1], LF.lora_linear(x, weight, bias, a, torch.zeros_like(b), adapter_index=index)[1])


def test_unused_adapters_get_zero_gradients():
    a, b = torch.randn(3, 4, 24, requires_grad=True), torch.randn(3, 40, 4, requires_grad=True)
    index = torch.tensor([1, -1])
    LF.lora_linear(torch.randn(2, 24), torch.randn(40, 24), None, a, b, adapter_index=index).sum().backward()
    for grad in (a.grad, b.grad):
        assert grad[1].abs().min() > 0 and not grad[0].any() and not grad[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_float32_adapters_beside_16_bit_activations(p, dtype):
    for tokens in (3, 70):
        keep = frozenset({"lora_a", "lora_b"})
        arguments = lora_arguments(tokens, 96, 130, 8, dropout_p=p)
        arguments |= {name: arguments[name].detach().float().requires_grad_() for name in keep}
        check_op(*both(LF.lora_linear), arguments, dtype, keep=keep)
        arguments = delta_arguments(tokens, 96, 130, 8, dropout_p=p)
        arguments |= {name: arguments[name].detach().float().requires_grad_() for name in keep}
        check_op(*both(lora_delta), arguments, dtype, keep=keep)
        keep = frozenset({"down_weight", "up_weight", "bias"})
        arguments = low_rank_arguments(tokens, 96, 130, 8)
        arguments |= {name: arguments[name].detach().float().requires_grad_() for name in keep}
        check_op(*both(LF.low_rank_linear), arguments, dtype, keep=keep)


def test_gradients_have_the_dtype_of_their_argument():
    x = torch.randn(3, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 24, dtype=torch.bfloat16)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    LF.lora_linear(x, weight, None, a, b).sum().backward()
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_float32_input_on_a_16_bit_base():
    """What autocast leaves: the base layer's result is 16-bit, its input is not."""
    arguments = delta_arguments(30, 96, 130, 8)
    base_out = arguments["base_out"].detach().to(torch.bfloat16)
    keep = frozenset({"base_out"})
    check_op(*both(lora_delta), arguments | {"base_out": base_out}, torch.float32, keep=keep)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded", "narrowed"])
def test_strided_inputs(view):
    base = torch.randn(4, 6, 48)
    x = {
        "transposed": base.transpose(0, 1),
        "sliced": base[..., ::2],
        "expanded": base[:1].expand(4, 6, 48),
        "narrowed": base[..., 5:30],
    }[view]
    d = x.shape[-1]
    weight, bias, a, b = torch.randn(33, d), torch.randn(33), torch.randn(d, 4).T, torch.randn(4, 33).T
    expected = torch.nn.functional.linear(x, weight, bias) + x @ a.T @ b.T
    torch.testing.assert_close(LF.lora_linear(x, weight, bias, a, b), expected)
    torch.testing.assert_close(LF.lora_linear(x, weight.T.contiguous().T, bias, a, b), expected)
    part_of_a_larger_one = torch.cat([torch.randn(7, d), weight])[7:]  # as in a fused q, k, v projection
    torch.testing.assert_close(LF.lora_linear(x, part_of_a_larger_one, bias, a, b), expected)
    torch.testing.assert_close(LF.low_rank_linear(x, a, b, bias), x @ a.T @ b.T + bias)


def test_strided_output_gradient():
    """The gradient of a transposed result, and one expanded from a single number."""
    x = torch.randn(9, 24, requires_grad=True)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    direction = torch.randn(40, 9)
    for loss in (lambda out: (out.T * direction).sum(), lambda out: out.sum()):
        ours = torch.autograd.grad(loss(LF.low_rank_linear(x, a, b)), (x, a, b))
        expected = torch.autograd.grad(loss(x @ a.T @ b.T), (x, a, b))
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_shapes_without_a_leading_dimension():
    a, b = torch.randn(4, 24), torch.randn(40, 4)
    x = torch.randn(24)
    torch.testing.assert_close(LF.low_rank_linear(x, a, b), b @ (a @ x))
    assert LF.low_rank_linear(torch.randn(2, 0, 24), a, b).shape == (2, 0, 40)
    base = torch.zeros(40)
    assert LF.lora_delta_(base, x, a, b) is base
    torch.testing.assert_close(base, b @ (a @ x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", THIN_SHAPES, ids=str)
def test_thin_shapes(shape, dtype):
    backward = dtype == torch.float64
    for tokens in TOKENS:
        for op, make in (
            (LF.low_rank_linear, low_rank_arguments),
            (LF.lora_linear, lora_arguments),
            (lora_delta, delta_arguments),
        ):
            check_op(*both(op), positive(make(tokens, *shape)), dtype, backward=backward)


# ---- only what is asked for ----


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("weight", "bias"), ("x", "lora_b")], ids=str)
def test_some_gradients_only(wanted):
    arguments = lora_arguments(20, 33, 70, 4, dropout_p=0.25)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.detach().requires_grad_(name in wanted)
    check_op(*both(LF.lora_linear), arguments, torch.float32)


@pytest.mark.parametrize("op", ["low_rank_linear", "lora_linear", "lora_delta"])
def test_gradcheck(op):
    if op == "low_rank_linear":
        arguments = low_rank_arguments(5, 7, 6, 3)
        call = LF.low_rank_linear
    elif op == "lora_linear":
        arguments = lora_arguments(5, 7, 6, 3, dropout_p=0.3, adapter_index=torch.tensor([0, 2, -1, 2, 0]))
        call = LF.lora_linear
    else:
        arguments = delta_arguments(5, 7, 6, 3, dropout_p=0.3)
        call = lora_delta
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    rest = {name: value for name, value in arguments.items() if name not in names}

    def seeded(*values):
        torch.manual_seed(3)
        return call(**dict(zip(names, values, strict=True)), **rest)

    assert torch.autograd.gradcheck(seeded, [arguments[name] for name in names])


# ---- the same bits ----


@pytest.mark.parametrize("op", ["low_rank_linear", "lora_delta"])
@pytest.mark.parametrize("tokens", [2, 40, 130, 164, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_every_thread_count(op, tokens, dtype):
    """lora_linear adds a matrix product to these: for ours see test_levels.py; the vendor's bits are its own."""
    if op == "low_rank_linear":  # of so high a rank that few tokens too are shared out among the threads
        call, arguments = LF.low_rank_linear, low_rank_arguments(tokens, 300, 1100, 70 if tokens < 64 else 16)
    else:
        index = torch.arange(tokens) // 40 % 4 - 1
        call, arguments = (
            lora_delta,
            delta_arguments(tokens, 300, 1100, 16, dropout_p=0.1, adapter_index=index),
        )
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            arguments[name] = leaves[name] = value.detach().to(dtype).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8, 1):
            torch.set_num_threads(count)
            torch.manual_seed(2)
            out = call(**arguments)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_runs_of_lora_linear_agree():
    arguments = lora_arguments(130, 100, 768, 16, dropout_p=0.1)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        out = LF.lora_linear(**arguments)
        grads = torch.autograd.grad(out.square().sum(), [arguments[n] for n in ("x", "weight", "lora_a", "lora_b")])
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
