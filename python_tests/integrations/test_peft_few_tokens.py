"""bitsandbytes layers under PEFT's LoRA: few tokens on a GPU go by `quantized_linear`."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_accurate

import lwft_kernels
from lwft_kernels.functional import QuantizedWeight
from lwft_kernels.integrations.peft import few_tokens, lora_layer
from lwft_kernels.quantized import reference

bnb = pytest.importorskip("bitsandbytes")


def layer(kind, d_in=128, d_out=40, bias=True, **options):
    torch.manual_seed(1)
    weight = torch.randn(d_out, d_in)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False, **options)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        nested = kind == "nested"
        made = bnb.nn.Linear4bit(d_in, d_out, bias=bias, compress_statistics=nested, quant_type="nf4", **options)
        made.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=made
        )
    return made.to("cpu").requires_grad_(False)


def served():
    return lwft_kernels.stats().get("quantized_linear", {"fast": 0})["fast"]


def outputs(function, x):
    x = x.detach().requires_grad_()
    out = function(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return {"out": out, "dx": torch.autograd.grad(out, x, direction)[0]}


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_is_the_layers(triton_device, kind, dtype):
    base = layer(kind)
    x = torch.randn(2, 3, 128).to(dtype)
    theirs = outputs(base, x)  # the first call also sets what the layer computes in
    weight = QuantizedWeight.from_bitsandbytes(base)
    bias = base.bias.double()
    oracle = outputs(lambda x: reference.quantized_linear(x, weight, bias), x.double())
    ours = outputs(lambda x: lora_layer._base_result(base, x, (), {}), x)
    assert served() == 1 and ours["out"].dtype == dtype
    assert_accurate(ours, theirs, oracle)


def test_compute_dtype_is_the_layers(triton_device):
    base = layer("nf4", compute_dtype=torch.bfloat16)
    x = torch.randn(3, 128)
    out = few_tokens.result(base, x)
    assert out.dtype == torch.float32 and torch.equal(out, out.bfloat16().float())
    assert_accurate({"out": out}, {"out": base(x)}, {"out": _exact(base, x.bfloat16())})


def _exact(base, x):
    weight = QuantizedWeight.from_bitsandbytes(base)
    return reference.quantized_linear(x.double(), weight, base.bias.double())


def test_what_goes_to_the_layer_itself(triton_device, monkeypatch):
    x = torch.randn(3, 128)
    fresh = layer("nf4")
    assert few_tokens.result(fresh, x) is None  # its first call
    base = layer("nf4", compute_dtype=torch.float32)
    assert few_tokens.result(base, x) is not None
    assert few_tokens.result(base, torch.randn(17, 128)) is None
    assert few_tokens.result(base, x[:0]) is None
    assert few_tokens.result(base, x.double()) is None
    assert few_tokens.result(base, torch.randn(3, 64)) is None
    assert few_tokens.result(torch.nn.Linear(128, 4), x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_tokens.result(base, x) is None
    with lwft_kernels.use_backend("auto"):
        assert few_tokens.result(base, x.cpu()) is None
    base.register_forward_hook(lambda *args: None)
    assert few_tokens.result(base, x) is None
    unquantised = bnb.nn.Linear8bitLt(128, 4)
    assert few_tokens.result(unquantised, x) is None
    assert served() == 1
