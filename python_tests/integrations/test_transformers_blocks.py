"""The blocks of transformers that end in a sum and a norm: numbers, which are known, and what must not change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from oracle import assert_accurate
from torch import nn
from transformers import AutoModel
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
from transformers.trainer_pt_utils import get_module_class_from_name

import lwft_kernels
from lwft_kernels.integrations import drift, transformers_blocks
from lwft_kernels.integrations.report import Report

pytestmark = pytest.mark.usefixtures("native")

NEW = int(transformers.__version__.split(".")[0]) >= 5
WIDTH = 24
COMMON = {"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"intermediate_size": 32, "max_position_embeddings": 40, "hidden_act": "gelu", "pad_token_id": 1}
COMMON |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT = {"vocab_size": 50, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "dropout": 0.0}
DISTILBERT |= {"attention_dropout": 0.0, "max_position_embeddings": 40}

# family: its blocks, and how many norms of a forward pass are ours
FAMILIES = {
    "bert": ({}, 4, 4),
    "roberta": ({}, 4, 4),
    "xlm-roberta": ({}, 4, 4),
    "camembert": ({}, 4, 4),
    "electra": ({"embedding_size": WIDTH}, 4, 4),
    "ernie": ({}, 4, 4),
    "layoutlm": ({}, 4, 4),
    "deberta-v2": ({}, 4, 4),
    "albert": ({"embedding_size": 12}, 1, 2),
    "distilbert": (None, 2, 4),
}


def build(family, dtype=torch.float32, **options):
    torch.manual_seed(1)
    more = FAMILIES[family][0] if family in FAMILIES else {}
    settings = DISTILBERT if more is None else {**COMMON, **more}
    config = transformers.AutoConfig.for_model(family, **{**settings, **options})
    model = AutoModel.from_config(config).train()
    with torch.no_grad():  # norms start at one and zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def accelerate(model, **options):
    changes = transformers_blocks.plan(model, **options)
    for change in changes:
        if change.now is not None:
            change.apply()
    return Report(model, changes, {}, applied=True)


def ids():
    return torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(2))


def outputs_and_gradients(model):
    model = copy.deepcopy(model)
    out = model(ids()).last_hidden_state
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(out.dtype)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad((out * direction).sum(), list(named.values()), allow_unused=True)
    return {"out": out, **{n: g for n, g in zip(named, gradients, strict=True) if g is not None}}


def counts():
    return {op: (counted["fast"], set(counted["declined"])) for op, counted in lwft_kernels.stats().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if NEW or family not in ("albert", "distilbert")])
def test_families(family, dtype):
    _, blocks, norms = FAMILIES[family]
    model = build(family, dtype)
    theirs = outputs_and_gradients(model)
    oracle = outputs_and_gradients(copy.deepcopy(model).double())
    report = accelerate(model, strict=True)
    assert len(report.replaced) == blocks and not report.declined, report
    ours = outputs_and_gradients(model)
    assert counts() == {"add_layer_norm": (norms, set())}
    # per parameter a key's bias has a gradient of rounding errors alone: softmax does not see it
    keys = [name for name in oracle if not name.endswith(("key.bias", "k_lin.bias", "key_proj.bias"))]
    assert_accurate(*({name: found[name] for name in keys} for found in (ours, theirs, oracle)))


def output_block(dropout=0.0):
    config = transformers.BertConfig(**{**COMMON, "hidden_dropout_prob": dropout})
    return BertOutput(config)


def inputs():
    return torch.randn(3, 5, 32), torch.randn(3, 5, WIDTH)


def test_dropout_is_that_of_add_layer_norm():
    block, (hidden, residual) = output_block(0.3), inputs()
    accelerate(block)
    torch.manual_seed(3)
    out = block(hidden, residual)
    torch.manual_seed(3)
    norm = block.LayerNorm
    expected = lwft_kernels.functional.add_layer_norm(
        residual, block.dense(hidden), norm.weight, norm.bias, norm.eps, dropout_p=0.3
    )
    assert torch.equal(out, expected)
    block.eval()
    assert torch.equal(block(hidden, residual), block(hidden, input_tensor=residual))


def test_the_objects_the_names_and_the_state_dict_stay():
    model = build("bert")
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    state = list(model.state_dict())
    report = accelerate(model)
    assert {name: id(module) for name, module in model.named_modules()} == {n: i for n, (i, _) in before.items()}
    assert list(model.state_dict()) == state
    block = model.encoder.layer[0].output
    assert isinstance(block, BertOutput) and not isinstance(block, BertSelfOutput)
    # as FSDP's wrapping policies find it
    assert get_module_class_from_name(model, "BertOutput") is type(block)
    again = accelerate(model)
    assert not again.replaced and {change.reason for change in again.changes} == {"replaced already"}
    report.undo()
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"] if NEW else ["bert"])
def test_copies_compute_the_same(family, tmp_path):
    model = build(family)
    accelerate(model)
    expected = model(ids()).last_hidden_state
    torch.save(model, tmp_path / "model")
    twins = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model", weights_only=False),
    )
    for twin in twins:
        lwft_kernels.reset_stats()
        assert torch.equal(twin(ids()).last_hidden_state, expected)
        assert counts() == {"add_layer_norm": (FAMILIES[family][2], set())}
        assert {type(m) for m in twin.modules()} == {type(m) for m in model.modules()}


def test_hooks_fire_and_what_has_them_is_called():
    model, seen = build("bert"), []
    accelerate(model)
    model.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda *_: seen.append("norm"))
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: seen.append("dense"))
    model(ids())
    assert seen == ["norm", "dense"]
    assert counts()["add_layer_norm"] == (3, set())
    assert counts()["residual and LayerNorm"] == (0, {"the norm or the dropout has hooks"})


def test_what_transformers_records_is_the_same():
    for family in ("bert", "distilbert", "albert") if NEW else ("bert",):
        model = build(family, attn_implementation="eager").eval()
        wanted = {"output_hidden_states": True, "output_attentions": True}
        theirs = model(ids(), **wanted)
        accelerate(model)
        ours = model(ids(), **wanted)
        for name in ("hidden_states", "attentions"):
            assert len(ours[name]) == len(theirs[name]) > 0
            for mine, other in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(mine, other)


def test_gradient_checkpointing():
    gradients = []
    model = build("bert", hidden_dropout_prob=0.2)
    accelerate(model)
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(4)
        model(ids()).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_compiles_without_a_graph_break():
    block, (hidden, residual) = output_block(), inputs()
    accelerate(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, residual), block(hidden, residual))


def test_with_peft():
    peft = pytest.importorskip("peft")
    model = build("bert")
    config = peft.LoraConfig(target_modules=["dense"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    expected = model(ids()).last_hidden_state
    assert len(accelerate(model).replaced) == 4
    torch.testing.assert_close(model(ids()).last_hidden_state, expected)


class Own(BertOutput):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states)) + input_tensor


class Named(BertOutput):
    pass


def test_others_are_left_alone():
    config = transformers.BertConfig(**COMMON)
    model = nn.ModuleDict({"own": Own(config), "named": Named(config), "patched": output_block()})
    model["patched"].forward = model["patched"].forward
    rms = output_block()
    rms.LayerNorm = nn.RMSNorm(WIDTH)
    model["rms"] = rms
    report = accelerate(model)
    # the forward decides: a subclass that does not override it is known, one that does is none of transformers'
    assert [change.module for change in report.replaced] == ["named"] and isinstance(model["named"], Named)
    assert {change.module: change.reason for change in report.declined} == {
        "patched": "somebody else has replaced its forward",
        "rms": "its LayerNorm is a RMSNorm",
    }
    report.undo()
    assert type(model["named"]) is Named


def test_x_mod_is_known_to_be_another():
    report = accelerate(build("xmod", languages=["en_XX"], default_language="en_XX"))
    reasons = {change.reason for change in report.changes}
    assert not report.replaced and "its forward is of another form" in reasons


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"] if NEW else ["bert"])
def test_drift(family, monkeypatch):
    for form in transformers_blocks._FORMS:
        monkeypatch.setattr(form, "known", frozenset())
    model = build(family)
    report = accelerate(model, strict=True)
    assert not report.replaced and all("strict=True" in change.reason for change in report.changes)
    monkeypatch.setattr(drift, "_verdicts", {})
    with pytest.warns(drift.DriftWarning, match="self-test passed"):
        report = accelerate(model)
    assert report.replaced and not report.declined
    report.undo()

    form = type(report._modules[report.replaced[0].module]())
    (block, *_) = (m for m in model.modules() if type(m) is form)
    recognised = transformers_blocks._recognised(block)
    original = form.forward
    monkeypatch.setattr(form, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs) * 1.001)
    assert "differs" in transformers_blocks._self_test(block, recognised)
