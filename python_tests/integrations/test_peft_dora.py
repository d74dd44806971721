"""DoRA through `accelerate`: against PEFT's own, and what its norm costs."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from oracle import assert_accurate, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lwft_kernels
from lwft_kernels.integrations.peft import dora

pytestmark = pytest.mark.usefixtures("native")

D_IN, D_OUT = 24, 37


class Net(nn.Module):
    def __init__(self, kind, bias):
        super().__init__()
        self.layer = Conv1D(D_OUT, D_IN) if kind is Conv1D else nn.Linear(D_IN, D_OUT, bias=bias)

    def forward(self, x):
        return self.layer(x)


def build(kind=nn.Linear, bias=True, **options):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "use_dora": True, "init_lora_weights": False, **options}
    config = LoraConfig(target_modules=["layer"], fan_in_fan_out=kind is Conv1D, **options)
    model = get_peft_model(Net(kind, bias), config)
    layer = model.base_model.model.layer
    if kind is Conv1D:  # zero at the start
        nn.init.normal_(layer.base_layer.bias)
    nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 2.0)
    return model, layer


def outputs_and_gradients(model, x, seed=5):
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(out.square().sum(), list(wanted.values()))
    return {"out": out, **dict(zip(wanted, gradients, strict=True))}


def declined():
    return lwft_kernels.stats().get("peft lora.Linear", {"declined": {}})["declined"]


def compare(model, x):
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(model, x)
    assert any("magnitude" in name for name in ours)
    assert ours["out"].dtype == theirs["out"].dtype
    assert_accurate(ours, theirs, oracle)
    assert not declined()


@pytest.mark.parametrize("kind,bias", [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_outputs_and_gradients(kind, bias, training, dropout_p):
    model, _ = build(kind, bias, lora_dropout=dropout_p, use_rslora=True)
    # the masks are PEFT's: the same module draws them from the same stream
    compare(model.train(training), torch.randn(2, 7, D_IN))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16(adapter, bias):
    model, layer = build(bias=bias)
    layer.base_layer.to(torch.bfloat16)
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.to(adapter)
    compare(model, torch.randn(33, D_IN).to(torch.bfloat16))


def test_bfloat16_with_dropout(monkeypatch):
    model, layer = build(lora_dropout=0.3)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(33, D_IN).to(torch.bfloat16)
    keep = torch.bernoulli(torch.full((33, D_IN), 0.7))  # one mask for every dtype
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.copy_(keep))
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * (keep / 0.7).to(x.dtype))
    compare(model, x)


def test_autocast():
    model, _ = build()
    x = torch.randn(5, D_IN)
    oracle = {"out": copy.deepcopy(model).double()(x.double())}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = {"out": model(x)}
        lwft_kernels.accelerate(model)
        ours = {"out": model(x)}
    assert ours["out"].dtype == theirs["out"].dtype and not declined()
    assert_accurate(ours, theirs, oracle)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_beside_a_plain_adapter(order):
    model, layer = build()
    model.add_adapter("other", LoraConfig(target_modules=["layer"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(order)
    assert list(layer.active_adapters) == order
    compare(model, torch.randn(5, D_IN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (300, 257), (3, 70000)], ids=str)
def test_norm(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (5, shape[1]), (shape[0], 5)))
    ours = dora.weight_norm(weight, a, b, 0.7)
    exact = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    wide = torch.promote_types(dtype, torch.float32)
    eager = torch.linalg.vector_norm(weight.to(wide) + 0.7 * b.to(wide) @ a.to(wide), dim=1)
    assert ours.dtype == wide
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact) + 1e-6
    torch.library.opcheck(dora._weight_norm_op, (weight, a, b, 0.7))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in storages:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_matrix_of_the_size_of_the_weight_is_made(monkeypatch):
    monkeypatch.setattr(dora, "_TILE", 100)
    model, _ = build()
    x = torch.randn(2, D_IN)
    found = []
    for _ in range(2):
        with Largest() as largest:
            model(x).sum().backward()
        found.append(largest.elements)
        lwft_kernels.accelerate(model)
    assert found[0] >= D_IN * D_OUT and found[1] < D_IN * D_OUT / 4


def test_a_base_weight_written_through_data_is_seen():
    model, layer = build()
    x = torch.randn(2, D_IN)
    expected_class = type(layer)
    lwft_kernels.accelerate(model)
    model(x)
    layer.base_layer.weight.data.mul_(3)  # no version counter sees it
    ours = model(x)
    layer.__class__ = expected_class
    torch.testing.assert_close(ours, model(x))


def hooked(layer):
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def other_base(layer):
    layer.base_layer.__class__ = type("Other", (nn.Linear,), {})


def test_a_hooked_base():
    model, layer = build()
    layer.base_layer.register_forward_hook(lambda m, i, out: out + 1)
    compare(model, torch.randn(3, D_IN))


@pytest.mark.parametrize("change,words", [(hooked, "hooked"), (other_base, "DoRA on a Other")])
def test_what_it_declines(change, words):
    model, layer = build()
    x = torch.randn(2, D_IN)
    change(layer)
    expected = model(x)
    lwft_kernels.accelerate(model)
    assert torch.equal(model(x), expected)
    assert [words in reason for reason in declined()] == [True]


def test_peft_caches_are_pefts(monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
    model, layer = build()
    x = torch.randn(2, D_IN)
    lwft_kernels.accelerate(model.eval())
    model(x)
    assert declined() == {"DoRA caching is on": 1}
    assert layer.lora_magnitude_vector["default"]._dora_cache


def test_merging():
    model, _ = build()
    x = torch.randn(3, D_IN)
    lwft_kernels.accelerate(model.eval())
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break():
    model, _ = build()
    x = torch.randn(3, D_IN)
    lwft_kernels.accelerate(model)
    expected = outputs_and_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs_and_gradients(compiled, x)["out"], expected["out"])
