"""PEFT's prefix tuning, prompt tuning and LLaMA-Adapter through `accelerate`, against PEFT's own paths."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers
from oracle import assert_accurate, relative_error
from peft import AdaptionPromptConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.tuners.adaption_prompt import layer as adaption
from torch import nn

import lwft_kernels
from lwft_kernels.integrations import drift
from lwft_kernels.integrations.peft import prefix as room

pytestmark = pytest.mark.usefixtures("native")

P = 3  # virtual tokens
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}


def base_model(family, **options):
    torch.manual_seed(1)
    grouped = {**SMALL, "num_key_value_heads": 2, **SPECIAL, **options}
    plain = {**SMALL, **SPECIAL, **options}
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped))
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**grouped))
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**grouped, head_dim=8))
    if family == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**{"sliding_window": None, **grouped}))
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, **SPECIAL, **options))
    if family == "opt":
        # not relu: in bfloat16 a value near zero falls on either side of it by luck
        sizes = {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "activation_function": "gelu"}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**{**plain, **sizes}))
    if family == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**plain))
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**plain))
    return transformers.RobertaModel(transformers.RobertaConfig(**{**plain, "pad_token_id": 1}))


CAUSAL = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "opt", "gpt_neox"]
ENCODERS = ["bert", "roberta"]


def build(family, config=None, **options):
    task = "FEATURE_EXTRACTION" if family in ENCODERS else "CAUSAL_LM"
    config = PrefixTuningConfig(num_virtual_tokens=P) if config is None else config
    config.task_type = task
    model = get_peft_model(base_model(family, **options), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def batch(family="llama", padding="right", length=9):
    ids = torch.randint(3, 50, (3, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, 5:] = 0
    elif padding == "left":
        mask[0, :4] = 0
    return {"input_ids": ids, **({} if padding is None else {"attention_mask": mask})}


def direction(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16().double()


def outputs_and_gradients(model, given):
    out = model(**given)[0]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out.double().mul(direction(out)).sum(), list(named.values()))
    return {"out": out, **dict(zip(named, gradients, strict=True))}


def fast():
    return lwft_kernels.stats().get("attention", {"fast": 0})["fast"]


def declined(op=room._PREFIX):
    return lwft_kernels.stats().get(op, {"declined": {}})["declined"]


def check(model, given, dtype=torch.float32, calls=2):
    model = model.to(dtype).eval()
    theirs = outputs_and_gradients(model, given)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), given)
    report = lwft_kernels.accelerate(model)
    lwft_kernels.reset_stats()
    ours = outputs_and_gradients(model, given)
    for results in (theirs, oracle, ours):  # the gradient of a gate is one number, exact or not by luck
        gates = [results.pop(name) for name in list(results) if results[name].numel() == 1]
        if gates and dtype != torch.bfloat16:
            results["gates"] = torch.cat([gate.flatten() for gate in gates])
    assert_accurate(ours, theirs, oracle)
    assert fast() == calls and not declined() and not declined(room._ADAPTION), lwft_kernels.stats()
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", CAUSAL + ENCODERS)
def test_prefix(family, padding, dtype):
    check(build(family), batch(padding=padding), dtype)


def test_prefix_through_a_projection():
    config = PrefixTuningConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16)
    check(build("llama", config), batch())


def test_one_token_and_no_gradient():
    model, given = build("llama").eval(), batch(padding=None, length=1)
    with torch.no_grad():
        theirs = model(**given).logits
        lwft_kernels.accelerate(model)
        ours = model(**given).logits
    torch.testing.assert_close(ours, theirs)
    assert not declined()


def watch_the_attention(monkeypatch):
    """The keys and prefixes that the attention op is called with."""
    calls = []
    attention = lwft_kernels.functional.attention

    def watched(q, k, v, **options):
        calls.append((k, options.get("prefix_k")))
        return attention(q, k, v, **options)

    monkeypatch.setattr(room.LF, "attention", watched)
    return calls


def test_nothing_is_joined_or_repeated(monkeypatch):
    model, given = build("llama"), batch()
    lwft_kernels.accelerate(model)
    model(**given)
    calls = watch_the_attention(monkeypatch)
    model(**given)
    assert [(k.shape[2], p.shape[0], p.shape[2]) for k, p in calls] == [(9, 1, P), (9, 1, P)]


def test_the_cache_that_is_returned_is_peft_s():
    model, given = build("llama").eval(), batch()
    with torch.no_grad():
        theirs = model(**given, use_cache=True).past_key_values
        lwft_kernels.accelerate(model)
        ours = model(**given, use_cache=True).past_key_values
    assert ours.get_seq_length() == theirs.get_seq_length() == P + 9
    for our, their in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(our.keys, their.keys)
        torch.testing.assert_close(our.values, their.values)
    # and it goes on from there as theirs does
    more = torch.randn(3, 2, 1, 8)
    for cache in (ours, theirs):
        cache.update(more, more, 0)
        cache.reorder_cache(torch.tensor([1, 0, 2]))
    torch.testing.assert_close(ours.layers[0].keys, theirs.layers[0].keys)
    assert ours.layers[0].keys.shape == (3, 2, P + 10, 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generate_gives_peft_s_tokens(family, options):
    model, given = build(family).eval(), batch(padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    theirs = model.generate(**given, **options)
    lwft_kernels.accelerate(model)
    model(**given)
    assert torch.equal(model.generate(**given, **options), theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(family, projection, reentrant):
    config = PrefixTuningConfig(num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    none = {"gpt2": dropout, "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    model, given = build(family, config, **none.get(family, {})), batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def results():
        for parameter in trained:
            parameter.grad = None
        out = model.train()(**given)[0]
        out.double().mul(direction(out)).sum().backward()
        return {"out": out.detach(), **{str(i): p.grad for i, p in enumerate(trained)}}

    theirs = results()  # PEFT's own, without checkpointing
    lwft_kernels.accelerate(model)
    model(**given)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    lwft_kernels.reset_stats()
    ours = results()
    assert fast() == 4 and not declined()  # two layers, computed twice
    oracle_model = copy.deepcopy(model).double()
    lwft_kernels.reset_stats()
    model, trained = oracle_model, [p for p in oracle_model.parameters() if p.requires_grad]
    oracle = results()
    assert_accurate(ours, theirs, oracle)


def test_checkpointed_dropout_is_drawn_again():
    model, given = build("llama", attention_dropout=0.4), batch()
    lwft_kernels.accelerate(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        torch.manual_seed(5)
        out = model.train()(**given)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    for direct, checkpointed in zip(*results, strict=True):
        assert torch.equal(direct, checkpointed)


def test_dropout_same_seed_same_bits_and_the_moments_of_theirs():
    model, given = build("llama", attention_dropout=0.3).train(), batch(length=4, padding=None)

    def moments():
        with torch.no_grad():
            runs = torch.stack([model(**given).logits[:, -1] for _ in range(400)])
        return runs.mean(0), runs.std(0)

    their_mean, their_deviation = moments()
    lwft_kernels.accelerate(model)
    torch.manual_seed(6)
    first = model(**given).logits
    torch.manual_seed(6)
    assert torch.equal(model(**given).logits, first)
    our_mean, our_deviation = moments()
    assert ((our_mean - their_mean).abs() <= 6 * their_deviation * (2 / 400) ** 0.5 + 1e-6).all()
    assert relative_error(our_deviation, their_deviation) < 0.15


def test_two_passes_before_one_backward_keep_their_own_prefix():
    model, given = build("llama").eval(), batch()
    lwft_kernels.accelerate(model)
    model(**given)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with_prefix = model(**given).logits
    with model.disable_adapter():
        without = model(**given).logits
    assert (with_prefix - without).abs().max() > 1e-3
    alone = torch.autograd.grad(model(**given).logits.square().sum(), trained)
    both = torch.autograd.grad(with_prefix.square().sum() + 0.0 * without.sum(), trained)
    for ours, expected in zip(both, alone, strict=True):
        assert torch.equal(ours, expected)


def test_autocast():
    model, given = build("llama").eval(), batch()
    oracle = {"out": copy.deepcopy(model).double()(**given).logits}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = {"out": model(**given).logits}
        lwft_kernels.accelerate(model)
        ours = {"out": model(**given).logits}
    assert_accurate(ours, theirs, oracle)
    assert not declined()


def test_a_sliding_window_moves_past_the_prefix_as_it_does_in_peft():
    model, given = build("mistral", sliding_window=4).eval(), batch()
    theirs = outputs_and_gradients(model, given)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), given)
    lwft_kernels.accelerate(model)
    lwft_kernels.reset_stats()
    assert_accurate(outputs_and_gradients(model, given), theirs, oracle)
    assert fast() == 2 and sum(declined().values()) == 2
    assert all("window" in reason for reason in declined())


def test_adapters_are_switched_and_disabled():
    model, given = build("llama").eval(), batch()
    model.add_adapter("long", PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    reference = copy.deepcopy(model)
    lwft_kernels.accelerate(model)
    for name in ("default", "long", "default"):
        model.set_adapter(name)
        reference.set_adapter(name)
        torch.testing.assert_close(model(**given).logits, reference(**given).logits)
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(model(**given).logits, reference(**given).logits)
    torch.testing.assert_close(model(**given).logits, reference(**given).logits)
    assert not declined()


def test_a_model_that_does_not_hand_the_argument_on_takes_peft_s_path():
    model, given = build("llama"), batch()
    attention = type(model.get_base_model().model.layers[0].self_attn)

    class Deaf(attention):
        def forward(self, hidden_states, lwft_instead=None, **kwargs):  # as if it called ALL_ATTENTION_FUNCTIONS
            return super().forward(hidden_states, **kwargs)

    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = Deaf
    theirs = outputs_and_gradients(model.eval(), given)
    transformers_too = lwft_kernels.accelerate(model)
    assert transformers_too.replaced
    for _ in range(2):
        ours = outputs_and_gradients(model, given)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])
    assert any("hand" in reason for reason in declined()), declined()


def test_a_mistake_of_the_caller_raises_as_before_and_is_no_reason():
    model, given = build("llama"), batch()
    lwft_kernels.accelerate(model)
    with pytest.raises(TypeError):
        model(**given, no_such_argument_of_the_model=1, position_ids="nonsense", inputs_embeds="nonsense")
    assert model(**given).logits.shape == (3, 9, 50) and not declined()


def test_attention_that_is_not_ours_takes_peft_s_path_to_the_bit():
    model, given = build("llama").eval(), batch()
    expected = model(**given).logits
    lwft_kernels.accelerate(model, attention=False)
    assert type(model) is room.PrefixCausalLM
    assert torch.equal(model(**given).logits, expected)
    assert declined() == {"the attention of the model is not ours": 1}


def test_report_undo_and_again():
    model, given = build("llama").eval(), batch()
    keys = list(model.state_dict())
    first = lwft_kernels.accelerate(model)
    assert [c.now for c in first.changes if "PREFIX_TUNING" in c.was] == ["prefix beside the keys"]
    second = lwft_kernels.accelerate(model)
    assert [c.reason for c in second.changes if "PREFIX_TUNING" in c.was] == ["replaced already"]
    with model.disable_adapter():  # after which PEFT leaves a bound method of the class behind
        model(**given)
    assert list(model.state_dict()) == keys
    second.undo()
    first.undo()
    assert type(model) is peft.PeftModelForCausalLM
    assert "forward" not in model.__dict__
    model(**given)


def test_disabled_once_before_it_is_replaced():
    model, given = build("llama").eval(), batch()
    with model.disable_adapter():
        pass
    before = model.__dict__["forward"]
    report = lwft_kernels.accelerate(model)
    lwft_kernels.reset_stats()
    model(**given)
    assert type(model) is room.PrefixCausalLM and fast() == 2 and not declined()
    report.undo()
    assert model.__dict__["forward"] == before


def test_copies_pickles_and_what_is_saved(tmp_path):
    model, given = build("llama").eval(), batch()
    model.save_pretrained(tmp_path / "before")
    lwft_kernels.accelerate(model)
    expected = model(**given).logits
    assert torch.equal(copy.deepcopy(model)(**given).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**given).logits, expected)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_an_encoder_decoder_is_left_with_a_reason():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    bart = transformers.BartConfig(d_model=32, vocab_size=50, max_position_embeddings=32, **heads, **sizes)
    config = PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(transformers.BartForConditionalGeneration(bart), config).eval()
    given = batch() | {"decoder_input_ids": batch()["input_ids"][:, :4]}
    theirs = model(**given).logits
    report = lwft_kernels.accelerate(model)
    assert any("encoder-decoder" in (c.reason or "") for c in report.changes)
    torch.testing.assert_close(model(**given).logits, theirs)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_is_served_by_the_attention_kernel(config):
    options = {"encoder_hidden_size": 16} if config is PromptEncoderConfig else {}
    model = build("llama", config(num_virtual_tokens=P, **options))
    report = check(model, batch())
    (reason,) = [c.reason for c in report.changes if "PROMPT_TUNING" in c.was or "P_TUNING" in c.was]
    assert "attention kernel serves" in reason


# --- LLaMA-Adapter ------------------------------------------------------------------------------------------------


def adapted(family, dtype=torch.float32, **options):
    model = build(family, AdaptionPromptConfig(adapter_len=4, adapter_layers=2), **options)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_adaption_prompt(family, dtype):
    report = check(adapted(family), batch(), dtype, calls=4)
    assert [c.now for c in report.changes if "Adapted" in c.was] == ["adaption prompt beside the keys"] * 2


def test_adaption_prompt_with_a_bias_behind_it():
    model = adapted("llama", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    check(model, batch(), calls=4)


def test_the_queries_are_computed_once():
    model, given = adapted("llama").eval(), batch()
    lwft_kernels.accelerate(model)
    calls = []
    for layer in model.get_base_model().model.layers:
        for part in (layer.self_attn.model.q_proj, layer.self_attn.model.o_proj):
            part.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    model(**given)
    assert sum(shape == (3, 9, 32) for shape in calls) == 2 + 4  # a hooked o_proj is called for both


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adaption_prompt_generates_peft_s_tokens(family):
    model, given = adapted(family).eval(), batch(padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs = model.generate(**given, **options)
    lwft_kernels.accelerate(model)
    assert torch.equal(model.generate(**given, **options), theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adaption_prompt_with_gradient_checkpointing(reentrant):
    model, given = adapted("llama").train(), batch()
    lwft_kernels.accelerate(model)
    results = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for checkpointing in (False, True):
        if checkpointing:
            base = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            base.enable_input_require_grads()
        for parameter in trained:
            parameter.grad = None
        out = model(**given).logits
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in trained)])
    for direct, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(direct, checkpointed)


def test_adaption_prompts_that_are_declined_are_peft_s_to_the_bit():
    model, given = adapted("llama").eval(), batch()
    expected = model(**given).logits
    lwft_kernels.accelerate(model, attention=False)
    assert torch.equal(model(**given).logits, expected)
    assert declined(room._ADAPTION) == {"the attention of the model is not ours": 2}


def test_adaption_prompt_undo_and_a_class_that_is_not_known():
    model = adapted("llama")
    first, second = (layer.self_attn for layer in model.get_base_model().model.layers)

    class Theirs(adaption.AdaptedAttention):
        pass

    second.__class__ = Theirs
    report = lwft_kernels.accelerate(model)
    assert type(first) is room.FusedAdaptedAttention and type(second) is Theirs
    assert any("not known" in (c.reason or "") for c in report.changes)
    report.undo()
    assert type(first) is adaption.AdaptedAttention


# --- drift --------------------------------------------------------------------------------------------------------

UPSTREAM = [u for original in (*room._MODELS, *room._ADAPTED) for u in room._upstream(original)]


@pytest.mark.parametrize("upstream", UPSTREAM, ids=lambda u: u.name)
def test_drift_guard_knows_the_release_and_its_self_test_passes(upstream):
    assert drift.fingerprint(*upstream.functions) in upstream.known
    assert upstream.self_test() is None


@pytest.mark.parametrize("original", [*room._MODELS, *room._ADAPTED], ids=lambda c: c.__name__)
def test_the_self_test_finds_a_difference(original, monkeypatch):
    attention = lwft_kernels.functional.attention

    def twofold(*args, prefix_v=None, **options):
        return attention(*args, **options, prefix_v=None if prefix_v is None else 2 * prefix_v)

    monkeypatch.setattr(room.LF, "attention", twofold)
    assert room._upstream(original)[0].self_test() is not None
