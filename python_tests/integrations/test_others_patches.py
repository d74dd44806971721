"""What other packages have put into a model stays where they put it, and the report says so."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.models.llama import modeling_llama

import lwft_kernels

pytestmark = pytest.mark.usefixtures("native")


def build():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False)).eval()


def layers(model):
    return model.base_model.model.model.layers


def logits(model):
    return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def reasons(report):
    return {change.module.removeprefix("base_model.model.model.layers."): change.reason for change in report.declined}


def test_a_forward_of_the_instance():
    """As kernels, accelerate's offloading and axolotl do it."""
    model = build()
    theirs = layers(model)[0].self_attn.q_proj
    theirs.forward = types.MethodType(lambda self, x: 2 * self.base_layer(x), theirs)
    kept, expected = theirs.forward, logits(model)
    report = lwft_kernels.accelerate(model)
    assert reasons(report) == {"0.self_attn.q_proj": "somebody else has replaced its forward"}
    torch.testing.assert_close(logits(model), expected)
    assert theirs.forward is kept and not report.unreached()
    report.undo()
    assert theirs.forward is kept and type(theirs) is lora.Linear


def test_a_subclass():
    model = build()

    class Theirs(lora.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers(model)[1].mlp.up_proj.__class__ = Theirs
    expected = logits(model)
    report = lwft_kernels.accelerate(model)
    (reason,) = reasons(report).values()
    assert list(reasons(report)) == ["1.mlp.up_proj"] and reason
    torch.testing.assert_close(logits(model), expected)
    report.undo()
    assert type(layers(model)[1].mlp.up_proj) is Theirs


def test_functions_of_a_module_and_forwards_of_instances(monkeypatch):
    """As Liger does it: another rotary embedding for all, other MLPs for this model."""
    calls = []
    rotary = modeling_llama.apply_rotary_pos_emb

    def their_rotary(*args, **kwargs):
        calls.append("rotary")
        return rotary(*args, **kwargs)

    def their_mlp(self, x):
        calls.append("mlp")
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", their_rotary)
    model = build()
    for layer in layers(model):
        layer.mlp.forward = types.MethodType(their_mlp, layer.mlp)
    expected = logits(model)
    calls.clear()
    report = lwft_kernels.accelerate(model)
    torch.testing.assert_close(logits(model), expected)
    assert calls == ["rotary", "mlp"] * 2, "theirs is called as before"
    assert not report.declined and not report.unreached(), "and what is ours is beside it"


def test_a_forward_of_a_class(monkeypatch):
    """As unsloth does it: other code for every LoRA layer of the process."""
    original = lora.Linear.forward

    def their_forward(self, x, *args, **kwargs):
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", their_forward)
    model = build()
    report = lwft_kernels.accelerate(model)
    assert len(reasons(report)) == 4
    assert all("somebody else has replaced" in reason for reason in reasons(report).values())
    assert all(type(layer.self_attn.q_proj) is lora.Linear for layer in layers(model))


def their_attention(self, hidden_states, *args, **kwargs):
    return self.o_proj(self.v_proj(hidden_states)), None


def test_attention_that_no_longer_asks_for_a_function(monkeypatch):
    """The same for attention: code of theirs that calls no interface. Nothing of ours would be reached."""
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", their_attention)
    model = build()
    expected = logits(model)
    report = lwft_kernels.accelerate(model, lora=False)
    assert not report.replaced and report.declined[0].reason
    assert torch.equal(logits(model), expected)


def test_an_attention_instance_of_theirs_is_found_out_when_it_runs():
    """Its class still asks for our function, the instance does not: in place, and never reached."""
    model = build()
    attention = layers(model)[0].self_attn
    attention.forward = types.MethodType(
        lambda self, x, *args, **kwargs: (self.o_proj(self.v_proj(x)), None), attention
    )
    report = lwft_kernels.accelerate(model, lora=False)
    logits(model)
    unreached = [change.module for change in report.unreached()]
    declined = list(reasons(report))
    assert "0.self_attn" in declined or unreached == ["base_model.model.model.layers.0.self_attn"]
    assert "0.self_attn" in str(report)
