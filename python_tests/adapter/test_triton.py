"""adapter's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from guarded import guarded
from oracle import check_op, outputs_and_gradients, prepared

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.adapter import triton_op
from lwft_kernels.adapter.functional import ACTIVATIONS
from lwft_kernels.triton import cards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
EVERYTHING = {"norm": True, "residual": "x", "activation": "gelu", "scale": 0.7, "dropout_p": 0.3}


def make(device, tokens, d, m, *, norm=False, residual=None, without=(), **options):
    """Arguments for `ours`; residual is None, "x" or "other", `without` names parameters to leave out."""
    generator = torch.Generator().manual_seed(tokens * 1000 + d * 10 + m + 1)

    def normal(*shape, scale=1.0, shift=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * scale + shift).to(device).requires_grad_()

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


def ours(*, residual_is_x=False, **arguments):
    torch.manual_seed(0)
    if residual_is_x:
        arguments["residual"] = arguments["x"]
    return LF.adapter(**arguments)


def reference(**arguments):
    with lwft_kernels.use_backend("reference"):
        return ours(**arguments)


@pytest.fixture
def small_card(monkeypatch):
    """As if the card had four multiprocessors: several splits of d and parts of the tokens, yet few programs."""
    card = dataclasses.replace(cards.CLASSES[2], multiprocessors=4)
    monkeypatch.setattr(triton_op, "card_of", lambda device: card)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 16, 37])
@pytest.mark.parametrize("tokens, d", [(1, 33), (3, 64), (70, 200)])
def test_accuracy(triton_device, tokens, d, m, dtype):
    plain = make(triton_device, tokens, d, m, activation="tanh")
    check_op(ours, reference, plain, dtype, note="plain")
    check_op(ours, reference, make(triton_device, tokens, d, m, **EVERYTHING), dtype, note="everything")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(triton_device, activation, dtype):
    check_op(ours, reference, make(triton_device, 9, 50, 21, activation=activation), dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [None, "x", "other"])
@pytest.mark.parametrize("without", [(), ("down_bias",), ("up_bias",), ("down_bias", "up_bias", "norm_bias")], ids=str)
def test_without_optional_parts(triton_device, without, residual, norm):
    arguments = make(triton_device, 7, 65, 12, norm=norm, residual=residual, without=without)
    check_op(ours, reference, arguments, torch.float32)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("d", [7, 64, 133])
def test_dropout_is_the_reference_dropout(triton_device, d, p):
    arguments = make(triton_device, 6, d, 8, dropout_p=p, scale=-1.5)
    check_op(ours, reference, arguments, torch.float32)
    zeros = [ours(**prepared(arguments, torch.float32)) == 0, reference(**prepared(arguments, torch.float32)) == 0]
    assert torch.equal(*zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_16_bit_activations(triton_device, dtype):
    arguments = make(triton_device, 29, 96, 24, **EVERYTHING)
    for name in PARAMETERS:
        arguments[name] = arguments[name].detach().float().requires_grad_()
    check_op(ours, reference, arguments, dtype, keep=frozenset(PARAMETERS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_the_columns_and_parts_of_the_tokens(triton_device, small_card, dtype):
    """The sums over d are left by one launch and added up by the next, those over tokens by the last."""
    assert triton_op._cut(70, 600, 64, 4) == (16, 1) and triton_op._cut(20, 600, 64, 4) == (16, 2)
    assert triton_op._parts(600, 130, 3, 4) == 2
    check_op(ours, reference, make(triton_device, 20, 600, 18, **EVERYTHING), dtype)
    check_op(ours, reference, make(triton_device, 150, 130, 3, **EVERYTHING), dtype)


def test_wide_bottleneck(triton_device):
    check_op(ours, reference, make(triton_device, 20, 130, 200, **EVERYTHING), torch.bfloat16)


@pytest.mark.parametrize("offset", [30.0, -1000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero(triton_device, dtype, offset):
    """LayerNorm is taken into the product: what it subtracts must not cancel the digits of the rest."""
    arguments = make(triton_device, 5, 300, 16, norm=True, activation="identity")
    with torch.no_grad():
        arguments["x"] += offset
    check_op(ours, reference, arguments, dtype)


@pytest.mark.parametrize("needed", ["x", *PARAMETERS, "residual"])
def test_a_gradient_alone_is_the_same_gradient(triton_device, needed):
    arguments = prepared(make(triton_device, 26, 70, 11, norm=True, residual="other", dropout_p=0.2), torch.float32)
    everything = outputs_and_gradients(ours, arguments)
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_(value is arguments[needed])
    alone = outputs_and_gradients(ours, arguments)
    assert torch.equal(alone[f"d{needed}"], everything[f"d{needed}"])


def test_twice_the_same_bits(triton_device, small_card):
    arguments = make(triton_device, 140, 300, 5, **EVERYTHING)
    first, second = (outputs_and_gradients(ours, prepared(arguments, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("view", ["transposed", "sliced", "column_major", "expanded"])
def test_strided_inputs(triton_device, view):
    d = 48
    base = torch.randn(3, 4, 2 * d, device=triton_device)
    x = {
        "transposed": base[..., :d].transpose(0, 1),
        "sliced": base[..., ::2],
        "column_major": torch.randn(d, 12, device=triton_device).t(),
        "expanded": base[:1, :, :d].expand(3, 4, d),
    }[view]
    arguments = prepared(make(triton_device, 1, d, 16, norm=True), torch.float32)
    arguments["up_weight"] = arguments["up_weight"].detach().t().contiguous().t().requires_grad_()
    check_op(ours, reference, {**arguments, "x": x, "residual": x.flip(0)}, torch.float32)


def test_a_stored_forward_of_the_cpu_kernels_serves(triton_device):
    """What forward keeps is the same for every implementation."""
    if triton_device.type != "cpu":
        pytest.skip("the compiled kernels take tensors on the CPU")
    arguments = prepared(make(triton_device, 9, 70, 12, norm=True), torch.float32)
    arguments = {n: None if a is None else a.detach() for n, a in arguments.items() if n in ("x", *PARAMETERS)}
    inputs = (*arguments.values(), None, None, ACTIVATIONS.index("silu"), 1e-5, 0.7, 0.0, False)
    mine, theirs = triton_op.adapter_forward(*inputs), torch.ops.lwft.adapter_forward(*inputs)
    for name, value, expected in zip(("out", "hidden", "mean", "rstd"), mine, theirs, strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype, name
        torch.testing.assert_close(value, expected)


def test_no_tokens(triton_device):
    check_op(ours, reference, make(triton_device, 0, 24, 6, **EVERYTHING), torch.float32)


def test_no_step_past_the_end(triton_device, monkeypatch):
    if triton_device.type != "cpu":
        pytest.skip("for the interpreter's pointers; on a card compute-sanitizer looks")
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape, **options: guarded(plain(self, *shape, **options))
    )
    arguments = prepared(make(triton_device, 19, 77, 13, **{**EVERYTHING, "residual": "other"}), torch.float32)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = guarded(value).requires_grad_()
    ours(**arguments).sum().backward()


def test_float64_and_wide_bottlenecks_are_declined(triton_device):
    arguments = make(triton_device, 2, 8, 4)
    with pytest.raises(RuntimeError, match="float64 goes to the reference"):
        ours(**arguments)
    with pytest.raises(RuntimeError, match="a bottleneck of at most 256, not 257"):
        ours(**prepared(make(triton_device, 2, 8, 257), torch.float32))
