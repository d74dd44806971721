"""quantized_linear and its weights: the formats, what is refused, what serves where; the numbers of no GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from oracle import check_op, relative_error
from quantized_weights import FORMATS, NF4, make_weight

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.functional import QuantizedWeight
from lwft_kernels.quantized import autograd, reference


def written_out(weight):
    """W by the words of the docstring, weight for weight."""
    d_out, d_in = weight.shape
    out = torch.empty(d_out, d_in, dtype=torch.float64)
    for row in range(d_out):
        for col in range(d_in):
            if weight.table is None:
                out[row, col] = weight.codes[row, col].double() * weight.absmax[row].double() / 127
                continue
            place = row * d_in + col
            byte = int(weight.codes.flatten()[place // 2])
            block = place // weight.blocksize
            absmax = weight.absmax[block].double() if weight.absmax_codes is None else None
            if absmax is None:
                outer = weight.absmax[block // weight.absmax_blocksize].double()
                absmax = weight.absmax_table[int(weight.absmax_codes[block])].double() * outer
                absmax = absmax + weight.absmax_offset.double()
            out[row, col] = weight.table[byte >> 4 if place % 2 == 0 else byte & 15].double() * absmax
    return out


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(3, 7), (5, 64), (4, 48)], ids=str)
def test_the_formats(kind, shape):
    weight = make_weight(kind, *shape, blocksize=16, absmax_blocksize=4)
    exact = written_out(weight)
    assert relative_error(reference.dequantize(weight, torch.float64), exact) < 1e-15
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = reference.dequantize(weight, dtype)
        assert found.dtype == dtype
        assert relative_error(found, exact) <= 1.01 * relative_error(exact.to(dtype), exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 128), (7, 33), (40, 256)], ids=str)
def test_4_bits_are_those_of_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    for nested in (False, True):
        for quant_type in ("nf4", "fp4"):
            original = torch.randn(shape).to(dtype)
            made = bnb.nn.Params4bit(original, quant_type=quant_type, compress_statistics=nested).to("cpu")
            weight = QuantizedWeight.from_bitsandbytes(made)
            assert weight.shape == shape and (weight.absmax_codes is not None) == nested
            assert weight.codes.data_ptr() == made.data_ptr()
            theirs = bnb.functional.dequantize_4bit(made.data, made.quant_state)
            assert torch.equal(reference.dequantize(weight, dtype), theirs)
            if quant_type == "nf4":
                assert weight.table.tolist() == torch.tensor(NF4).tolist()
    packed = bnb.nn.Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    theirs = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(reference.dequantize(QuantizedWeight.from_bitsandbytes(packed), torch.float32), theirs)


def test_8_bits_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(48, 20, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(20, 48), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    theirs = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    before = QuantizedWeight.from_bitsandbytes(layer)
    torch.testing.assert_close(reference.dequantize(before, torch.float32), theirs)
    assert QuantizedWeight.from_bitsandbytes(layer.weight).codes.data_ptr() == before.codes.data_ptr()
    layer(torch.randn(2, 48))  # takes the scales from the parameter
    after = QuantizedWeight.from_bitsandbytes(layer)
    assert after.codes.data_ptr() == before.codes.data_ptr() and torch.equal(after.absmax, before.absmax)
    with pytest.raises(ValueError, match="pass the layer"):
        QuantizedWeight.from_bitsandbytes(layer.weight)


def test_what_is_not_quantised_by_bitsandbytes():
    with pytest.raises(TypeError, match="got Linear with a weight of Parameter"):
        QuantizedWeight.from_bitsandbytes(torch.nn.Linear(4, 4))
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="not quantised yet"):
        QuantizedWeight.from_bitsandbytes(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match="not quantised yet"):
        QuantizedWeight.from_bitsandbytes(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))


@pytest.mark.parametrize(
    "kind, change, error, match",
    [
        ("int8", {"codes": torch.zeros(4, 6)}, TypeError, "codes must be torch.int8, got torch.float32"),
        ("int8", {"shape": (4, 7)}, ValueError, r"codes must have shape \(d_out, d_in\) = \(4, 7\), got \(4, 6\)"),
        ("int8", {"absmax": torch.ones(6)}, ValueError, r"absmax must have shape \(d_out,\) = \(4\)"),
        (
            "nf4",
            {"codes": torch.zeros(11, dtype=torch.uint8)},
            ValueError,
            "12 elements, half a byte for each of 4 x 6",
        ),
        (
            "nf4",
            {"absmax": torch.ones(4)},
            ValueError,
            "absmax must have 3 elements, one per block of 8 weights, got 4",
        ),
        ("nf4", {"absmax": torch.ones(3).half()}, TypeError, "absmax must be torch.float32, got torch.float16"),
        ("nf4", {"table": torch.ones(15)}, ValueError, "table must have 16 elements"),
        ("nf4", {"table": [1.0] * 16}, TypeError, "table must be a Tensor, got list"),
        ("nf4", {"blocksize": 24}, ValueError, "blocksize must be a power of two of at least 2, got 24"),
        ("nested", {"absmax_table": None}, ValueError, "absmax_codes need absmax_table"),
        (
            "nested",
            {"absmax_codes": torch.zeros(2, dtype=torch.uint8)},
            ValueError,
            "absmax_codes must have 3 elements",
        ),
        ("nested", {"absmax_table": torch.ones(16)}, ValueError, "absmax_table must have 256 elements"),
        ("nested", {"absmax_offset": torch.ones(2)}, ValueError, "absmax_offset must have 1 elements"),
        ("nested", {"absmax_blocksize": 3}, ValueError, "absmax_blocksize must be a power of two"),
        (
            "nested",
            {"absmax": torch.ones(3)},
            ValueError,
            "absmax must have 2 elements, one per block of 2 absmax_codes",
        ),
        ("nf4", {"table": torch.ones(16, device="meta")}, ValueError, "table is on meta but codes is on cpu"),
    ],
)
def test_weights_that_do_not_hold_together(kind, change, error, match):
    weight = make_weight(kind, 4, 6, blocksize=8, absmax_blocksize=2)
    with pytest.raises(error, match=match):
        dataclasses.replace(weight, **change)


def test_what_is_refused():
    weight, x = make_weight("nf4", 4, 64), torch.randn(2, 64)
    cases = [
        ({"x": x.int()}, TypeError, "x must be float64, float32"),
        ({"x": x[:, :32]}, ValueError, r"x must have shape \(..., d_in\) = \(2, 64\), got \(2, 32\)"),
        ({"x": x.to("meta")}, ValueError, "weight is on cpu but x is on meta"),
        ({"weight": x}, TypeError, "from_bitsandbytes"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(d_out,\) = \(4\)"),
        ({"bias": torch.ones(4).half()}, TypeError, "bias is torch.float16 but x is torch.float32"),
    ]
    for change, error, match in cases:
        with pytest.raises(error, match=match):
            LF.quantized_linear(**{"x": x, "weight": weight, "bias": None, **change})


@pytest.mark.parametrize("kind", FORMATS)
def test_the_cpu_has_the_reference_and_says_so(kind):
    weight, x = make_weight(kind, 5, 7), torch.randn(2, 3, 7, requires_grad=True)
    out = LF.quantized_linear(x, weight, torch.ones(5))
    assert out.shape == (2, 3, 5)
    (counts,) = lwft_kernels.stats().values()
    assert counts == {"fast": 0, "declined": {"there is no CPU kernel of quantized_linear": 1}}
    with lwft_kernels.use_backend("native"), pytest.raises(RuntimeError, match="no CPU kernel"):
        LF.quantized_linear(x, weight)


@pytest.mark.parametrize("kind", FORMATS)
def test_gradients(kind):
    weight = make_weight(kind, 5, 8)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, bias: LF.quantized_linear(x, weight, bias), (x, bias))


def test_autocast():
    weight, x = make_weight("int8", 5, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = LF.quantized_linear(x, weight, torch.ones(5))
    expected = F.linear(x.bfloat16(), reference.dequantize(weight, torch.bfloat16), torch.ones(5).bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_compile(kind):
    weight = make_weight(kind, 6, 64)

    def sine(x):
        return LF.quantized_linear(x, weight).sin()

    compiled = torch.compile(sine, fullgraph=True, backend="aot_eager")
    check_op(compiled, sine, {"x": torch.randn(3, 64, requires_grad=True)}, torch.float32)


def flat(weight, device):
    """The weight as the op takes it."""
    tensors = (
        weight.codes, weight.absmax, weight.table, weight.absmax_codes, weight.absmax_table, weight.absmax_offset
    )  # fmt: skip
    moved = (None if tensor is None else tensor.to(device) for tensor in tensors)
    return *moved, weight.blocksize, weight.absmax_blocksize


def test_shapes_of_a_gpu_call():
    """What torch.compile sees of the op: results and gradients without values."""
    weight = flat(make_weight("nested", 6, 64), "meta")
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    bias = torch.empty(6, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = torch.ops.lwft.quantized_linear_forward(x, *weight, bias, 6)
    assert out.shape == (2, 3, 6) and out.dtype == torch.bfloat16
    dx, dbias = torch.autograd.grad(out.sum(), (x, bias), create_graph=True)  # as if traced: by the op
    assert dx.shape == x.shape and dbias.shape == bias.shape and dx.dtype == dbias.dtype == torch.bfloat16


def test_no_transform():
    weight = flat(make_weight("int8", 4, 8), "cpu")
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: autograd.quantized_linear(x, *weight, None, 4).sum())(torch.randn(2, 8))
