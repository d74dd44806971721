"""add_layer_norm's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracle import check_op, outputs_and_gradients, prepared

import lwft_kernels
from lwft_kernels import functional as LF

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(device, *shape, parameters=("weight", "bias"), **options):
    generator = torch.Generator().manual_seed(sum(shape))
    d = shape[-1]
    sizes = {"x": shape, "sublayer_out": shape, "weight": (d,), "bias": (d,)}
    arguments = dict.fromkeys(sizes)
    for name, size in sizes.items():
        if name in ("x", "sublayer_out", *parameters):
            value = torch.randn(size, generator=generator, dtype=torch.float64)
            arguments[name] = value.to(device).requires_grad_()
    return {**arguments, **options}


def ours(**arguments):
    torch.manual_seed(0)
    out = LF.add_layer_norm(**arguments)
    assert lwft_kernels.stats()["add_layer_norm"]["fast"], lwft_kernels.stats()
    return out


def reference(**arguments):
    torch.manual_seed(0)
    with lwft_kernels.use_backend("reference"):
        return LF.add_layer_norm(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (3, 33), (2, 9, 64), (5, 1031)], ids=str)
def test_accuracy(triton_device, shape, dtype):
    check_op(ours, reference, make(triton_device, *shape), dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("d", [7, 64, 133])
def test_dropout_is_the_reference_dropout(triton_device, d, p):
    check_op(ours, reference, make(triton_device, 6, d, dropout_p=p), torch.float32)


@pytest.mark.parametrize("parameters", [("weight",), ("bias",), ()], ids=str)
def test_without_parameters(triton_device, parameters):
    check_op(ours, reference, make(triton_device, 4, 40, parameters=parameters, dropout_p=0.2), torch.float16)


@pytest.mark.parametrize("narrow", ["x", "sublayer_out"])
def test_mixed_dtypes(triton_device, narrow):
    arguments = make(triton_device, 5, 77)
    arguments[narrow] = arguments[narrow].detach().bfloat16().requires_grad_()
    check_op(ours, reference, arguments, torch.float32, keep=frozenset({narrow}))


def test_float32_parameters_beside_bfloat16(triton_device):
    arguments = make(triton_device, 5, 96)
    for name in ("weight", "bias"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    check_op(ours, reference, arguments, torch.bfloat16, keep=frozenset({"weight", "bias"}))


@pytest.mark.parametrize("wanting", ["x", "sublayer_out", "weight", "bias"])
def test_one_gradient_alone(triton_device, wanting):
    arguments = make(triton_device, 7, 48, dropout_p=0.1)
    for name in ("x", "sublayer_out", "weight", "bias"):
        arguments[name].requires_grad_(name == wanting)
    check_op(ours, reference, arguments, torch.float32)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strided_inputs(triton_device, view):
    base = torch.randn(4, 6, 48, device=triton_device)
    x = {"transposed": base.transpose(0, 1), "sliced": base[..., ::2], "expanded": base[:1].expand(4, 6, 48)}[view]
    arguments = {"x": x, "sublayer_out": torch.randn(x.shape, device=triton_device)}
    check_op(ours, reference, arguments, torch.float32)


def test_more_tokens_than_programs(triton_device, monkeypatch):
    """A program of backward sums several rows; twice the same bits."""
    monkeypatch.setattr("lwft_kernels.norm.triton_op._PROGRAMS_PER_MULTIPROCESSOR", 0.03)  # 3 or so
    arguments = prepared(make(triton_device, 17, 16, dropout_p=0.1), torch.float32)
    check_op(ours, reference, arguments, torch.float32)
    first, second = (outputs_and_gradients(ours, prepared(arguments, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens(triton_device):
    check_op(ours, reference, make(triton_device, 0, 24, dropout_p=0.1), torch.float32)


def test_float64_and_long_rows_are_declined(triton_device):
    x = torch.randn(2, 8, dtype=torch.float64, device=triton_device)
    with pytest.raises(RuntimeError, match="float64 goes to the reference"):
        LF.add_layer_norm(x, x)
    long = torch.randn(1, 8193, device=triton_device)
    with pytest.raises(RuntimeError, match="at most 8192 elements, not 8193"):
        LF.add_layer_norm(long, long)
