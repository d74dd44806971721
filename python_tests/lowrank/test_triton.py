"""The low-rank ops' Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from low_rank_cases import INDICES, both, delta_arguments, lora_arguments, lora_delta, low_rank_arguments
from oracle import check_op, outputs_and_gradients, prepared

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.lowrank import triton_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# exact float32 products are the vendor's alone
IMPLEMENTATIONS = (
    ("fused", torch.bfloat16), ("fused", torch.float16), ("cublas", torch.float32), ("cublas", torch.bfloat16),
)  # fmt: skip
# tokens, d_in, d_out, rank: a single token, fewer than a tile, a block and a bit; one rank tile and two
SHAPES = ((1, 24, 33, 4), (19, 100, 72, 1), (70, 65, 130, 24), (3, 130, 24, 130))


def check(device, op, arguments, dtype, **options):
    on_device = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    check_op(*both(op), on_device, dtype, **options)
    assert sum(count["fast"] for count in lwft_kernels.stats().values()), lwft_kernels.stats()


@pytest.fixture(params=["fused", "cublas"])
def implementation(request, monkeypatch):
    """Who multiplies with the frozen weight."""
    depth = 1 << 30 if request.param == "fused" else 0
    monkeypatch.setattr(triton_op, "_CUBLAS_DEPTH", depth)
    return request.param


def by_implementation(test):
    """With the dtypes that each implementation is for."""
    return pytest.mark.parametrize("implementation, dtype", IMPLEMENTATIONS, indirect=["implementation"])(test)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_linear(triton_device, shape, dtype):
    check(triton_device, LF.low_rank_linear, low_rank_arguments(*shape), dtype)


@by_implementation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linear(triton_device, implementation, shape, dtype):
    check(triton_device, LF.lora_linear, lora_arguments(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_delta(triton_device, shape, dtype):
    check(triton_device, lora_delta, delta_arguments(*shape), dtype)


@by_implementation
def test_without_bias(triton_device, implementation, dtype):
    check(triton_device, LF.low_rank_linear, low_rank_arguments(19, 40, 72, 8, bias=False), dtype)
    check(triton_device, LF.lora_linear, lora_arguments(19, 40, 72, 8, bias=False), dtype)


@by_implementation
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_reference_dropout(triton_device, implementation, p, dtype):
    for tokens in (5, 70):
        check(triton_device, LF.lora_linear, lora_arguments(tokens, 133, 70, 8, dropout_p=p), dtype)
        check(triton_device, lora_delta, delta_arguments(tokens, 133, 70, 8, dropout_p=p), dtype)


def test_dropout_drops_the_same_elements(triton_device):
    """With A the identity, hidden shows every element of dropout(x)."""
    x, eye = torch.randn(70, 96, device=triton_device), torch.eye(96, device=triton_device)
    arguments = {"x": x, "lora_a": eye, "lora_b": eye, "dropout_p": 0.3}
    results = [op(base_out=torch.zeros_like(x), **arguments) for op in both(lora_delta)]
    assert torch.equal(results[0] == 0, results[1] == 0)
    assert 0.2 < (results[0] == 0).double().mean() < 0.4


@by_implementation
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_adapter_index(triton_device, implementation, index, p, dtype):
    options = {"adapter_index": torch.tensor(INDICES[index]), "dropout_p": p}
    check(triton_device, LF.lora_linear, lora_arguments(70, 100, 65, 4, **options), dtype)
    check(triton_device, lora_delta, delta_arguments(70, 100, 65, 4, **options), dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_adapter_of_infinities_stays_with_its_rows(triton_device, implementation):
    """Rows of another adapter in the same tile do not see it, nor does its gradient leave it."""
    arguments = prepared(lora_arguments(8, 24, 33, 4, adapter_index=torch.tensor([0, 1] * 4)), torch.bfloat16)
    arguments = {name: v.to(triton_device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    expected = outputs_and_gradients(LF.lora_linear, prepared(arguments, torch.bfloat16))
    for name in ("lora_a", "lora_b"):
        arguments[name].detach()[1] = float("inf")
    found = outputs_and_gradients(LF.lora_linear, prepared(arguments, torch.bfloat16))
    assert torch.equal(found["out0"][::2], expected["out0"][::2])
    assert torch.equal(found["dx"][::2], expected["dx"][::2])
    assert torch.equal(found["dlora_a"][::2], expected["dlora_a"][::2])
    assert not found["out0"][1::2].isfinite().any()


def test_rows_of_a_wrong_index_are_nan(triton_device, implementation):
    """Those of an index on the CPU are looked at before, so this goes past the checks."""
    shapes = (4, 24), (33, 24), (2, 4, 24), (2, 33, 4)
    x, weight, a, b = (torch.randn(*shape, dtype=torch.bfloat16, device=triton_device) for shape in shapes)
    index = torch.tensor([0, 2, -1, -2], device=triton_device)
    out, hidden = triton_op.lora_linear_forward(x, weight, None, a, b, index, None, 1.0, 0.0)
    for found in (out, hidden):
        assert found[1::2].isnan().all() and found[::2].isfinite().all()


def test_unused_adapters_get_zero_gradients(triton_device):
    a, b = (torch.randn(3, *shape, device=triton_device, requires_grad=True) for shape in ((4, 24), (40, 4)))
    x, weight = torch.randn(2, 24, device=triton_device), torch.randn(40, 24, device=triton_device)
    LF.lora_linear(x, weight, None, a, b, adapter_index=torch.tensor([1, -1], device=triton_device)).sum().backward()
    for grad in (a.grad, b.grad):
        assert grad[1].abs().min() > 0 and not grad[0].any() and not grad[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_float32_adapters_beside_16_bit_activations(triton_device, implementation, p, dtype):
    def with_float32(arguments, *names):
        return {**arguments, **{name: arguments[name].detach().float().requires_grad_() for name in names}}

    for tokens in (3, 70):
        keep = ("lora_a", "lora_b")
        arguments = with_float32(lora_arguments(tokens, 96, 130, 8, dropout_p=p), *keep)
        check(triton_device, LF.lora_linear, arguments, dtype, keep=frozenset(keep))
        arguments = with_float32(delta_arguments(tokens, 96, 130, 8, dropout_p=p), *keep)
        check(triton_device, lora_delta, arguments, dtype, keep=frozenset(keep))
        keep = ("down_weight", "up_weight", "bias")
        arguments = with_float32(low_rank_arguments(tokens, 96, 130, 8), *keep)
        check(triton_device, LF.low_rank_linear, arguments, dtype, keep=frozenset(keep))


@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_lora_delta_takes_any_mix_of_dtypes(triton_device, base, adapter, x):
    arguments = delta_arguments(30, 96, 130, 8, dropout_p=0.1)
    dtypes = {"base_out": base, "x": x, "lora_a": adapter, "lora_b": adapter}
    arguments |= {name: arguments[name].detach().to(dtype).requires_grad_() for name, dtype in dtypes.items()}
    check(triton_device, lora_delta, arguments, torch.float32, keep=frozenset(dtypes))


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("weight", "bias"), ("x", "lora_b")], ids=str)
@pytest.mark.parametrize("index", [None, "mixed"])
def test_some_gradients_only(triton_device, implementation, wanted, index):
    index = None if index is None else torch.tensor(INDICES[index])
    arguments = lora_arguments(70, 33, 70, 4, dropout_p=0.25, adapter_index=index)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.detach().requires_grad_(name in wanted)
    check(triton_device, LF.lora_linear, arguments, torch.bfloat16)


@pytest.mark.parametrize("wanted", ["x", "down_weight", "up_weight", "bias"])
def test_one_gradient_of_low_rank_linear(triton_device, wanted):
    arguments = low_rank_arguments(20, 33, 70, 4)
    for name, value in arguments.items():
        arguments[name] = value.detach().requires_grad_(name == wanted)
    check(triton_device, LF.low_rank_linear, arguments, torch.float32)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded", "narrowed"])
def test_strided_arguments(triton_device, implementation, view):
    base = torch.randn(4, 6, 48, dtype=torch.bfloat16)
    x = {
        "transposed": base.transpose(0, 1),
        "sliced": base[..., ::2],
        "expanded": base[:1].expand(4, 6, 48),
        "narrowed": base[..., 5:30],
    }[view]
    d = x.shape[-1]
    weight, part_of_a_larger_one = torch.randn(d, 33).T / d**0.5, torch.randn(40, d)[7:] / d**0.5
    a, b = torch.randn(d, 4).T / d**0.5, torch.randn(4, 33).T
    for w in (weight, part_of_a_larger_one):
        arguments = {"x": x, "weight": w, "bias": None, "lora_a": a, "lora_b": b}
        arguments = {n: v if v is None else v.to(triton_device).requires_grad_() for n, v in arguments.items()}
        check_op(*both(LF.lora_linear), arguments, torch.bfloat16)


def test_strided_gradient(triton_device):
    """Of a transposed result, and one expanded from a single number."""
    x, a, b = (torch.randn(*shape, device=triton_device, requires_grad=True) for shape in ((9, 24), (4, 24), (40, 4)))
    direction = torch.randn(40, 9, device=triton_device)
    for loss in (lambda out: (out.T * direction).sum(), lambda out: out.sum()):
        ours = torch.autograd.grad(loss(LF.low_rank_linear(x, a, b)), (x, a, b))
        expected = torch.autograd.grad(loss(x @ a.T @ b.T), (x, a, b))
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_in_place_on_rows_of_a_larger_matrix(triton_device):
    """What stands beside them is left alone."""
    x, a, b = (torch.randn(*shape, device=triton_device) for shape in ((9, 24), (4, 24), (33, 4)))
    whole = torch.randn(9, 50, device=triton_device)
    before = whole.clone()
    LF.lora_delta_(whole[:, 7:40], x, a, b, scale=0.5)
    torch.testing.assert_close(whole[:, 7:40], before[:, 7:40] + 0.5 * x @ a.T @ b.T)
    assert torch.equal(whole[:, :7], before[:, :7]) and torch.equal(whole[:, 40:], before[:, 40:])


def test_in_place_on_what_x_is_a_view_of(triton_device):
    whole = torch.randn(20, 24, device=triton_device)
    a, b = torch.randn(4, 24, device=triton_device), torch.randn(24, 4, device=triton_device)
    expected = whole[1:] + whole[:-1] @ a.T @ b.T
    LF.lora_delta_(whole[1:], whole[:-1], a, b)
    torch.testing.assert_close(whole[1:], expected)


def test_no_tokens(triton_device, implementation):
    check(triton_device, LF.low_rank_linear, low_rank_arguments(0, 24, 33, 4), torch.bfloat16)
    check(triton_device, LF.lora_linear, lora_arguments(0, 24, 33, 4, dropout_p=0.1), torch.bfloat16)
    check(triton_device, lora_delta, delta_arguments(0, 24, 33, 4), torch.bfloat16)


@pytest.mark.parametrize("index", [None, "mixed"])
def test_twice_the_same_bits(triton_device, implementation, monkeypatch, index):
    """Also where the sums over columns and over tokens are cut into many parts."""
    monkeypatch.setattr(triton_op, "_SLICE_COLUMNS", 128)
    index = None if index is None else torch.tensor(INDICES[index] * 2)
    arguments = lora_arguments(140, 200, 70, 8, dropout_p=0.1, adapter_index=index)
    check(triton_device, LF.lora_linear, arguments, torch.bfloat16)
    arguments = {n: v.to(triton_device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    arguments = prepared(arguments, torch.bfloat16)
    first, second = (outputs_and_gradients(both(LF.lora_linear)[0], arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("depth, dtype, expected", [
    (4095, torch.bfloat16, ["fused", "cublas"]),
    (4096, torch.float16, ["cublas", "fused"]),
    (64, torch.float32, ["cublas"]),
])  # fmt: skip
def test_who_multiplies_with_the_frozen_weight(triton_device, monkeypatch, depth, dtype, expected):
    """By the rule; what LWFT_AUTOTUNE=full has measured and kept comes before it."""
    asked = []

    def launch_one_of(name, implementations, *, device, band):
        asked.append((name, list(implementations)))
        return next(iter(implementations.values()))()

    monkeypatch.setattr(triton_op, "launch_one_of", launch_one_of)
    x, weight = (torch.zeros(*shape, dtype=dtype, device=triton_device) for shape in ((1, depth), (8, depth)))
    a, b = (torch.zeros(*shape, dtype=dtype, device=triton_device) for shape in ((4, depth), (8, 4)))
    LF.lora_linear(x, weight, None, a, b)
    assert asked == [("lora_linear_forward", expected)]


def test_declines(triton_device):
    x, a, b = (torch.randn(*shape, dtype=torch.float64, device=triton_device) for shape in ((2, 8), (4, 8), (5, 4)))
    with pytest.raises(RuntimeError, match="float64 goes to the reference"):
        LF.low_rank_linear(x, a, b)
