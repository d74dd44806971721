"""`accelerate(model, prepack=True)`: the weights below PEFT's LoRA layers, and everything PEFT does with them."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_accurate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lwft_kernels
from lwft_kernels.lowrank import prepack
from lwft_kernels.lowrank.packed_weight import PackedWeight

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def measures(monkeypatch, tmp_path):
    """Every weight is worth it, without a measurement: none here depends on how fast the machine is."""
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return {"16": 2.0, "64": 2.0, "128": 2.0, "1024": 0.97}

    monkeypatch.setenv("LWFT_PREPACK_CACHE", str(tmp_path / "prepack.json"))
    monkeypatch.setattr(prepack, "_measure", measure)
    monkeypatch.setattr(prepack, "_known", {})
    return calls


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 70)
        self.second = nn.Linear(70, 24, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def build(net=Net, **options):
    torch.manual_seed(1)
    model = get_peft_model(net(), LoraConfig(**{"target_modules": ["first", "second"], "r": 4, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def outputs_and_gradients(model, x):
    x = x.detach().requires_grad_()
    out = model(x)
    wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    return {"out": out, **dict(zip(wanted, torch.autograd.grad(out.square().sum(), [*wanted.values()]), strict=True))}


def packed(model):
    return [name for name, parameter in model.named_parameters() if type(parameter) is PackedWeight]


WEIGHTS = ["base_model.model.first.base_layer.weight", "base_model.model.second.base_layer.weight"]


def test_outputs_gradients_report_and_undo(measures):
    model, x = build(), torch.randn(3, 11, 24)
    before, state = outputs_and_gradients(model, x), copy.deepcopy(model.state_dict())
    oracle = outputs_and_gradients(build().double(), x.double())
    parameters = dict(model.named_parameters())
    assert "packed, if that is faster" in str(lwft_kernels.explain(model, prepack=True)) and not measures
    assert not packed(model)
    report = lwft_kernels.accelerate(model, prepack=True)
    assert packed(model) == WEIGHTS
    assert "packed (2.00x at 16..128 tokens, 0.97x at 1024)" in str(report)
    lwft_kernels.reset_stats()
    assert_accurate(outputs_and_gradients(model, x), before, oracle)
    assert lwft_kernels.stats() == {"lora_linear": {"fast": 2, "declined": {}}}
    assert not report.unreached() and len(report.replaced) == 4
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor and torch.equal(value, state[name]), name
    again = lwft_kernels.accelerate(model, prepack=True)
    assert not again.replaced and "its weight is packed already" in str(again)
    report.undo()
    assert not packed(model) and all(type(p) is nn.Parameter for p in model.parameters())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_block_gives_them_back():
    model = build()
    with lwft_kernels.accelerated(model, prepack=True):
        assert packed(model) == WEIGHTS
    assert not packed(model)


def test_without_the_word_nothing_is_packed(measures):
    model = build()
    lwft_kernels.accelerate(model)
    assert not packed(model) and not measures
    lwft_kernels.accelerate(model, prepack=True)
    assert packed(model) == WEIGHTS, "a second call may ask for it"


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_options(options):
    model = build(**options).eval()
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3, init_lora_weights=False))
    x = torch.randn(20, 24)
    for active in (["default"], ["default", "other"]):
        model.base_model.set_adapter(active)
        with torch.no_grad():
            before = model(x)
            with lwft_kernels.accelerated(model, prepack=True):
                lwft_kernels.reset_stats()
                torch.testing.assert_close(model(x), before)
                assert not any(counts["declined"] for counts in lwft_kernels.stats().values())


def test_mixed_batch():
    model = build().eval()
    model.add_adapter("other", LoraConfig(target_modules=["first", "second"], r=3, init_lora_weights=False))
    x, names = torch.randn(3, 9, 24), ["other", "__base__", "default"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        lwft_kernels.accelerate(model, prepack=True)
        lwft_kernels.reset_stats()
        torch.testing.assert_close(model(x, adapter_names=names), before)
    assert lwft_kernels.stats() == {"lora_linear": {"fast": 2, "declined": {}}}


def test_what_peft_does_afterwards(tmp_path):
    model, plain = build(), build()
    lwft_kernels.accelerate(model, prepack=True)
    x = torch.randn(20, 24)
    with torch.no_grad():
        for step in ("merge_adapter", "unmerge_adapter", "merge_adapter", "unmerge_adapter"):
            getattr(model, step)()
            getattr(plain, step)()
            for name, value in model.state_dict().items():
                assert torch.equal(value, plain.state_dict()[name]), (step, name)
            torch.testing.assert_close(model(x), plain(x))
        assert packed(model) == WEIGHTS
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    assert loaded.load_state_dict(model.state_dict()) and torch.allclose(loaded(x), plain(x), atol=1e-6)
    twin = copy.deepcopy(model)
    assert not packed(twin) and packed(model)
    torch.testing.assert_close(twin(x), plain(x))
    whole = model.merge_and_unload()
    torch.testing.assert_close(whole(x), plain.merge_and_unload()(x))


def test_a_base_that_must_be_called_is_counted():
    model = build()
    lwft_kernels.accelerate(model, prepack=True)
    model.base_model.model.first.base_layer.register_forward_hook(lambda *_: None)
    before = build()(x := torch.randn(5, 24))
    torch.testing.assert_close(model(x), before)
    assert list(lwft_kernels.stats()["peft lora.Linear"]["declined"]) == [
        "a packed weight is unpacked for a base layer that must be called"
    ]


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.third = nn.Linear(24, 70)
        self.third.weight = self.first.weight


class Transposed(Net):
    def __init__(self):
        super().__init__()
        self.first = Conv1D(70, 24)


def test_reasons():
    def reason(model, name="first"):
        changes = lwft_kernels.accelerate(model, prepack=True).changes
        (change,) = (c for c in changes if c.module == f"base_model.model.{name}.base_layer")
        assert change.now is None and type(model.base_model.model.get_submodule(name).base_layer.weight) is nn.Parameter
        return change.reason

    model = build()
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
    assert "requires a gradient; only a frozen one" in reason(model)
    assert packed(model) == WEIGHTS[1:]
    assert reason(build(Tied)) == "another module has the same weight"
    assert "only the weight of an nn.Linear is packed, not of Conv1D" in reason(build(Transposed, fan_in_fan_out=True))
    assert "DoraLinearVariant reads it otherwise" in reason(build(use_dora=True))
    assert "has no product with a packed weight of torch.float16" in reason(build().half())


def test_refused_by_the_measurement(monkeypatch):
    monkeypatch.setattr(prepack, "_measure", lambda *_: {"16": 1.0, "64": 1.0, "128": 1.0, "1024": 0.9})
    model = build()
    report = lwft_kernels.accelerate(model, prepack=True)
    assert not packed(model) and len(report.replaced) == 2 and len(report.declined) == 2
    assert all("packed it would be 1.00 times as fast here" in change.reason for change in report.declined)
