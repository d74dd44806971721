"""quantized_linear's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracle import check_op, outputs_and_gradients, prepared
from quantized_weights import FORMATS, make_weight

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.triton import cards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
triton_op = pytest.importorskip("lwft_kernels.quantized.triton_op")


def make(device, kind, tokens, d_out, d_in, bias=True, **options):
    generator = torch.Generator().manual_seed(d_out + d_in)
    leading = tokens if isinstance(tokens, tuple) else (tokens,)
    x = torch.randn(*leading, d_in, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    b = torch.randn(d_out, generator=generator, dtype=torch.float64).to(device).requires_grad_() if bias else None
    return {"x": x, "weight": make_weight(kind, d_out, d_in, device, **options), "bias": b}


def ours(**arguments):
    out = LF.quantized_linear(**arguments)
    assert lwft_kernels.stats()["quantized_linear"]["fast"], lwft_kernels.stats()
    return out


def reference(**arguments):
    with lwft_kernels.use_backend("reference"):
        return LF.quantized_linear(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_accuracy(triton_device, kind, dtype):
    check_op(ours, reference, make(triton_device, kind, (2, 3), 70, 192), dtype)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 3, 130), (17, 65, 64), (5, 130, 74), (33, 16, 96)], ids=str)
def test_ugly_sizes(triton_device, kind, sizes):
    check_op(ours, reference, make(triton_device, kind, *sizes), torch.float32)


@pytest.mark.parametrize("blocksize, absmax_blocksize", [(2, 2), (32, 4), (128, 8), (4096, 256)])
@pytest.mark.parametrize("d_in", [128, 50])
def test_blocks(triton_device, d_in, blocksize, absmax_blocksize):
    """Blocks that are parts of a row, whole rows, several rows, and that cross their ends."""
    arguments = make(triton_device, "nested", 2, 9, d_in, blocksize=blocksize, absmax_blocksize=absmax_blocksize)
    check_op(ours, reference, arguments, torch.bfloat16)


@pytest.mark.parametrize("tokens", [64, 65, 130])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_many_tokens(triton_device, kind, tokens):
    """By the one kernel, by several tiles of tokens, and by a dequantised weight: the same numbers."""
    arguments = make(triton_device, kind, tokens, 40, 70)
    check_op(ours, reference, arguments, torch.float16)


@pytest.mark.parametrize("method", ["fused", "dequantizing"])
@pytest.mark.parametrize("tokens", [20, 100])
def test_either_method_at_any_number_of_tokens(triton_device, monkeypatch, tokens, method):
    asked = []

    def choose(name, card, band, candidates, run):
        asked.append(name)
        return method if method in candidates else candidates[-1]

    monkeypatch.setattr(triton_op.tuning, "choose", choose)
    check_op(ours, reference, make(triton_device, "nested", tokens, 24, 64), torch.bfloat16)
    assert {"quantized_linear_forward", "quantized_linear_backward"} <= set(asked)


@pytest.mark.parametrize("kind", FORMATS)
def test_split_sums(triton_device, monkeypatch, kind):
    """A sum in several parts: bias once, the last part short, the same bits twice."""
    monkeypatch.setattr(triton_op, "_cut", lambda *args: triton_op._Cut(3, 128))
    arguments = make(triton_device, kind, 3, 300, 290)
    check_op(ours, reference, arguments, torch.float32)
    first, second = (outputs_and_gradients(ours, prepared(arguments, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_how_sums_are_split():
    """A layer of few rows is cut until every multiprocessor reads; one of many rows is not."""

    def cut(d_out, d_in, tokens=1):
        weight = make_weight_of_shape(d_out, d_in)
        x = torch.empty(tokens, d_in, dtype=torch.bfloat16, device="meta")
        return triton_op._cut(triton_op._forward_candidates(weight, x), "ROWS", d_out, "COLS", d_in, weight, x)

    cards.assume(cards.CLASSES[2])
    try:
        narrow, wide = cut(1024, 8192), cut(132 * 4 * 64, 8192)
        assert 1024 // 64 * narrow.splits >= 132 and wide.splits == 1
        for d_in in (1, 100, 8192, 8190):
            found = cut(64, d_in)
            assert (found.splits - 1) * found.length < d_in <= found.splits * found.length
            assert found.length % 128 == 0
        assert cut(1024, 8192, 64).splits <= narrow.splits  # partial sums grow with the tokens
    finally:
        cards.assume(None)


def make_weight_of_shape(d_out, d_in):
    codes = torch.empty(d_out * d_in // 2, dtype=torch.uint8, device="meta")
    return triton_op._Weight(codes, codes, codes, None, None, None, 64, 0, d_out, d_in)


@pytest.mark.parametrize("wanting", ["x", "bias"])
def test_one_gradient_alone(triton_device, wanting):
    arguments = make(triton_device, "nf4", 4, 20, 64)
    for name in ("x", "bias"):
        arguments[name].requires_grad_(name == wanting)
    check_op(ours, reference, arguments, torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_bias(triton_device, kind):
    check_op(ours, reference, make(triton_device, kind, 4, 20, 64, bias=False), torch.float16)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strided_inputs(triton_device, view):
    base = torch.randn(4, 6, 96, device=triton_device)
    x = {"transposed": base.transpose(0, 1), "sliced": base[..., ::2], "expanded": base[:1].expand(4, 6, 96)}[view]
    weight = make_weight("nf4", 20, x.shape[-1], triton_device)
    check_op(ours, reference, {"x": x.requires_grad_(), "weight": weight}, torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_tokens(triton_device, kind):
    check_op(ours, reference, make(triton_device, kind, 0, 12, 64), torch.float32)


def test_what_is_declined(triton_device):
    x = torch.randn(2, 7, device=triton_device)
    with pytest.raises(RuntimeError, match="whole bytes, not of 7 weights"):
        LF.quantized_linear(x, make_weight("nf4", 4, 7, triton_device))
    check_op(ours, reference, {"x": x, "weight": make_weight("int8", 4, 7, triton_device)}, torch.float32)
    with pytest.raises(RuntimeError, match="float64 goes to the reference"):
        LF.quantized_linear(x.double(), make_weight("int8", 4, 7, triton_device))
