"""Frozen linear layers through `accelerate`: which are swapped, the numbers, and what else must not change."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from oracle import assert_accurate
from torch import nn

import lwft_kernels
from lwft_kernels.integrations import drift, frozen_linear, torch_nn
from lwft_kernels.lowrank import frozen

# The room leaves every layer as it is where the processor has no product of ours: this makes it believe otherwise, and
# the op then computes with whatever product there is.
pytestmark = pytest.mark.usefixtures("product")

D, H, LAYERS, TOKENS = 256, 512, 2, 160
SIZES = {"vocab_size": 320, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "intermediate_size": H}  # fmt: skip
ROOMS = ("attention", "lora", "adapters", "torch_nn", "layer_norm")


@pytest.fixture
def product(monkeypatch):
    library_says = frozen._library_says
    if library_says(torch.float32, 1024, 1024, 1024):
        return
    monkeypatch.setattr(frozen, "_is_own", {})

    def as_with_amx(dtype, rows, d_in, d_out):
        return dtype == torch.float32 and rows >= 64 and min(d_in, d_out) >= 256 and d_out % 16 == 0

    monkeypatch.setattr(frozen, "_library_says", as_with_amx)


def bert():
    torch.manual_seed(1)
    config = t.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return with_lora(t.BertForSequenceClassification(config), ["query", "value"], "SEQ_CLS")


def llama():
    torch.manual_seed(1)
    config = t.LlamaConfig(**SIZES, num_key_value_heads=4)
    return with_lora(t.LlamaForCausalLM(config), ["q_proj", "v_proj"], "CAUSAL_LM")


def with_lora(model, targets, task):
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type=task))
    with torch.no_grad():  # B starts at zero, and A has no gradient then
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def only(model, **options):
    """This room alone."""
    return lwft_kernels.accelerate(model, **dict.fromkeys(ROOMS, False), **options)


def step(model):
    torch.manual_seed(2)
    ids = torch.randint(0, 64, (2, TOKENS // 2))
    labels = ids if "Llama" in type(model.get_base_model()).__name__ else torch.tensor([0, 1])
    model.zero_grad()
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def names(report):
    return {change.module.removeprefix("base_model.model.") for change in report.replaced}


def numbered(*parts):
    return {f"{layer}.{i}.{part}" for i in range(LAYERS) for layer, part in parts}


BERT = numbered(*(("bert.encoder.layer", part) for part in (
    "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense",
))) | {"bert.pooler.dense"}  # fmt: skip
LLAMA = numbered(*(("model.layers", part) for part in (
    "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
))) | {"lm_head"}  # fmt: skip
MODELS = pytest.mark.parametrize(("build", "expected"), [(bert, BERT), (llama, LLAMA)], ids=["bert", "llama"])


@MODELS
@pytest.mark.parametrize("alone", [True, False])
def test_a_step_with_lora(build, expected, alone):
    """Losses and gradients of the adapters against float64, beside the model as it was."""
    model = build()
    oracle, eager = step(copy.deepcopy(model).double()), step(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    report = (only if alone else lwft_kernels.accelerate)(model)
    ours = step(model)
    if alone:
        assert names(report) == expected
        changed = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if type(m) is not classes[n]}
        assert changed == expected  # base layers and adapters untouched
        assert all("lora" in name for name in ours.keys() - {"loss", "logits"} if "classifier" not in name)
    assert expected <= names(report)
    assert report.unreached() == []
    assert lwft_kernels.stats()["frozen_linear"]["fast"] >= len(expected) - 1  # but the pooler, or none
    for name in oracle:
        assert_accurate({name: ours[name]}, {name: eager[name]}, {name: oracle[name]})
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    undone = step(model)
    assert all(torch.equal(undone[name], eager[name]) for name in eager)


def test_the_report():
    model = bert()
    planned = lwft_kernels.explain(model)
    assert not any(type(module) is frozen_linear.Linear for module in model.modules())
    rows = [row for row in str(planned).splitlines() if row.rstrip().endswith("frozen_linear")]
    assert len(rows) == 5 and "base_model.model.bert.encoder.layer.0-1.intermediate.dense" in str(rows)
    assert not any("frozen_linear" in str(c.now) for c in lwft_kernels.explain(model, frozen_linear=False).changes)
    with lwft_kernels.accelerated(model, frozen_linear=True):
        assert sum(type(module) is frozen_linear.Linear for module in model.modules()) == len(BERT)
        again = only(model)
        assert again.replaced == [] and {c.reason for c in again.declined} == {"replaced already"}
    assert not any(type(module) is frozen_linear.Linear for module in model.modules())


def layers():
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).requires_grad_(False)


def test_what_is_left_alone():
    class Derived(nn.Linear):
        pass

    left = nn.ModuleDict({
        "trained": nn.Linear(D, D),
        "trained_bias": nn.Linear(D, D),
        "narrow": nn.Linear(D, 7),
        "derived": Derived(D, D),
        "float64": nn.Linear(D, D, dtype=torch.float64),
        "meta": nn.Linear(D, D, device="meta"),
        "patched": nn.Linear(D, D),
        "attention": nn.MultiheadAttention(D, 4),
        "adapter": lwft_kernels.nn.BottleneckAdapter(D, D),
    }).requires_grad_(False)  # fmt: skip
    left["trained"].weight.requires_grad_()
    left["trained_bias"].bias.requires_grad_()
    left["patched"].forward = lambda x: x
    report = lwft_kernels.accelerate(left, torch_nn=False)
    assert report.replaced == []
    assert [(c.module, c.reason) for c in report.declined] == [("patched", "somebody else has replaced its forward")]


def test_a_forward_of_somebody_else(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: F.linear(input, self.weight, self.bias) + 1)
    monkeypatch.setattr(drift, "_verdicts", {})
    report = only(layers())
    assert report.replaced == [] and "somebody else has replaced torch.nn.Linear.forward" in report.changes[0].reason


def test_the_self_test():
    assert frozen_linear._self_test() is None


def test_nothing_without_a_product_of_ours(monkeypatch):
    monkeypatch.setattr(frozen, "_is_own", {})
    monkeypatch.setattr(frozen, "_library_says", lambda *kind: False)
    model = layers()
    assert only(model).changes == []
    with torch.no_grad():
        frozen_linear_calls = lwft_kernels.functional.frozen_linear(torch.ones(TOKENS, D), model[0].weight)
    assert frozen_linear_calls.shape == (TOKENS, H) and "frozen_linear" not in lwft_kernels.stats()


def test_unfrozen_later():
    model = layers()
    only(model)
    x = torch.randn(TOKENS, D)
    model[0].weight.requires_grad_()
    model[2].bias.requires_grad_()
    plain = copy.deepcopy(model)
    for module in plain:
        if type(module) is frozen_linear.Linear:
            module.__class__ = nn.Linear
    outs = model(x), plain(x)
    assert torch.equal(*outs)
    for out, kind in zip(outs, (model, plain), strict=True):
        out.square().sum().backward()
        assert kind[0].weight.grad is not None and kind[2].bias.grad is not None and kind[2].weight.grad is None
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
    declined = lwft_kernels.stats()["frozen_linear"]["declined"]
    assert declined == {"the layer is trained by now": 2}


def test_an_adapter_around_it_later():
    """PEFT keeps the swapped layer as its base layer, whose weight our LoRA layer reads as if it were torch's."""
    model = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).requires_grad_(False)
    only(model)
    model = with_lora(model, ["0"], None)
    report = lwft_kernels.accelerate(model)
    assert [change.now for change in report.replaced] == ["lora_linear"]
    x = torch.randn(TOKENS, D)
    out = model(x)
    stats = lwft_kernels.stats()
    assert stats["lora_linear"] == {"fast": 1, "declined": {}} and stats["frozen_linear"]["fast"] == 1
    report.undo()
    torch.testing.assert_close(out, model(x))


def test_what_encoder_layers_in_evaluation_read():
    """torch's own op for a whole layer reads the weights; that ours are of another class must not send it elsewhere."""
    encoder = nn.TransformerEncoderLayer(D, 4, H, batch_first=True).requires_grad_(False).eval()
    x = torch.randn(2, 16, D)
    expected = encoder(x)
    report = lwft_kernels.accelerate(encoder)
    assert names(report) == {"", "self_attn", "linear1", "linear2"}
    assert torch_nn._torch_fuses_layer(encoder, x)
    assert torch.equal(encoder(x), expected)


def test_hooks_copies_pickles_and_state_dict():
    model = layers()
    keys, seen = list(model.state_dict()), []
    x = torch.randn(TOKENS, D)
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    only(model)
    out = model(x)
    assert seen == ["after"] and list(model.state_dict()) == keys and isinstance(model[0], nn.Linear)
    model[0]._forward_hooks.clear()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is frozen_linear.Linear and torch.equal(copied(x), out)


def test_compile_of_a_model():
    model, x = layers(), torch.randn(TOKENS, D, requires_grad=True)
    report = only(model)
    eager = model(x)
    compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (compiled, eager)]
    torch.testing.assert_close(*gradients)
    assert report.unreached() == []


@pytest.mark.usefixtures("small_calls")
def test_generation_and_other_small_calls():
    model = llama().eval()
    ids = torch.randint(0, 64, (1, 4))
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    report = only(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert report.unreached() == [] and lwft_kernels.stats()["frozen_linear"]["fast"] == 0


def test_what_leaves_the_process_is_torchs():
    model, x = layers(), torch.randn(TOKENS, D)
    only(model)
    program = torch.export.export(model, (x,))
    assert not any("lwft" in str(node.target) for node in program.graph.nodes)
    traced = torch.jit.trace(model, x)
    assert "lwft::" not in str(traced.inlined_graph) and "aten::linear" in str(traced.inlined_graph)
