"""PEFT's lora.MultiheadAttention by low-rank products, against PEFT's merging."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from torch import nn

import lwft_kernels

pytestmark = pytest.mark.usefixtures("native")

WIDTH, HEADS = 24, 3


class Net(nn.Module):
    def __init__(self, batch_first, bias):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, bias=bias)

    def forward(self, query, key=None, value=None, **kwargs):
        key = query if key is None else key
        value = key if value is None else value
        kwargs.setdefault("need_weights", False)
        return self.mha(query, key, value, **kwargs)[0]


def build(batch_first=True, bias=True, **options):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    model = get_peft_model(Net(batch_first, bias), LoraConfig(target_modules=["mha"], **options))
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start
                nn.init.normal_(parameter)
    return model


def outputs_and_gradients(model, *inputs, **kwargs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = model(*inputs, **kwargs)
    wanted = {f"x{i}": x for i, x in enumerate(inputs)}
    wanted |= {n: p for n, p in model.named_parameters() if "lora_" in n}
    gradients = torch.autograd.grad(out.square().sum(), list(wanted.values()))
    return {"out": out, **dict(zip(wanted, gradients, strict=True))}


def declined():
    return lwft_kernels.stats().get("peft lora.MultiheadAttention", {"declined": {}})["declined"]


def double(kwargs):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}


def compare(model, *inputs, **kwargs):
    theirs = outputs_and_gradients(model, *inputs, **kwargs)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), *(x.double() for x in inputs), **double(kwargs))
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(model, *inputs, **kwargs)
    assert len([name for name in ours if "lora_" in name]) == 4
    assert ours["out"].dtype == theirs["out"].dtype
    assert_accurate(ours, theirs, oracle)
    assert not declined() and lwft_kernels.stats()["attention"]["fast"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(dtype, batch_first, bias):
    compare(build(batch_first, bias, lora_dropout=0.5).to(dtype), torch.randn(2, 5, WIDTH).to(dtype))


@pytest.mark.parametrize("inputs", [2, 3])
def test_cross_attention(inputs):
    shapes = [(2, 5, WIDTH), (2, 7, WIDTH), (2, 7, WIDTH)]
    compare(build(), *(torch.randn(shape) for shape in shapes[:inputs]))


def test_unbatched():
    compare(build(), torch.randn(5, WIDTH))


def test_masks():
    causal = torch.triu(torch.full((5, 5), float("-inf")), 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    padding = torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    compare(build(), torch.randn(2, 5, WIDTH), attn_mask=causal, key_padding_mask=padding, is_causal=True)


def test_the_weights_are_not_replaced_at_each_call():
    model = build()
    lwft_kernels.accelerate(model)
    base = model.base_model.model.mha.base_layer
    weights = [base.in_proj_weight, base.out_proj.base_layer.weight]
    model(torch.randn(2, 5, WIDTH))
    assert all(a is b for a, b in zip(weights, [base.in_proj_weight, base.out_proj.base_layer.weight], strict=True))


def two_adapters(model):
    model.add_adapter("other", LoraConfig(target_modules=["mha"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def disabled(model):
    model.base_model.disable_adapter_layers()


def other_base(model):
    model.base_model.model.mha.base_layer.__class__ = type("Other", (nn.MultiheadAttention,), {})


@pytest.mark.parametrize(
    "change,kwargs,words",
    [
        (None, {"need_weights": True}, "need_weights"),
        (two_adapters, {}, "2 adapters are active"),
        (disabled, {}, "disabled"),
        (other_base, {}, "the base layer is a Other"),
    ],
)
def test_what_it_declines_is_pefts(change, kwargs, words):
    model, x = build().eval(), torch.randn(2, 5, WIDTH)
    if change is not None:
        change(model)
    expected = model(x, **kwargs)
    lwft_kernels.accelerate(model)
    # not to the bit: whenever PEFT merges and takes out again, the base weights move by a rounding error
    torch.testing.assert_close(model(x, **kwargs), expected)
    assert [words in reason for reason in declined()] == [True]


def test_mixed_batches_are_refused_as_by_peft():
    model = build().eval()
    lwft_kernels.accelerate(model)
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model(torch.randn(2, 5, WIDTH), adapter_names=["default", "default"])


def test_what_peft_does_afterwards(tmp_path):
    model, x = build().eval(), torch.randn(2, 5, WIDTH)
    keys = list(model.state_dict())
    expected = model(x)
    report = lwft_kernels.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    report.undo()
    torch.testing.assert_close(model(x), expected)
    assert type(model.merge_and_unload().mha) is nn.MultiheadAttention


def test_compiles_without_a_graph_break():
    model, x = build(), torch.randn(2, 5, WIDTH)
    lwft_kernels.accelerate(model)
    expected = model(x)
    layer = model.base_model.model
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
