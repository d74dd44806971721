"""adapter: numbers against the oracle, gradients, errors, and every way PyTorch may call it."""

from __future__ import annotations

import pytest
import torch
from oracle import check_op
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.adapter.functional import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
TENSORS = ("x", *PARAMETERS, "residual")


def make(tokens, d, m, *, norm=False, residual=None, without=(), **options):
    """Arguments for `call`; residual is None, "x" or "other", `without` names parameters to leave out."""
    generator = torch.Generator().manual_seed(tokens * 1000 + d * 10 + m + 1)

    def normal(*shape, scale=1.0, shift=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * scale + shift).requires_grad_()

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


EVERYTHING = {"norm": True, "residual": "x", "activation": "gelu", "scale": 0.7, "dropout_p": 0.3}


def ours(*, residual_is_x=False, **arguments):
    torch.manual_seed(0)
    if residual_is_x:
        arguments["residual"] = arguments["x"]
    return LF.adapter(**arguments)


def reference(**arguments):
    """The reference, drawing its dropout seed from the same state of torch's generator as ours."""
    with lwft_kernels.use_backend("reference"):
        return ours(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 16, 64])
@pytest.mark.parametrize("d", [1, 24, 33, 100, 768])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
def test_accuracy(tokens, d, m, dtype):
    plain, everything = make(tokens, d, m), make(tokens, d, m, **EVERYTHING)
    if m == 1:
        # GELU's slope is zero at -0.75: where the only hidden number is near it, every gradient is a rounding of that
        # number many times over
        everything["activation"] = "leaky_relu"
        # the gradient of one number, a sum that may cancel: its relative error is a matter of luck
        for arguments, name in ((plain, "down_bias"), (everything, "down_bias"), (everything, "norm_bias")):
            arguments[name].requires_grad_(False)
    check_op(ours, reference, plain, dtype, note="plain")
    if d > 1:  # the LayerNorm of one element is constant: its gradient is nothing but rounding
        check_op(ours, reference, everything, dtype, note="everything")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swish"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_activations(tokens, activation, dtype):
    check_op(ours, reference, make(tokens, 50, 21, activation=activation), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [None, "x", "other"])
@pytest.mark.parametrize("without", [(), ("down_bias",), ("up_bias",), ("down_bias", "up_bias", "norm_bias")])
@pytest.mark.parametrize("tokens", [4, 37])
def test_without_optional_parts(tokens, without, residual, norm, dtype):
    check_op(ours, reference, make(tokens, 65, 12, norm=norm, residual=residual, without=without), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1088, 1089])
def test_results_larger_than_the_cache(d, dtype):
    """Past 4 MiB they are written by other stores, where a row is made of whole vectors."""
    check_op(ours, reference, make(2100, d, 8, residual="x"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [6, 31])
def test_dropout_is_the_reference_dropout(tokens, p, dtype):
    check_op(ours, reference, make(tokens, 150, 8, dropout_p=p, scale=-1.5, residual="x"), dtype)


@pytest.mark.parametrize("tokens", [2, 29])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_16_bit_activations(dtype, tokens):
    arguments = make(tokens, 96, 24, **EVERYTHING)
    for name in PARAMETERS:
        arguments[name] = arguments[name].detach().float().requires_grad_()
    check_op(ours, reference, arguments, dtype, keep=frozenset(PARAMETERS))
    assert ours(**{**arguments, "x": arguments["x"].to(dtype)}).dtype == dtype


def test_more_tokens_than_one_chunk():
    for dtype in (torch.float32, torch.bfloat16):
        check_op(ours, reference, make(4500, 40, 9, **EVERYTHING), dtype)


def test_wide_bottleneck_and_model():
    check_op(ours, reference, make(70, 1100, 300, norm=True, residual="x"), torch.float32)


@pytest.mark.parametrize("tokens", [4, 24])
@pytest.mark.parametrize("view", ["transposed", "sliced", "column_major", "expanded"])
def test_strided_inputs(view, tokens):
    d = 48
    base = torch.randn(3, tokens, 2 * d)
    x = {
        "transposed": base[..., :d].transpose(0, 1),
        "sliced": base[..., ::2],
        "column_major": torch.randn(d, 3 * tokens).t(),
        "expanded": base[:1, :, :d].expand(3, tokens, d),
    }[view]
    arguments = make(1, d, 16, norm=True)
    arguments = {n: a.detach().float() for n, a in arguments.items() if isinstance(a, torch.Tensor)}
    arguments["residual"] = x.flip(0)
    arguments["up_weight"] = arguments["up_weight"].t().contiguous().t()

    def gradient(function, x):
        x = x.detach().requires_grad_()
        out = function(**{**arguments, "x": x})
        (grad,) = torch.autograd.grad(out, x, torch.ones(out.shape).as_strided(out.shape, [0] * out.dim()))
        return out.detach(), grad

    mine, expected = gradient(LF.adapter, x), gradient(reference, x.contiguous())
    torch.testing.assert_close(mine[0], expected[0])
    torch.testing.assert_close(mine[1], expected[1])


@pytest.mark.parametrize("tokens", [3, 26])
@pytest.mark.parametrize("needed", TENSORS)
def test_a_gradient_alone_is_the_same_gradient(needed, tokens):
    arguments = make(tokens, 70, 11, norm=True, residual="other", dropout_p=0.2)
    arguments = {n: a.detach().float() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    direction = torch.randn(tokens, 70)

    def gradients(names):
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        out = ours(**{**arguments, **leaves})
        return dict(zip(names, torch.autograd.grad(out, list(leaves.values()), direction), strict=True))

    assert torch.equal(gradients([needed])[needed], gradients(TENSORS)[needed])


@pytest.mark.parametrize("tokens", [5, 11])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, tokens):
    options = make(tokens, 7, 3, norm=True, residual="other", activation=activation, scale=0.8, dropout_p=0.2)
    names = [name for name in options if isinstance(options[name], torch.Tensor)]
    rest = {name: value for name, value in options.items() if name not in names}
    assert names == list(TENSORS)
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(**dict(zip(names, tensors, strict=True)), **rest), [options[n] for n in names]
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(p, norm):
    a = make(12, 16, 5, norm=norm, residual="other")
    a = {n: t.detach().float().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    seed = torch.tensor([3, 5]) if p else None
    inputs = tuple(a[n] for n in ("x", *PARAMETERS[:4], "norm_weight", "norm_bias", "residual"))
    constants = (ACTIVATIONS.index("silu"), 1e-5, 0.5, p, False)
    torch.library.opcheck(torch.ops.lwft.adapter_forward.default, (*inputs, seed, *constants))
    out, hidden, mean, rstd = torch.ops.lwft.adapter_forward(*inputs, seed, *constants)
    alone = tuple(None if t is None else t.detach() for t in (*inputs, seed))  # no backward follows
    torch.library.opcheck(torch.ops.lwft.adapter_inference.default, (*alone, *constants))
    assert torch.equal(torch.ops.lwft.adapter_inference(*alone, *constants), out)
    saved = (
        a["x"],
        a["down_weight"],
        a["down_bias"],
        a["up_weight"],
        a["norm_weight"],
        a["norm_bias"],
        hidden,
        mean,
        rstd,
        seed,
    )
    saved = tuple(None if t is None else t.detach() for t in saved)
    for needs in (0b0011111, 0b0001010) if not norm else (0b1111111, 0b0100001):
        arguments = (torch.randn(12, 16), *saved, constants[0], 0.5, p, True, needs)
        torch.library.opcheck(torch.ops.lwft.adapter_backward.default, arguments)


def test_compile_and_export():
    module = lwft_kernels.nn.BottleneckAdapter(24, 6, "gelu", layer_norm=True)
    torch.nn.init.normal_(module.up.weight)
    x = torch.randn(2, 5, 24, requires_grad=True)
    parameters = [x, *module.parameters()]
    expected = module(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    compiled = torch.compile(module, fullgraph=True)(x)
    compiled_grads = torch.autograd.grad(compiled.square().sum(), parameters)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(compiled_grads, expected_grads)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({1: tokens},))
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(program.module()(x), module(x))


def test_compile_draws_dropout_anew():
    module = lwft_kernels.nn.BottleneckAdapter(64, 8, dropout=0.5)
    torch.nn.init.normal_(module.up.weight)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(9, 64)
    first, second = compiled(x) - x, compiled(x) - x
    assert not torch.equal(first == 0, second == 0)
    assert 0.3 < (first == 0).double().mean() < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    a = {n: t.detach().float() if isinstance(t, torch.Tensor) else t for n, t in make(9, 32, 8, norm=True).items()}
    a["x"].requires_grad_()
    a["down_weight"].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = ours(**{**a, "residual_is_x": True})
    cast = {n: t.to(dtype) if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    expected = ours(**{**cast, "residual_is_x": True})
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), (a["x"], a["down_weight"]))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("tokens", [7, 20])
def test_checkpoint_draws_the_same_dropout(tokens):
    module = lwft_kernels.nn.BottleneckAdapter(64, 16, dropout=0.4)
    torch.nn.init.normal_(module.up.weight)
    x = torch.randn(tokens, 64, requires_grad=True)
    results = []
    for run in (module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(x).square().sum(), (x, *module.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "tokens,d,m",
    [(3, 1024, 160), (130, 300, 24), (2300, 60, 5), (100, 1100, 64), (300, 770, 37), (2300, 100, 40)],
)
def test_same_bits_for_every_thread_count(tokens, d, m, norm, dtype):
    a = make(tokens, d, m, **{**EVERYTHING, "norm": norm})
    a = {n: t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    leaves = [t for t in a.values() if isinstance(t, torch.Tensor)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            out = ours(**a)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_nothing_wider_than_the_bottleneck_is_kept():
    a = {n: t.detach().float() for n, t in make(50, 96, 8, norm=True).items() if isinstance(t, torch.Tensor)}
    a = {n: t.requires_grad_() for n, t in a.items()}
    out = LF.adapter(**a, residual=a["x"], dropout_p=0.5)
    inputs = {t.data_ptr() for t in a.values()}
    kept = [t for t in out.grad_fn.saved_tensors if t is not None and t.data_ptr() not in inputs]
    assert max(t.numel() for t in kept) == 50 * 8


def test_counted():
    LF.adapter(**{n: t for n, t in make(2, 8, 4).items() if n != "residual_is_x"})
    assert lwft_kernels.stats()["adapter"] == {"fast": 1, "declined": {}}


def test_what_is_not_supported_says_so():
    a = {n: t.detach() for n, t in make(3, 8, 4).items() if isinstance(t, torch.Tensor)}
    x = a.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(LF.adapter(x, **a).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: LF.adapter(t, **a).sum())(x)


def ones(*shape, **options):
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"x": "text"}, TypeError, "x must be a Tensor"),
        ({"x": ones(3, 8, dtype=torch.int64)}, TypeError, "x must be float"),
        ({"x": ones(())}, ValueError, "x must have shape"),
        ({"x": ones(3, 0)}, ValueError, "last dimension of x is empty"),
        ({"down_weight": None}, TypeError, "down_weight must be a Tensor"),
        ({"down_weight": ones(4, 7)}, ValueError, "down_weight must have shape"),
        ({"down_weight": ones(0, 8)}, ValueError, "down_weight has no rows"),
        ({"down_weight": ones(4, 8, dtype=torch.float64)}, TypeError, "down_weight is torch.float64"),
        ({"down_weight": ones(4, 8, device="meta")}, ValueError, "down_weight is on meta"),
        ({"down_bias": ones(5)}, ValueError, "down_bias must have shape"),
        ({"down_bias": 1.0}, TypeError, "down_bias must be a Tensor"),
        ({"up_weight": None}, TypeError, "up_weight must be a Tensor"),
        ({"up_weight": ones(4, 8)}, ValueError, "up_weight must have shape"),
        (
            {"up_weight": ones(8, 4, dtype=torch.bfloat16)},
            TypeError,
            "up_weight is torch.bfloat16 but down_weight",
        ),
        ({"up_bias": ones(4)}, ValueError, "up_bias must have shape"),
        ({"norm_weight": ones(4)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": ones(8)}, ValueError, "norm_bias needs norm_weight"),
        ({"norm_weight": ones(8), "norm_bias": ones(7)}, ValueError, "norm_bias must have shape"),
        ({"residual": ones(8)}, ValueError, "residual must have shape"),
        ({"residual": ones(3, 8, dtype=torch.float64)}, TypeError, "residual is torch.float64"),
        ({"residual": ones(3, 8, device="meta")}, ValueError, "residual is on meta"),
        ({"activation": "softmax"}, ValueError, "activation must be one of relu"),
        ({"activation": torch.relu}, TypeError, "activation must be a string"),
        ({"eps": -1.0}, ValueError, "eps must be positive"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"scale": ones(1)}, TypeError, "scale must be a number"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {
        "x": ones(3, 8),
        "down_weight": ones(4, 8),
        "down_bias": ones(4),
        "up_weight": ones(8, 4),
        "up_bias": ones(8),
        **change,
    }
    with pytest.raises(error, match=words):
        LF.adapter(**arguments)
