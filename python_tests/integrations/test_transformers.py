"""Attention of transformers models through `accelerate`: numbers against the oracle, counts, declines and undo."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from oracle import assert_accurate
from torch import nn

import lwft_kernels

pytestmark = pytest.mark.usefixtures("native")

VOCABULARY, BATCH, LENGTH = 61, 3, 11
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def build(family):
    """A tiny random model of a family, with dropout off and its default attention."""
    torch.manual_seed(1)
    t = transformers
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "bert":
        return t.BertForMaskedLM(t.BertConfig(**SMALL, intermediate_size=48, **quiet))
    if family == "roberta":
        return t.RobertaForMaskedLM(t.RobertaConfig(**SMALL, intermediate_size=48, pad_token_id=0, **quiet))
    if family == "distilbert":
        config = t.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            dropout=0.0,
            attention_dropout=0.0,
        )
        return t.DistilBertForMaskedLM(config)
    if family == "gpt2":
        config = t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return t.GPT2LMHeadModel(config)
    if family == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED))
    if family == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}))
    if family == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4))
    if family == "gemma2":
        config = t.Gemma2Config(
            **GROUPED, attn_logit_softcapping=0.5, query_pre_attn_scalar=16, sliding_window=4
        )
        return t.Gemma2ForCausalLM(config)
    if family == "t5":
        config = t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        return t.T5ForConditionalGeneration(config)
    raise KeyError(family)


FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "mistral", "gemma2", "t5")


def batch(padded):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 8:] = 0  # every query of a window of 4 sees a key: transformers answers NaN where none is
        mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, padded):
    model, inputs = build(family).train(), batch(padded)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    oracle = loss_and_gradients(copy.deepcopy(eager).double(), inputs)
    theirs = loss_and_gradients(eager, inputs)
    report = lwft_kernels.accelerate(model)
    ours = loss_and_gradients(model, inputs)
    assert_accurate(_all(ours), _all(theirs), _all(oracle))
    assert ours.keys() == oracle.keys()
    stats = lwft_kernels.stats()
    assert stats["attention"]["fast"] == len(report.replaced) > 0
    assert list(stats) == ["attention"], stats


def _all(results):
    """The loss, and all gradients in one vector: single rounding errors of tiny tensors are luck."""
    gradients = [value.flatten().double() for name, value in sorted(results.items()) if name != "loss"]
    return {"loss": results["loss"], "gradients": torch.cat(gradients)}


@pytest.mark.parametrize("family", ["bert", "gemma2", "t5"])
def test_undo_restores_everything(family):
    model, inputs = build(family).eval(), batch(True)
    before, configuration = model(**inputs).logits, model.config.to_json_string()
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    classes = [type(m) for m in model.modules()]
    state = list(model.state_dict())
    report = lwft_kernels.accelerate(model)
    assert model.config._attn_implementation == "lwft"
    assert model.config.to_json_string() == configuration
    assert list(model.state_dict()) == state
    report.undo()
    report.undo()
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == implementations
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**inputs).logits, before)


def test_report_names_modules_and_reasons():
    model = nn.ModuleDict({"text": build("bert"), "other": build_bloom(), "head": nn.Linear(3, 3)})
    report = lwft_kernels.explain(model)
    assert [c.module for c in report.replaced] == [
        f"text.bert.encoder.layer.{i}.attention.self" for i in range(2)
    ]
    assert report.replaced[0].was == "BertSelfAttention: sdpa"
    (declined,) = report.declined
    assert declined.module == "other" and "attention interface" in declined.reason
    table = str(report)
    assert "2 of 3 replaced" in table and "transformers 5" in table and "unchanged: its code" in table
    assert model["text"].config._attn_implementation == "sdpa"  # explain changes nothing


def build_bloom():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


def test_a_second_call_finds_nothing_new():
    model = build("llama")
    lwft_kernels.accelerate(model)
    again = lwft_kernels.accelerate(model)
    assert again.replaced == [] and {c.reason for c in again.declined} == {"replaced already"}
    again.undo()
    assert model.config._attn_implementation == "lwft"


def test_attention_sinks_go_to_the_library():
    config = transformers.GptOssConfig(
        **GROUPED, num_local_experts=2, num_experts_per_tok=1, layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    nn.init.normal_(model.model.layers[0].self_attn.sinks)
    nn.init.normal_(model.model.layers[1].self_attn.sinks)
    model.set_attn_implementation("eager")
    inputs = batch(True)
    expected = model(**inputs).logits
    lwft_kernels.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert lwft_kernels.stats()["transformers attention"]["declined"] == {"s_aux is given": 2}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(cache):
    model = build("llama").eval()
    inputs = {k: v for k, v in batch(False).items() if k != "labels"}
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = model.generate(**inputs, **options)
    lwft_kernels.accelerate(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert lwft_kernels.stats()["attention"]["fast"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast_hands_over_mixed_dtypes(family, dtype):
    model, inputs = build(family), batch(True)
    oracle = copy.deepcopy(model).double()(**inputs).logits
    results = []
    for accelerated in (False, True):
        if accelerated:
            lwft_kernels.accelerate(model)
        with torch.autocast("cpu", dtype=dtype):
            results.append(model(**inputs).logits)
    keep = inputs["attention_mask"].bool()
    theirs, ours = ({"logits": r[keep]} for r in results)
    assert_accurate(ours, theirs, {"logits": oracle[keep]})


def test_dropout_in_training_only_and_repeatable():
    config = transformers.BertConfig(**SMALL, intermediate_size=48, hidden_dropout_prob=0.0)
    model = transformers.BertModel(config)
    inputs = {k: v for k, v in batch(True).items() if k != "labels"}
    lwft_kernels.accelerate(model)
    model.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(**inputs).last_hidden_state)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_gradient_checkpointing():
    model, inputs = build("llama").train(), batch(True)
    lwft_kernels.accelerate(model)
    plain = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = loss_and_gradients(model, inputs)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_deepcopy_and_save(tmp_path):
    model, inputs = build("bert").eval(), batch(True)
    lwft_kernels.accelerate(model)
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    assert "lwft" not in (tmp_path / "config.json").read_text()
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_compiles_without_a_graph_break():
    model = build("bert").eval()
    inputs = {k: v for k, v in batch(False).items() if k == "input_ids"}
    lwft_kernels.accelerate(model)
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_not_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        lwft_kernels.accelerate("bert")
