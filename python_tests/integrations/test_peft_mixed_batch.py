"""Batches whose rows have an adapter each: PEFT's `adapter_names`, and the same in training."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import dropout
from lwft_kernels.integrations.peft import mixed_batch

pytestmark = pytest.mark.usefixtures("native")

WIDTH = 24
NAMES = ["other", "__base__", "default", "other", "third"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 20)
        self.second = nn.Linear(20, WIDTH, bias=False)
        self.again = False

    def forward(self, x):
        h = checkpoint(self.first, x, use_reentrant=self.again == "reentrant") if self.again else self.first(x)
        return self.second(torch.tanh(h))


def build(**options):
    torch.manual_seed(1)
    common = {"init_lora_weights": False, **options}
    model = get_peft_model(Net(), LoraConfig(target_modules=["first", "second"], r=4, lora_alpha=8, **common))
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3, lora_alpha=5, use_rslora=True, **common))
    model.add_adapter("third", LoraConfig(target_modules=["second"], r=7, **common))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def by_row(model, x, names):
    """What a mixed batch is: every row alone with its adapter, by PEFT's plain path."""
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return torch.cat(rows)


def outputs_and_gradients(call, model, x):
    x = x.detach().requires_grad_()
    wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    out = call(x)
    gradients = torch.autograd.grad(out.square().sum(), list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), gradients, strict=True)
    return {"out": out, **{n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}}


def peft_in_eval(model, names):
    return lambda x: model(x, adapter_names=names)


def declined():
    return lwft_kernels.stats().get("peft lora.Linear", {"declined": {}})["declined"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, WIDTH), (5, 3, WIDTH)], ids=str)
@pytest.mark.parametrize("names", [NAMES, ["__base__"] * 5, ["third"] * 5], ids=["mixed", "base", "one"])
def test_in_evaluation(dtype, shape, names):
    model, x = build().to(dtype).eval(), torch.randn(shape).to(dtype)
    theirs = outputs_and_gradients(peft_in_eval(model, names), model, x)
    double = copy.deepcopy(model).double()
    oracle = outputs_and_gradients(peft_in_eval(double, names), double, x.double())
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(peft_in_eval(model, names), model, x)
    assert_accurate(ours, theirs, oracle)
    assert not declined()


def test_in_training_every_adapter_gets_the_gradient_of_its_rows():
    model, x = build(), torch.randn(5, 3, WIDTH)
    double = copy.deepcopy(model).double()
    oracle = outputs_and_gradients(lambda x: by_row(double, x, NAMES), double, x.double())
    theirs = outputs_and_gradients(lambda x: by_row(model, x, NAMES), model, x)
    lwft_kernels.accelerate(model)
    assert model.training
    with mixed_batch(model, NAMES):
        assert model.base_model.training
        ours = outputs_and_gradients(model, model, x)
    assert_accurate(ours, theirs, oracle)
    assert all(ours[name].abs().sum() > 0 for name in ours)
    assert not declined()
    with pytest.raises(ValueError, match="training mode"):  # PEFT's own door stays shut
        model(x, adapter_names=NAMES)


@pytest.mark.parametrize("form", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing(form):
    model, x = build(), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    with mixed_batch(model, NAMES):
        plain = outputs_and_gradients(model, model, x)
        model.base_model.model.again = form
        model.zero_grad()
        x = x.detach().requires_grad_()
        out = model(x)
        out.square().sum().backward()
    again = {"out": out, "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
    assert all(torch.equal(plain[name], torch.zeros(()) if again[name] is None else again[name]) for name in plain)


def test_dropout_of_each_adapter_is_its_own():
    model, x = build(), torch.randn(5, WIDTH)
    layer = model.base_model.model.first
    layer.lora_dropout.update({"other": nn.Dropout(0.5)})
    lwft_kernels.accelerate(model)
    torch.manual_seed(3)
    out = layer(x, adapter_names=NAMES)
    torch.manual_seed(3)
    seeds = dropout.draw_seed(x.device)
    expected = layer.base_layer(x)
    for name, rows, dropped in (
        ("other", [0, 3], dropout.dropout(x, seeds, 0.5)),
        ("default", [2], x),
    ):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        expected[rows] += dropped[rows] @ a.T @ b.T * layer.scaling[name]
    torch.testing.assert_close(out, expected)


def test_a_hooked_base():
    model, x = build().eval(), torch.randn(5, WIDTH)
    model.base_model.model.first.base_layer.register_forward_hook(lambda m, i, out: out + 1)
    expected = model(x, adapter_names=NAMES)
    lwft_kernels.accelerate(model)
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1


def test_errors_are_pefts():
    model, x = build().eval(), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=NAMES[:-1])
    with pytest.raises(ValueError, match="non-existing adapter"), mixed_batch(model, ["nobody"] * 5):
        pass
    with pytest.raises(ValueError, match="has no LoRA adapters"), mixed_batch(nn.Linear(2, 2), ["default"]):
        pass
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=NAMES)


def test_what_is_declined():
    model, x = build().eval(), torch.randn(5, WIDTH)
    layer = model.base_model.model.first
    layer.lora_B["other"].register_parameter("bias", nn.Parameter(torch.ones(20)))
    expected = layer(x, adapter_names=NAMES)
    lwft_kernels.accelerate(model)
    assert torch.equal(layer(x, adapter_names=NAMES), expected)
    assert declined() == {"lora_bias in a mixed batch": 1}
