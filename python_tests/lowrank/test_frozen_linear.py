"""frozen_linear against the float64 oracle, and every way PyTorch may call it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from low_rank_cases import randn
from oracle import check_op
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.lowrank import frozen

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# d_in, d_out; a product of ours takes the larger ones, where the processor has one
SHAPES = ((256, 768), (768, 256), (333, 320), (320, 333), (24, 40), (1, 17))
ROWS = (0, 1, 7, 64, 130, 300)

native = pytest.mark.usefixtures("native")
needs_own_product = pytest.mark.skipif(
    not frozen.is_own(torch.float32, 1024, 1024, 1024), reason="this processor has no float32 product of ours"
)


def frozen_arguments(rows, d_in, d_out, *, bias=True, requires_grad=True):
    return {
        "x": randn(rows, d_in, seed=1).requires_grad_(requires_grad),
        "weight": randn(d_out, d_in, seed=2) / d_in**0.5,
        "bias": randn(d_out, seed=3) if bias else None,
    }


def tensors(rows=130, d_in=256, d_out=512, bias=True):
    arguments = frozen_arguments(rows, d_in, d_out, bias=bias)
    return [None if v is None else v.detach().float() for v in arguments.values()]


def count(op="frozen_linear"):
    return lwft_kernels.stats().get(op, {"fast": 0})["fast"]


# ---- numbers ----


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, dtype):
    for rows in ROWS:
        for bias in (True, False):
            arguments = frozen_arguments(rows, *shape, bias=bias)
            check_op(LF.frozen_linear, F.linear, arguments, dtype, note=f"{rows} rows, bias {bias}")
    assert count() >= 2 * len(ROWS)


@native
def test_without_a_gradient():
    arguments = frozen_arguments(130, 256, 512, requires_grad=False)
    check_op(LF.frozen_linear, F.linear, arguments, torch.float32)
    with torch.no_grad():
        x, weight, bias = tensors()
        trained = weight.clone().requires_grad_()
        assert torch.equal(LF.frozen_linear(x, trained, bias), LF.frozen_linear(x, weight, bias))
    assert not LF.frozen_linear(x, weight, bias).requires_grad


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape[0], -1),
    "three dimensions, permuted": lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1),
    "one row without a batch": lambda x: x[0],
}


@native
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(view):
    def viewed(x, weight, bias):
        return LF.frozen_linear(VIEWS[view](x), weight, bias)

    def plain(x, weight, bias):
        return F.linear(VIEWS[view](x), weight, bias)

    check_op(viewed, plain, frozen_arguments(160, 256, 512), torch.float32)


@native
def test_strided_weights_bias_and_output_gradient():
    def call(op):
        def strided(x, weight, bias):
            twice = torch.stack((bias, bias), 1)[:, 0]
            rows = op(x, torch.cat((weight, weight), 1)[:, : weight.shape[1]], twice)
            columns = op(x, weight.t().contiguous().t(), bias)
            return rows.transpose(0, 1), columns[:, ::2], op(x, weight, bias).sum(0)

        return strided

    check_op(call(LF.frozen_linear), call(F.linear), frozen_arguments(160, 256, 512), torch.float32)


@native
@pytest.mark.parametrize("rows", [64, 130, 700])
def test_same_bits_for_every_thread_count(rows):
    x, weight, bias = tensors(rows, 320, 1104)
    x.requires_grad_()
    own = frozen.is_own(torch.float32, rows, 320, 1104)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 8, 1):
            torch.set_num_threads(number)
            out = LF.frozen_linear(x, weight, bias)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    if own:  # else the bits are the vendor's
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], results[-1][0])


# ---- who computes ----


@needs_own_product
@pytest.mark.usefixtures("small_calls")
def test_large_calls_are_ours_and_small_ones_torchs():
    x, weight, bias = tensors()
    ours = LF.frozen_linear(x, weight, bias)
    assert count() == 1 and not torch.equal(ours, F.linear(x, weight, bias))  # another order of sums
    few = x[:3]
    assert torch.equal(LF.frozen_linear(few, weight, bias), F.linear(few, weight, bias))
    assert lwft_kernels.stats()["frozen_linear"] == {"fast": 1, "declined": {lwft_kernels.backend.SMALL: 1}}


@needs_own_product
def test_trained_weights_are_torchs():
    x, weight, bias = tensors()
    for trained in (weight, bias):
        trained.requires_grad_()
        ours, theirs = LF.frozen_linear(x, weight, bias), F.linear(x, weight, bias)
        assert torch.equal(ours, theirs)
        gradient, expected = (torch.autograd.grad(out.square().sum(), trained)[0] for out in (ours, theirs))
        assert torch.equal(gradient, expected)
        trained.requires_grad_(False)
    declined = lwft_kernels.stats()["frozen_linear"]["declined"]
    assert declined == {"the weight or the bias wants a gradient": 2}


@needs_own_product
def test_autocast_is_torchs():
    x, weight, bias = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LF.frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    assert list(lwft_kernels.stats()["frozen_linear"]["declined"].values()) == [1]


def test_other_backends_are_torchs():
    x, weight, bias = tensors()
    for name in ("reference", "triton"):
        with lwft_kernels.use_backend(name):
            assert torch.equal(LF.frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    assert count() == 0


def test_native_raises_for_what_it_cannot_serve():
    x, weight, bias = tensors()
    with lwft_kernels.use_backend("native"), pytest.raises(RuntimeError, match="wants a gradient"):
        LF.frozen_linear(x, weight.requires_grad_(), bias)


class Subclass(torch.Tensor):
    pass


@needs_own_product
def test_subclasses_and_nested_tensors_are_torchs():
    x, weight, bias = tensors()
    assert type(LF.frozen_linear(x.as_subclass(Subclass), weight, bias)) is Subclass
    assert type(LF.frozen_linear(x, weight.as_subclass(Subclass), bias)) is Subclass
    nested = torch.nested.nested_tensor([x, x[:100]])
    expected = F.linear(nested, weight, bias).unbind()
    for one, other in zip(LF.frozen_linear(nested, weight, bias).unbind(), expected, strict=True):
        assert torch.equal(one, other)
    assert count() == 0


# ---- wrong arguments ----


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(130, 255)}, ValueError, r"weight must have shape \(d_out, d_in\) = \(any, 255\)"),
        ({"x": torch.ones(130, 256).double()}, TypeError, "weight is torch.float32 but x is torch.float64"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"bias": torch.ones(511)}, ValueError, r"bias must have shape \(d_out,\) = \(512\)"),
        ({"bias": torch.ones(512).bfloat16()}, TypeError, "bias is torch.bfloat16 but x is torch.float32"),
        ({"x": torch.ones(130, 256, device="meta")}, ValueError, "weight is on cpu but x is on meta"),
    ],
)
def test_wrong_arguments(change, error, message, backend):
    arguments = dict(zip(("x", "weight", "bias"), tensors(), strict=True)) | change
    with lwft_kernels.use_backend(backend), pytest.raises(error, match=message):
        LF.frozen_linear(**arguments)


@native
def test_the_op_itself_refuses_what_it_has_no_gradient_for():
    x, weight, bias = tensors()
    op = torch.ops.lwft
    for trained in (weight, bias):
        trained.requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient for weight and bias"):
            op.frozen_linear_forward(x, weight, bias)
        trained.requires_grad_(False)
    with pytest.raises(RuntimeError, match="do not go together"):
        op.frozen_linear_forward(x, weight.t().contiguous(), bias)
    with pytest.raises(RuntimeError, match="do not go together"):
        op.frozen_linear_backward(x, weight)


# ---- autograd, compile, export ----


@native
@pytest.mark.parametrize("shape", [(6, 24, 40), (130, 256, 512)], ids=str)
def test_opcheck(shape):
    x, weight, bias = tensors(*shape)
    op = torch.ops.lwft
    torch.library.opcheck(op.frozen_linear_forward.default, (x.requires_grad_(), weight, bias))
    torch.library.opcheck(op.frozen_linear_forward.default, (x.detach(), weight, None))
    torch.library.opcheck(op.frozen_linear_backward.default, (torch.randn(shape[0], shape[2]), weight))


@native
def test_gradcheck_and_the_second_derivative():
    x, weight, bias = frozen_arguments(3, 5, 4).values()
    assert torch.autograd.gradcheck(LF.frozen_linear, (x, weight, bias))
    assert torch.autograd.gradgradcheck(LF.frozen_linear, (x, weight, bias))


@native
def test_only_the_weight_is_kept():
    x, weight, bias = tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LF.frozen_linear(x.requires_grad_(), weight, bias)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


@native
def test_checkpoint():
    x, weight, bias = tensors()
    x.requires_grad_()
    (plain,) = torch.autograd.grad(LF.frozen_linear(x, weight, bias).square().sum(), x)
    out = checkpoint(LF.frozen_linear, x, weight, bias, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], plain)


@native
def test_torch_func_is_torchs():
    x, weight, bias = tensors()
    with lwft_kernels.use_backend("auto"):
        mapped = torch.vmap(lambda rows: LF.frozen_linear(rows, weight, bias))(x.view(2, 65, 256))
    torch.testing.assert_close(mapped.flatten(0, 1), F.linear(x, weight, bias))


@needs_own_product
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    _, weight, bias = tensors()
    targets = []

    def inspecting(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def both(x):
        return LF.frozen_linear(x, weight, bias).sin() + LF.frozen_linear(x, weight)

    torch.compile(both, fullgraph=True, dynamic=dynamic, backend=inspecting)(tensors()[0])
    assert sum("frozen_linear_forward" in target for target in targets) == 2
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for rows in (130, 200):
        x = tensors(rows)[0].requires_grad_()
        ours, theirs = compiled(x), both(x)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_compile_of_trained_weights():
    x, weight, bias = tensors()
    weight.requires_grad_()
    compiled = torch.compile(LF.frozen_linear, fullgraph=True)
    for out in (compiled(x, weight, bias), LF.frozen_linear(x, weight, bias)):
        expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), weight)[0]
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), weight)[0], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_token_dimension(strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, self.weight, self.bias = tensors()

        def forward(self, x):
            return LF.frozen_linear(x, self.weight, self.bias)

    module, tokens = Layer(), torch.export.Dim("tokens", min=64, max=512)
    shapes = ({1: tokens},)
    program = torch.export.export(module, (torch.randn(2, 100, 256),), dynamic_shapes=shapes, strict=strict)
    for length in (70, 300):
        x = torch.randn(2, length, 256)
        torch.testing.assert_close(program.module()(x), module(x))
