"""Attention of transformers models through `accelerate`: numbers against the oracle, counts, declines and undo."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from oracle import assert_accurate
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lwft_kernels
from lwft_kernels.integrations.transformers import attention_forward

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
        config = t.Gemma2Config(**GROUPED, attn_logit_softcapping=0.5, query_pre_attn_scalar=16, sliding_window=4)
        return t.Gemma2ForCausalLM(config)
    if family == "t5":
        config = t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        return t.T5ForConditionalGeneration(config)
    if family == "bart":
        config = t.BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
            max_position_embeddings=32,
        )  # fmt: skip
        return t.BartForConditionalGeneration(config)
    raise KeyError(family)


FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "mistral", "gemma2", "t5", "bart")


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
    assert [c.module for c in report.replaced] == [f"text.bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert report.replaced[0].was == "BertSelfAttention: sdpa"
    (declined,) = report.declined
    assert declined.module == "other" and "attention interface" in declined.reason
    table = str(report)
    assert "2 of 3 replaced" in table and "transformers 5" in table and "unchanged: its code" in table
    assert model["text"].config._attn_implementation == "sdpa"  # explain changes nothing


def build_bloom():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_others_set_afterwards_stays(family):
    model = build(family)
    report = lwft_kernels.accelerate(model)
    model.set_attn_implementation("eager")
    report.undo()
    assert model.config._attn_implementation == "eager"


def test_a_part_that_cannot_is_named_and_kept():
    small = {**SMALL, "intermediate_size": 48}
    encoder = transformers.DebertaV2Model(transformers.DebertaV2Config(**small))
    config = transformers.BertConfig(**small, is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(config)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    ids = batch(False)["input_ids"]
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    before = [c._attn_implementation for c in (model.config, encoder.config, decoder.config)]
    report = lwft_kernels.accelerate(model)
    (declined,) = report.declined
    assert declined.module == "encoder" and "attention interface" in declined.reason
    assert len(report.replaced) == 4 and encoder.config._attn_implementation == before[1]
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
    assert lwft_kernels.stats()["attention"]["fast"] == 4
    report.undo()
    assert [c._attn_implementation for c in (model.config, encoder.config, decoder.config)] == before


def test_configs_of_parts_are_restored():
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**part, "image_size": 32, "patch_size": 8},
    )
    model = transformers.CLIPModel(config)
    configs = [config, config.text_config, config.vision_config]
    before = [c._attn_implementation for c in configs]
    report = lwft_kernels.accelerate(model)
    assert [c._attn_implementation for c in configs] == ["lwft"] * 3 and len(report.replaced) == 2
    report.undo()
    assert [c._attn_implementation for c in configs] == before


def test_models_that_know_sdpa_by_name_are_refused():
    # they hand the positions to attend to over to functions of other names, and SDPA would ignore them
    config = transformers.GlmMoeDsaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, index_topk=3, index_n_heads=2, index_head_dim=16, n_group=1, topk_group=1,
    )  # fmt: skip
    model = transformers.GlmMoeDsaForCausalLM(config).eval()
    inputs = {"input_ids": batch(False)["input_ids"], "use_cache": False}
    expected = model(**inputs).logits
    report = lwft_kernels.accelerate(model)
    assert not report.replaced and "not called sdpa" in report.declined[0].reason
    assert torch.equal(model(**inputs).logits, expected)
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="block_indices"):
        attention_forward(nn.Module(), q, q, q, None, block_indices=torch.zeros(1))


def test_what_was_chosen_by_hand_is_kept():
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    report = lwft_kernels.accelerate(model)
    assert not report.replaced and "flex_attention was chosen by hand" in report.declined[0].reason
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_output_attentions_go_to_the_library(family):
    model = build(family).eval()
    model.set_attn_implementation("eager")
    ids = batch(False)["input_ids"]
    expected = model(ids, output_attentions=True).attentions
    lwft_kernels.accelerate(model)
    matrices = model(ids, output_attentions=True).attentions
    assert len(matrices) == len(expected) == 2
    for ours, theirs in zip(matrices, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(lwft_kernels.stats()) == ["transformers attention"]


@pytest.mark.parametrize("form", ["bool", "float", "per head", "integer"])
def test_masks_of_the_users_own(form):
    model, ids = build("bert").eval(), batch(False)["input_ids"]
    allowed = torch.rand(BATCH, 4 if form == "per head" else 1, LENGTH, LENGTH) < 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    mask = allowed if form in ("bool", "per head") else torch.where(allowed, torch.randn(allowed.shape), -1e4)
    if form == "integer":  # what SDPA refuses is refused still
        mask = mask.to(torch.int64)
        lwft_kernels.accelerate(model)
        with pytest.raises(RuntimeError, match="attn_mask"):
            model(ids, attention_mask=mask)
        return
    theirs = model(ids, attention_mask=mask).logits
    wide = mask if mask.dtype == torch.bool else mask.double()
    oracle = copy.deepcopy(model).double()(ids, attention_mask=wide).logits
    lwft_kernels.accelerate(model)
    ours = model(ids, attention_mask=mask).logits
    assert_accurate({"logits": ours}, {"logits": theirs}, {"logits": oracle})
    assert list(lwft_kernels.stats()) == ["attention"]


class Layer(nn.Module):
    """What an attention function looks at in the module that calls it."""

    num_key_value_groups = 2

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("queries,keys", [(5, 5), (5, 9), (1, 9), (9, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("module_causal,kwarg", [(True, None), (False, None), (True, False), (False, True)])
def test_the_function_is_transformers_sdpa(queries, keys, bias, mask, module_causal, kwarg):
    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    q, k, v = tensor(2, queries, 4, 8), tensor(2, keys, 2, 8), tensor(2, keys, 2, 8)
    position_bias = tensor(1, 4, queries, keys) if bias else None
    attention_mask = None
    if mask is not None:
        attention_mask = torch.rand(2, 1, queries, keys) < 0.7
        attention_mask[..., 0] = True
    if mask == "float":
        attention_mask = attention_mask.double().log().clamp(min=-1e9)
    leaves = [t for t in (q, k, v, position_bias) if t is not None]
    results = []
    for function in (sdpa_attention_forward, attention_forward):
        out, weights = function(
            Layer(module_causal), *(t.transpose(1, 2) for t in (q, k, v)), attention_mask, scaling=0.3,
            is_causal=kwarg, position_bias=position_bias,
        )  # fmt: skip
        assert weights is None
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(lwft_kernels.stats()) == ["attention"]


def test_prefix_tuning_of_peft():
    for family, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
        model, inputs = peft.get_peft_model(build(family), config).eval(), batch(True)
        theirs = loss_and_gradients(model, inputs)
        report = lwft_kernels.accelerate(model)
        ours = loss_and_gradients(model, inputs)
        assert report.replaced and ours.keys() == theirs.keys() and len(ours) > 1
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


def test_transforms_go_to_the_library():
    model = build("bert").eval()
    words = model.get_input_embeddings()(batch(False)["input_ids"]).detach()

    def loss(words):
        return model(inputs_embeds=words).logits.square().sum()

    expected = torch.func.grad(loss)(words)
    lwft_kernels.accelerate(model)
    torch.testing.assert_close(torch.func.grad(loss)(words), expected)
    assert list(lwft_kernels.stats()) == ["transformers attention"]


def test_a_second_call_finds_nothing_new():
    model = build("llama")
    lwft_kernels.accelerate(model)
    again = lwft_kernels.accelerate(model)
    assert again.replaced == [] and {c.reason for c in again.declined} == {"replaced already"}
    again.undo()
    assert model.config._attn_implementation == "lwft"


def test_attention_sinks():
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
    with pytest.raises(TypeError, match="model must be a torch"):
        lwft_kernels.accelerate("bert")
