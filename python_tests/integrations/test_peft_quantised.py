"""PEFT's LoRA layers for quantised bases: ours on a base that computes itself."""

from __future__ import annotations

import copy
import importlib
import pickle

import peft
import pytest
import torch
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

import lwft_kernels
from lwft_kernels.integrations.peft import quantised

pytestmark = pytest.mark.usefixtures("native")

WIDTH, OUT = 24, 20


class EightBits(nn.Module):
    """A base whose weight is int8 with a scale per row, as the libraries keep it."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = WIDTH, OUT
        weight = torch.randn(OUT, WIDTH)
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype))


class Net(nn.Module):
    def __init__(self, kind=None):
        super().__init__()
        self.base = kind

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def classes():
    for qualified in quantised._TAKES_ARGUMENTS:
        module, _, name = qualified.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ImportError:
            kind = None
        if kind is not None and not issubclass(kind, Linear):  # torchao's have a test of their own
            yield kind


CLASSES = list(classes())


def build(kind, dropout_p=0.0):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout_p, init_lora_weights=False)
    base = EightBits().requires_grad_(False)
    layer = kind(base, "default", config=config, r=4, lora_alpha=8)
    layer.update_layer("other", r=3, lora_alpha=5, config=config)
    layer.requires_grad_(True)
    base.requires_grad_(False)
    layer.set_adapter("default")
    return Net(layer)


def outputs_and_gradients(model, x, **kwargs):
    x = x.detach().requires_grad_()
    out = model(x, **kwargs)
    wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(out.square().sum(), list(wanted.values()), allow_unused=True)
    return {"out": out, **{n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}}


def reasons():
    stats = lwft_kernels.stats()
    return {reason for op in stats if op.startswith("peft") for reason in stats[op]["declined"]}


def test_some_classes_are_there():
    assert {"AqlmLoraLinear", "AwqLoraLinear", "GPTQLoraLinear"} <= {kind.__name__ for kind in CLASSES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_outputs_and_gradients(kind, dtype):
    model, x = build(kind), torch.randn(2, 5, WIDTH).to(dtype)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    report = lwft_kernels.accelerate(model)
    assert [change.now for change in report.replaced] == ["lora_delta_"]
    assert isinstance(model.base, kind) and type(model.base) is not kind
    assert_accurate(outputs_and_gradients(model, x), theirs, oracle)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1 and not reasons() and report.unreached() == []
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    report.undo()
    assert type(model.base) is kind


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_adapters_and_their_states(kind):
    model, x = build(kind), torch.randn(5, WIDTH)
    layer = model.base
    states = {
        "two": lambda: layer.set_adapter(["default", "other"]),
        "other": lambda: layer.set_adapter("other"),
        "disabled": lambda: layer.enable_adapters(False),
    }
    expected = {}
    for name, enter in states.items():
        enter()
        expected[name] = model(x)
    layer.enable_adapters(True)
    lwft_kernels.accelerate(model)
    for name, enter in states.items():
        enter()
        torch.testing.assert_close(model(x), expected[name])
    assert reasons() == {"adapters are disabled"}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_mixed_batches_where_peft_takes_them(kind):
    model, x = build(kind).eval(), torch.randn(3, WIDTH)
    names = ["default", "__base__", "other"]
    takes = quantised._TAKES_ARGUMENTS[f"{kind.__module__}.{kind.__name__}"]
    lwft_kernels.accelerate(model)
    if not takes:
        with pytest.raises(TypeError, match="adapter_names"):
            model(x, adapter_names=names)
        return
    ours = model(x, adapter_names=names)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1
    model.base.__class__ = kind
    torch.testing.assert_close(ours, model(x, adapter_names=names))


def with_adapter(base, **marks):
    """The PEFT model of a network that is one quantised layer, as PEFT builds it for such a layer."""
    net = Net(base)
    for name, value in marks.items():
        setattr(net, name, value)
    model = get_peft_model(net, LoraConfig(target_modules=["base"], r=4, init_lora_weights=False))
    return model, model.base_model.model.base


def check_against_the_base_alone(model, layer, x):
    """Whatever the library makes of its weights: the base's result and gradient by itself, the branch in float64."""
    direction = torch.randn(len(x), layer.out_features, generator=torch.Generator().manual_seed(1))

    def run(x):
        x = x.detach().requires_grad_()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        out = model(x)
        return dict(zip(("out", "x", "a", "b"), (out, *torch.autograd.grad(out, (x, a, b), direction)), strict=True))

    theirs = run(x)
    base_x = x.detach().requires_grad_()
    base_out = layer.base_layer(base_x)
    (base_grad,) = torch.autograd.grad(base_out, base_x, direction)
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A["default"].weight)]
    leaves.append(layer.lora_B["default"].weight.detach().double().requires_grad_())
    delta = layer.scaling["default"] * leaves[0] @ leaves[1].T @ leaves[2].T
    dx, da, db = torch.autograd.grad(delta, leaves, direction.double())
    oracle = {"out": base_out.double() + delta, "x": base_grad.double() + dx, "a": da, "b": db}
    report = lwft_kernels.accelerate(model)
    assert [change.now for change in report.replaced] == ["lora_delta_"], report
    assert_accurate(run(x), theirs, oracle)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1 and not reasons()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 8:
        base = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        base = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        base.weight = bnb.nn.Params4bit(torch.randn(64, 64), quant_type="nf4", requires_grad=False)
    model, layer = with_adapter(base.to("cpu"), **{f"is_loaded_in_{bits}bit": True})
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    check_against_the_base_alone(model, layer, torch.randn(5, 64))


@pytest.mark.filterwarnings("ignore")
def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    model, layer = with_adapter(base[0])
    assert isinstance(layer, peft.tuners.lora.torchao.TorchaoLoraLinear)
    check_against_the_base_alone(model, layer, torch.randn(5, 64))
