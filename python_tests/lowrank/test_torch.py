"""Every way PyTorch may call the low-rank ops: opcheck, compile, export, autocast, checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF

pytestmark = pytest.mark.usefixtures("native")


def low_rank(x, weight, bias, a, b):
    return LF.low_rank_linear(x, a, b, bias)


def lora(x, weight, bias, a, b, **options):
    return LF.lora_linear(x, weight, bias, a, b, **options)


def delta(x, weight, bias, a, b, **options):
    """The base result is no leaf: in place, autograd goes through it."""
    return LF.lora_delta_(F.linear(x, weight, bias), x, a, b, **options)


OPS = [low_rank, lora, delta]


def arguments(tokens=6, d_in=24, d_out=40, rank=4, adapters=()):
    shapes = ((tokens, d_in), (d_out, d_in), (d_out,), (*adapters, rank, d_in), (*adapters, d_out, rank))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


# ---- opcheck ----


def detached(*values):
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in values)


def test_opcheck_low_rank_linear():
    x, _, bias, a, b = arguments()
    op = torch.ops.lwft
    torch.library.opcheck(op.low_rank_linear_forward.default, (x, a, b, bias))
    out, hidden = op.low_rank_linear_forward(x, a, b, bias)
    for needs in (0b1111, 0b0101):
        inputs = detached(torch.randn_like(out), x, a, b, hidden, needs)
        torch.library.opcheck(op.low_rank_linear_backward.default, inputs)


def test_inference_ops_are_the_forward_ops():
    """Called where no gradient is wanted: they keep nothing, and are no other numbers."""
    x, weight, bias, a, b = detached(*arguments())
    for name, values in (
        ("low_rank_linear", (x, a, b, bias)),
        ("lora_linear", (x, weight, bias, a, b, *[None] * 2, 0.5, 0.0)),
    ):
        inference, forward = (
            getattr(torch.ops.lwft, f"{name}_{suffix}").default for suffix in ("inference", "forward")
        )
        torch.library.opcheck(inference, values)
        assert torch.equal(inference(*values), forward(*values)[0])


@pytest.mark.parametrize("op", [low_rank, lora])
def test_fake_tensors_where_no_gradient_is_wanted(op):
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [mode.from_tensor(value) for value in detached(*arguments())]
        assert isinstance(out := op(*fakes), FakeTensor)
        assert out.shape == (6, 40)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_lora(stacked, dtype):
    x, weight, bias, a, b = arguments(adapters=(3,) if stacked else ())
    x, weight, bias = (value.detach().to(dtype).requires_grad_() for value in (x, weight, bias))
    index = torch.tensor([0, 2, 2, -1, 0, 2]) if stacked else None
    options = (index, torch.tensor([3, 5]), 0.5, 0.2)
    op = torch.ops.lwft
    torch.library.opcheck(op.lora_linear_forward.default, (x, weight, bias, a, b, *options))
    out, hidden = op.lora_linear_forward(x, weight, bias, a, b, *options)
    for needs in (0b11111, 0b01001):
        inputs = detached(torch.randn_like(out), x, weight, a, b, hidden, *options, needs)
        torch.library.opcheck(op.lora_linear_backward.default, inputs)

    base_out = torch.randn_like(out)
    torch.library.opcheck(op.lora_delta_forward.default, (base_out.requires_grad_(), x, a, b, *options))
    torch.library.opcheck(op.lora_delta_forward_.default, detached(base_out, x, a, b, *options))
    inputs = detached(torch.randn_like(out), x, a, b, hidden, *options, 0b111)
    torch.library.opcheck(op.lora_delta_backward.default, inputs)


def test_nothing_is_recorded_below_autograd():
    x, weight, bias, a, b = arguments()
    out = LF.lora_linear(x, weight, bias, a, b)
    sources = [node.name() for node, _ in out.grad_fn.next_functions if node is not None]
    assert sources == ["torch::autograd::AccumulateGrad"] * 5  # one node from the leaves to out
    grads = torch.autograd.grad(out.sum(), (x, weight, bias, a, b))
    assert not any(grad.requires_grad for grad in grads)
    with torch.no_grad():
        assert not LF.lora_linear(x, weight, bias, a, b).requires_grad
        base = torch.zeros(6, 40)
        version = base._version
        assert not LF.lora_delta_(base, x, a, b).requires_grad and base._version > version


# ---- compile, export ----


def test_compile():
    inputs = arguments(tokens=10, adapters=(2,))
    index = torch.tensor([1, -1])

    def all_ops(x, weight, bias, a, b):
        rows = x.view(2, 5, 24)
        first = lora(rows, weight, bias, a, b, scale=0.5, adapter_index=index)
        base = low_rank(rows, weight, bias, a[0], b[0])
        return (
            first,
            delta(rows, weight, bias, a[1], b[1], scale=0.5),
            LF.lora_delta_(base.clone(), rows, a[1], b[1]),
        )

    def results(function):
        outs = function(*inputs)
        return (*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs))

    for compiled, eager in zip(results(torch.compile(all_ops, fullgraph=True)), results(all_ops), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compile_draws_dropout():
    x, _, _, a, b = arguments(tokens=50, d_in=64)

    def branch(x):
        return LF.lora_delta_(torch.zeros(50, 40), x, a, b, dropout_p=0.5)

    compiled = torch.compile(branch, fullgraph=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert 0.3 < (grad == 0).double().mean() < 0.7


def test_compile_mutates_an_input():
    x, _, _, a, b = detached(*arguments())
    base = torch.randn(6, 40)
    expected = base + x @ a.T @ b.T
    out = torch.compile(lambda base: LF.lora_delta_(base, x, a, b), fullgraph=True)(base)
    torch.testing.assert_close(base, expected)
    torch.testing.assert_close(out, expected)


def test_export_with_a_dynamic_token_dimension():
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora = lwft_kernels.nn.LoRALinear(24, 24, rank=4)
            self.low_rank = lwft_kernels.nn.LowRankLinear(24, 40, rank=4)

        def forward(self, x):
            return LF.lora_delta_(self.low_rank(self.lora(x)), x, self.lora.lora_a, self.low_rank.up_weight)

    module = Layers().eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (torch.randn(2, 5, 24),), dynamic_shapes=({1: tokens},))
    for length in (9, 30):
        x = torch.randn(2, length, 24)
        torch.testing.assert_close(program.module()(x), module(x))


# ---- autocast, checkpoint ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast(op, dtype):
    """float32 parameters and activations, as a model hands them over."""
    inputs = arguments(tokens=20)
    x, weight, bias, a, b = inputs
    with torch.autocast("cpu", dtype=dtype):
        out = op(*inputs)
        middle = F.linear(F.linear(x, a), b)
        expected = middle + bias.to(dtype) if op is low_rank else F.linear(x, weight, bias) + middle
    assert out.dtype == expected.dtype == dtype
    used = [value for value in inputs if op is not low_rank or value is not weight]
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.05)
    ours = torch.autograd.grad(out.float().square().sum(), used)
    theirs = torch.autograd.grad(expected.float().square().sum(), used)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.05 * other.norm()


def test_autocast_takes_mixed_inputs():
    x, weight, bias, a, b = detached(*arguments())
    with torch.autocast("cpu", dtype=torch.float16):
        out = LF.lora_linear(x.bfloat16(), weight, bias.half(), a.bfloat16(), b.bfloat16())
        assert out.dtype == torch.float16
        out = LF.low_rank_linear(x.bfloat16(), a.bfloat16(), b.bfloat16(), bias)
        assert out.dtype == torch.float16
        base_out = F.linear(x, weight)
        assert LF.lora_delta_(base_out, x, a.bfloat16(), b.bfloat16()) is base_out


@pytest.mark.parametrize("op", [lora, delta])
def test_checkpoint_draws_the_same_dropout(op):
    inputs = arguments(tokens=30)

    def layer(*values):
        return op(*values, dropout_p=0.4)

    results = []
    for run in (layer, lambda *values: checkpoint(layer, *values, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# ---- lora_delta_ in place ----


def test_delta_returns_its_base():
    x, weight, bias, a, b = arguments()
    base_out = F.linear(x, weight, bias)
    assert LF.lora_delta_(base_out, x, a, b) is base_out
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use", ["returned", "written"])
def test_delta_on_a_batch(use, bias):
    """With a bias, `F.linear` gives a view of its product: autograd must see the change through either."""
    x, weight, b0, a, b = arguments(tokens=12)
    rows = x.view(3, 4, 24)
    base_out = F.linear(rows, weight, b0 if bias else None)
    returned = LF.lora_delta_(base_out, rows, a, b)
    expected = F.linear(rows, weight, b0 if bias else None) + rows @ a.T @ b.T
    assert returned.data_ptr() == base_out.data_ptr() and torch.equal(returned, base_out)
    torch.testing.assert_close(returned, expected)
    ours = torch.autograd.grad((returned if use == "returned" else base_out).square().sum(), (x, weight, a, b))
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight, a, b))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()
    if use == "returned":
        assert "Slices" not in repr(returned.grad_fn.next_functions)


def test_delta_on_a_base_that_needs_no_gradient():
    x, weight, bias, a, b = arguments()
    base_out = F.linear(x, weight, bias).detach()
    out = LF.lora_delta_(base_out, x, a, b)
    assert out is base_out and base_out.requires_grad
    torch.autograd.grad(out.sum(), (x, a, b))


@pytest.mark.parametrize("layout", ["part of a fused result", "transposed", "columns", "channels first"])
def test_delta_on_views(layout):
    """Written in place where rows lie in memory one after another, through a copy where they do not."""
    x, _, _, a, b = arguments(tokens=12)
    fused = torch.randn(3, 4, 120, requires_grad=True)
    x = x.view(3, 4, 24)

    def run(inplace):
        base = fused * 1.0
        view, rows = base[..., 40:80], x
        if layout == "transposed":
            view, rows = view.transpose(0, 1), x.transpose(0, 1)
        elif layout == "columns":
            view = base[..., ::3]
        elif layout == "channels first":
            base = (fused[..., :40] * 1.0).permute(0, 2, 1).contiguous()
            view = base.permute(0, 2, 1)
        if inplace:
            LF.lora_delta_(view, rows, a, b)
        else:
            view.add_(rows @ a.T @ b.T)
        return base, torch.autograd.grad(base.square().sum(), (fused, x, a, b))

    (ours, our_grads), (expected, grads) = run(True), run(False)
    for mine, theirs in zip((ours, *our_grads), (expected, *grads), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_delta_reads_x_before_it_writes():
    square = torch.randn(20, 40)
    a, b = torch.randn(4, 40), torch.randn(40, 4)
    expected = square + square @ a.T @ b.T
    torch.testing.assert_close(LF.lora_delta_(square, square, a, b), expected)


def test_delta_invalidates_what_was_saved():
    x, weight, _, a, b = arguments()
    base_out = F.linear(x, weight).exp()  # exp keeps its result for backward
    LF.lora_delta_(base_out, x, a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        base_out.sum().backward()


def test_delta_refuses_what_cannot_be_written():
    x, _, _, a, b = detached(*arguments())
    leaf = torch.zeros(6, 40, requires_grad=True)
    for base_out in (leaf, leaf[:], leaf.view(3, 2, 40)):
        with pytest.raises(ValueError, match=r"lora_delta_: base_out is a leaf"):
            LF.lora_delta_(base_out, x.view(*base_out.shape[:-1], 24), a, b)
    assert not leaf.any()
    with pytest.raises(ValueError, match=r"lora_delta_: base_out is expanded"):
        LF.lora_delta_(torch.zeros(1, 40).expand(6, 40), x, a, b)
    with torch.no_grad():
        assert LF.lora_delta_(leaf, x, a, b).any()


# ---- what is not supported ----


@pytest.mark.parametrize("op", OPS)
def test_no_second_derivative(op):
    inputs = arguments()
    (grad,) = torch.autograd.grad(op(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_no_functional_transforms(op):
    x, *rest = detached(*arguments())
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: op(x, *rest).sum())(x)


# ---- errors ----

BAD_FACTORS = [
    ({"down": "text"}, TypeError, "{down} must be a Tensor"),
    ({"down": torch.ones(4, 24, dtype=torch.int32)}, TypeError, "{down} must be float"),
    (
        {"down": torch.ones(4, 23)},
        ValueError,
        r"{down} must have shape .*rank, d_in.* = \(4, 24\), got \(4, 23\)",
    ),
    ({"down": torch.ones(24)}, ValueError, "{down} must have shape"),
    ({"down": torch.ones(0, 24), "up": torch.ones(40, 0)}, ValueError, "{down} of shape .* has rank 0"),
    (
        {"down": torch.ones(4, 24).bfloat16(), "up": torch.ones(40, 4).bfloat16()},
        TypeError,
        "{down} is torch.bfloat16",
    ),
    ({"down": torch.ones(4, 24, device="meta")}, ValueError, "{down} is on meta"),
    (
        {"up": torch.ones(40, 5)},
        ValueError,
        r"{up} must have shape .*d_out, rank.* = \(40, 4\), got \(40, 5\)",
    ),
    ({"up": torch.ones(4)}, ValueError, "{up} must have shape"),
    ({"up": torch.ones(40, 4, dtype=torch.float64)}, TypeError, "{up} is torch.float64 but {down} is"),
    ({"up": None}, TypeError, "{up} must be a Tensor, got NoneType"),
]
BAD_X = [
    ({"x": 3.0}, TypeError, "x must be a Tensor, got float"),
    ({"x": torch.ones(6, 24, dtype=torch.int64)}, TypeError, "x must be float"),
    ({"x": torch.ones(())}, ValueError, "x must have shape"),
    ({"x": torch.ones(6, 0)}, ValueError, "the last dimension of x is empty"),
]
BAD_OPTIONS = [
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"scale": "1"}, TypeError, "scale must be a number"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability"),
    ({"lora_a": torch.ones(2, 4, 24)}, ValueError, "lora_a is stacked .* pass adapter_index"),
    (
        {"adapter_index": torch.zeros(6, dtype=torch.int64)},
        ValueError,
        r"lora_a must have shape \(n, rank, d_in\)",
    ),
]
STACKED = {"lora_a": torch.ones(2, 4, 24), "lora_b": torch.ones(2, 40, 4)}
BAD_INDICES = [
    ([0] * 6, TypeError, "adapter_index must be a Tensor"),
    (torch.zeros(6), TypeError, "adapter_index must be int64 or int32"),
    (
        torch.zeros(5, dtype=torch.int64),
        ValueError,
        r"adapter_index must have shape \(B,\) = \(6\), got \(5,\)",
    ),
    (
        torch.tensor([0, 0, 2, 0, 0, 0]),
        ValueError,
        "adapter_index must lie between -1 .* and 1, got values from 0 to 2",
    ),
    (torch.tensor([0, 0, -2, 0, 0, 0]), ValueError, "adapter_index must lie between"),
]


@pytest.mark.parametrize(
    "change,error,words",
    [
        *BAD_X,
        *BAD_FACTORS,
        ({"bias": torch.ones(41)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(40).double()}, TypeError, "bias is torch.float64"),
        ({"bias": torch.ones(40, device="meta")}, ValueError, "bias is on meta"),
    ],
)
def test_low_rank_linear_errors_name_the_argument(change, error, words):
    good = {
        "x": torch.ones(6, 24),
        "down_weight": torch.ones(4, 24),
        "up_weight": torch.ones(40, 4),
        "bias": None,
    }
    names = {"down": "down_weight", "up": "up_weight"}
    bad = good | {names.get(name, name): value for name, value in change.items()}
    with pytest.raises(error, match="low_rank_linear: " + words.format(**names)):
        LF.low_rank_linear(**bad)


@pytest.mark.parametrize(
    "change,error,words",
    [
        *BAD_X,
        *BAD_FACTORS,
        *BAD_OPTIONS,
        ({"weight": torch.ones(40, 23)}, ValueError, r"weight must have shape \(d_out, d_in\) = \(40, 24\)"),
        ({"weight": torch.ones(40, 24).bfloat16()}, TypeError, "weight is torch.bfloat16 but x is"),
        ({"weight": torch.ones(40, 24, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": torch.ones(41)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(40).half()}, TypeError, "bias is torch.float16"),
        *((STACKED | {"adapter_index": index}, error, words) for index, error, words in BAD_INDICES),
    ],
)
def test_lora_linear_errors_name_the_argument(change, error, words):
    good = {"x": torch.ones(6, 24), "weight": torch.ones(40, 24), "bias": None}
    good |= {"lora_a": torch.ones(4, 24), "lora_b": torch.ones(40, 4)}
    names = {"down": "lora_a", "up": "lora_b"}
    bad = good | {names.get(name, name): value for name, value in change.items()}
    with pytest.raises(error, match="lora_linear: " + words.format(**names)):
        LF.lora_linear(**bad)


@pytest.mark.parametrize(
    "change,error,words",
    [
        *BAD_X,
        *(case for case in BAD_FACTORS if "bfloat16" not in case[2]),
        *BAD_OPTIONS,
        (
            {"base_out": torch.ones(5, 40)},
            ValueError,
            r"base_out must have shape .* = \(6, 40\), got \(5, 40\)",
        ),
        ({"base_out": torch.ones(6, 0)}, ValueError, "the last dimension of base_out is empty"),
        (
            {"base_out": torch.ones(6, 40).double()},
            TypeError,
            "x is torch.float32 but base_out is torch.float64",
        ),
        ({"base_out": torch.ones(6, 40, device="meta")}, ValueError, "base_out is on meta"),
        *((STACKED | {"adapter_index": index}, error, words) for index, error, words in BAD_INDICES),
    ],
)
def test_lora_delta_errors_name_the_argument(change, error, words):
    good = {"base_out": torch.ones(6, 40), "x": torch.ones(6, 24)}
    good |= {"lora_a": torch.ones(4, 24), "lora_b": torch.ones(40, 4)}
    names = {"down": "lora_a", "up": "lora_b"}
    bad = good | {names.get(name, name): value for name, value in change.items()}
    with pytest.raises(error, match="lora_delta_: " + words.format(**names)):
        LF.lora_delta_(**bad)


def test_the_op_itself_refuses_an_index_out_of_range():
    """What functional leaves to the kernel while torch.compile traces."""
    x, weight, bias, a, b = detached(*arguments(adapters=(2,)))
    for index in (2, -2):
        with pytest.raises(RuntimeError):
            torch.ops.lwft.lora_linear_forward(x, weight, bias, a, b, torch.full((6,), index), None, 1.0, 0.0)
