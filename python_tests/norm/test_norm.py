"""add_layer_norm: numbers against the oracle, gradients, errors, and every way PyTorch may call it."""

from __future__ import annotations

import pytest
import torch
from oracle import check_op
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.norm import reference

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(tokens, d, *, weight=True, bias=True, dropout_p=0.0):
    generator = torch.Generator().manual_seed(tokens * 1000 + d)
    arguments = {
        "x": torch.randn(tokens, d, generator=generator, dtype=torch.float64).requires_grad_(),
        "sublayer_out": torch.randn(tokens, d, generator=generator, dtype=torch.float64).requires_grad_(),
        "weight": None,
        "bias": None,
        "dropout_p": dropout_p,
    }
    if weight:
        arguments["weight"] = torch.randn(d, generator=generator, dtype=torch.float64).requires_grad_()
    if bias:
        arguments["bias"] = torch.randn(d, generator=generator, dtype=torch.float64).requires_grad_()
    return arguments


def reference_with_seed(**arguments):
    """The reference, drawing its dropout seed from the same state of torch's generator as ours."""
    torch.manual_seed(0)
    with lwft_kernels.use_backend("reference"):
        return LF.add_layer_norm(**arguments)


def ours(**arguments):
    torch.manual_seed(0)
    return LF.add_layer_norm(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,d", [(0, 8), (1, 5), (3, 33), (17, 64), (130, 768), (5, 1031)])
def test_accuracy(tokens, d, dtype):
    check_op(ours, reference_with_seed, make(tokens, d), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,d", [(2900, 768), (2900, 771)])
def test_results_larger_than_the_cache(tokens, d, dtype):
    """Past 4 MiB they are written by other stores, where a row is made of whole vectors."""
    check_op(ours, reference_with_seed, make(tokens, d), dtype)


@pytest.mark.parametrize("narrow", ["x", "sublayer_out"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_accuracy_of_mixed_dtypes(narrow, p):
    arguments = make(21, 77, dropout_p=p)
    arguments[narrow] = arguments[narrow].detach().bfloat16().requires_grad_()
    check_op(ours, reference_with_seed, arguments, torch.float32, keep=frozenset({narrow}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight,bias", [(True, False), (False, True), (False, False)])
def test_without_parameters(weight, bias, dtype):
    check_op(ours, reference_with_seed, make(7, 40, weight=weight, bias=bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_reference_dropout(p, dtype):
    check_op(ours, reference_with_seed, make(19, 133, dropout_p=p), dtype)


def test_float32_parameters_beside_bfloat16():
    arguments = make(9, 96)
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    arguments["bias"] = arguments["bias"].detach().float().requires_grad_()
    check_op(ours, reference_with_seed, arguments, torch.bfloat16, keep=frozenset({"weight", "bias"}))


def test_mixed_residual_and_sublayer_dtypes():
    x = torch.randn(5, 32, requires_grad=True)
    sublayer_out = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    out = LF.add_layer_norm(x, sublayer_out)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert x.grad.dtype == torch.float32 and sublayer_out.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strided_inputs(view):
    base = torch.randn(4, 6, 48)
    x = {
        "transposed": base.transpose(0, 1),
        "sliced": base[..., ::2],
        "expanded": base[:1].expand(4, 6, 48),
    }[view]
    sublayer_out = torch.randn(x.shape)
    expected = torch.nn.functional.layer_norm(x + sublayer_out, x.shape[-1:])
    torch.testing.assert_close(LF.add_layer_norm(x, sublayer_out), expected)


def test_gradcheck():
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 7), (5, 7), (7,), (7,))
    ]

    def op(x, sublayer_out, weight, bias):
        torch.manual_seed(3)
        return LF.add_layer_norm(x, sublayer_out, weight, bias, dropout_p=0.3)

    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(p):
    x, u = (torch.randn(6, 16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(16, requires_grad=True) for _ in range(2))
    seed = torch.tensor([3, 5]) if p else None
    torch.library.opcheck(torch.ops.lwft.add_layer_norm_forward.default, (x, u, weight, bias, seed, 1e-5, p))
    _, mean, rstd = torch.ops.lwft.add_layer_norm_forward(x, u, weight, bias, seed, 1e-5, p)
    arguments = (torch.randn(6, 16), x, u, weight, mean, rstd, seed, p, 0b1011)
    torch.library.opcheck(
        torch.ops.lwft.add_layer_norm_backward.default,
        tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments),
    )


def test_compile_and_export():
    module = lwft_kernels.nn.AddLayerNorm(24)
    x, u = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 24)
    expected = module(x, u)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(module, fullgraph=True)(x, u)
    (compiled_grad,) = torch.autograd.grad(compiled.square().sum(), x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(compiled_grad, grad)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module.eval(), (x, u), dynamic_shapes=({1: tokens}, {1: tokens}))
    x, u = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    torch.testing.assert_close(program.module()(x, u), module(x, u))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_hands_over_mixed_inputs(dtype):
    module = lwft_kernels.nn.AddLayerNorm(32)
    linear = torch.nn.Linear(32, 32)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=dtype):
        u = linear(x)
        out = module(x, u)
        expected = torch.nn.functional.layer_norm(x + u, (32,), module.weight, module.bias)
    assert u.dtype == dtype and out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected)


def test_checkpoint_draws_the_same_dropout():
    module = lwft_kernels.nn.AddLayerNorm(64, dropout=0.4)
    x, u = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    results = []
    for run in (module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(x, u).square().sum(), (x, u)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_same_bits_for_every_thread_count():
    x, u = torch.randn(300, 768, requires_grad=True), torch.randn(300, 768, requires_grad=True)
    weight, bias = torch.randn(768, requires_grad=True), torch.randn(768, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            torch.manual_seed(2)
            out = LF.add_layer_norm(x, u, weight, bias, dropout_p=0.1)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, u, weight, bias))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_supported_says_so():
    x, u = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    (grad,) = torch.autograd.grad(LF.add_layer_norm(x, u).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: LF.add_layer_norm(t, u).sum())(x)
    for mode in (torch.no_grad, torch.enable_grad):  # without gradients the tangent would be lost silently
        with mode(), forward_ad.dual_level():
            assert torch.equal(LF.add_layer_norm(x, u), LF.add_layer_norm(x.detach(), u))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                LF.add_layer_norm(forward_ad.make_dual(x.detach(), u), u)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"x": "text"}, TypeError, "x must be a Tensor"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x must be float"),
        ({"sublayer_out": torch.ones(3, 9)}, ValueError, "sublayer_out must have shape"),
        ({"sublayer_out": torch.ones(3, 8, device="meta")}, ValueError, "sublayer_out is on meta"),
        ({"weight": torch.ones(7)}, ValueError, "weight must have shape"),
        ({"weight": torch.ones(8, dtype=torch.bfloat16)}, TypeError, "weight is"),
        ({"bias": torch.ones(8, 1)}, ValueError, "bias must have shape"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability"),
        ({"x": torch.ones(3, 0), "sublayer_out": torch.ones(3, 0)}, ValueError, "last dimension of x is empty"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"x": torch.ones(3, 8), "sublayer_out": torch.ones(3, 8), **change}
    with pytest.raises(error, match=words):
        LF.add_layer_norm(**arguments)


def test_reference_is_plain_pytorch():
    x, u = torch.randn(3, 16), torch.randn(3, 16)
    weight, bias = torch.randn(16), torch.randn(16)
    expected = torch.nn.functional.layer_norm(x + u, (16,), weight, bias)
    assert torch.equal(reference.add_layer_norm(x, u, weight, bias), expected)
