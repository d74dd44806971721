"""Attention of transformers models through `accelerate`: numbers against the oracle, counts, declines and undo."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from oracle import assert_accurate
from tiny_models import BATCH, BUILDERS, LENGTH, SMALL, VOCABULARY, batch, build
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lwft_kernels
from lwft_kernels.integrations.transformers import attention_forward, upstream

if upstream.RELEASE < (5,):
    pytest.skip("for transformers 5", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("native", "without_blocks")

FAMILIES = [family for family in BUILDERS if family not in ("bloom", "deberta_v2")]
# SDPA knows neither softcap nor sinks, and eager in float64 makes NaN of a query that sees nothing
BEYOND_SDPA = ("gemma2", "gpt_oss", "granite_swa")


def tiny(family, padded=False):
    return build(family), batch(family, "right" if padded else "none")


def run(model, inputs, dtype=torch.float32):
    """Output and all gradients of a step, in one vector each: single rounding errors are luck, the loss's as well."""
    inputs = {k: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for k, v in inputs.items()}
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits_per_image if "logits_per_image" in output else output.logits
    mask = inputs.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape and not model.config.is_encoder_decoder:
        logits = logits[mask.bool()]  # what padding itself attends to is nobody's business
    gradients = [p.grad.flatten().double() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return {"logits": logits.detach(), "gradients": torch.cat(gradients)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, padding, dtype):
    if padding != "none" and "attention_mask" not in batch(family, padding):
        pytest.skip("takes no attention mask")
    if padding == "left" and family in BEYOND_SDPA:
        pytest.skip("nothing of the library's to compare with")
    model, inputs = build(family).to(dtype), batch(family, padding)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    exact.set_attn_implementation("eager" if family in BEYOND_SDPA else "sdpa")
    if family == "gpt_oss":
        exact.set_experts_implementation("eager")  # the grouped product of its experts knows no float64
    oracle = run(exact, inputs, torch.float64)
    theirs = run(eager, inputs, dtype)
    report = lwft_kernels.accelerate(model)
    ours = run(model, inputs, dtype)
    assert_accurate(ours, theirs, oracle)
    stats = lwft_kernels.stats()
    calls = 2 if family == "albert" else len(report.replaced)  # its layers are one
    assert stats["attention"]["fast"] == calls > 0
    assert list(stats) == ["attention"], stats
    assert not report.unreached()


@pytest.mark.parametrize("family", ["bloom", "deberta_v2"])
def test_other_families_stay_with_a_reason(family):
    model, inputs = tiny(family, padded=True)
    before = run(model, inputs)
    (declined,) = lwft_kernels.accelerate(model).changes
    assert declined.now is None and "attention interface" in declined.reason
    after = run(model, inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["bert", "gemma2", "t5"])
def test_undo_restores_everything(family):
    model, inputs = build(family).eval(), batch(family, "right")
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
    model = nn.ModuleDict({"text": build("bert"), "other": build("bloom"), "head": nn.Linear(3, 3)})
    report = lwft_kernels.explain(model)
    assert [c.module for c in report.replaced] == [f"text.bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert report.replaced[0].was == "BertSelfAttention: sdpa"
    (declined,) = report.declined
    assert declined.module == "other" and "attention interface" in declined.reason
    table = str(report)
    assert "2 of 3 replaced" in table and "transformers 5" in table and "unchanged: its code" in table
    assert model["text"].config._attn_implementation == "sdpa"  # explain changes nothing


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
    ids = batch("llama")["input_ids"]
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
    inputs = {"input_ids": batch("llama")["input_ids"], "use_cache": False}
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
    ids = batch("llama")["input_ids"]
    expected = model(ids, output_attentions=True).attentions
    lwft_kernels.accelerate(model)
    matrices = model(ids, output_attentions=True).attentions
    assert len(matrices) == len(expected) == 2
    for ours, theirs in zip(matrices, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(lwft_kernels.stats()) == ["transformers attention"]


@pytest.mark.parametrize("form", ["bool", "float", "per head", "integer"])
def test_masks_of_the_users_own(form):
    model, ids = build("bert").eval(), batch("llama")["input_ids"]
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


@pytest.mark.parametrize("family,task", [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_prefix_tuning_of_peft(family, task):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    model, inputs = peft.get_peft_model(build(family), config).eval(), batch(family, "right")
    theirs = run(model, inputs)
    report = lwft_kernels.accelerate(model)
    ours = run(model, inputs)
    assert report.replaced and ours["gradients"].norm() > 0
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_transforms_go_to_the_library():
    model = build("bert").eval()
    words = model.get_input_embeddings()(batch("bert")["input_ids"]).detach()

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


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(2, 4)], ids=["too few", "by row"])
def test_other_sinks_go_to_the_library(sinks):
    layer, (q, k, v) = Layer(True), (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    attention_forward(layer, q, k, v, None, s_aux=sinks)  # SDPA, for want of an eager function
    assert lwft_kernels.stats()["transformers attention"]["declined"] == {"s_aux is not one number for each head": 1}


def test_a_reason_is_given_for_every_declined_call():
    layer, (q, k, v) = Layer(False), (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    attention_forward(layer, q, k, v, None, cache=object())
    attention_forward(layer, q, k, v, None, scaling=torch.tensor(0.3).item())
    attention_forward(layer, q[..., :4].contiguous(), k[..., :4].contiguous(), v, None)
    with lwft_kernels.use_backend("reference"):
        attention_forward(layer, q, k, v, None)
    declined = lwft_kernels.stats()["transformers attention"]["declined"]
    assert declined == {"cache is given": 1, "the head sizes of query, key and value differ": 1}


GENERATED = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "t5", "bart", "whisper")


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", GENERATED)
def test_generate_gives_the_same_tokens(family, cache, padding):
    model = build(family).eval()
    inputs = {k: v for k, v in batch(family, padding).items() if k != "labels"}
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    lwft_kernels.accelerate(model)
    found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert lwft_kernels.stats()["attention"]["fast"] > 0
    assert "transformers attention" not in lwft_kernels.stats()


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize("options", [
    {"num_beams": 3, "do_sample": False},
    {"do_sample": True, "top_k": 20},
    {"do_sample": False, "use_cache": False},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
    {"do_sample": False, "output_attentions": True, "return_dict_in_generate": True},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_other_ways_to_generate(family, options):
    model = build(family).eval()
    inputs = {k: v for k, v in batch(family, "left").items() if k != "labels"}
    if "prompt_lookup_num_tokens" in options:  # for one sentence only
        inputs = {k: v[1:2] for k, v in inputs.items()}
    if "output_attentions" in options:
        model.set_attn_implementation("eager")

    def generate():
        torch.manual_seed(0)
        found = model.generate(**inputs, max_new_tokens=7, **options)
        return found if isinstance(found, torch.Tensor) else found.sequences

    expected = generate()
    lwft_kernels.accelerate(model)
    assert torch.equal(generate(), expected)
    assert lwft_kernels.stats()


def test_a_cache_that_was_filled_goes_on():
    model = build("mistral").eval()  # a window of 4
    ids = batch("mistral")["input_ids"]
    whole = model(ids).logits
    lwft_kernels.accelerate(model)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:8], cache=first.cache, use_cache=True)
    last = model(ids[:, 8:], cache=second.cache, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, last.logits], 1), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt_oss"])
def test_autocast_hands_over_mixed_dtypes(family, dtype):
    model, inputs = tiny(family, padded=True)
    if family == "gpt_oss":
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
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
    assert list(lwft_kernels.stats()) == ["attention"]


def with_dropout(family):
    """A model whose only dropout is that of attention."""
    model = build(family)
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
    (name,) = (name for name in names if hasattr(model.config, name))
    config = copy.deepcopy(model.config)
    setattr(config, name, 0.3)
    torch.manual_seed(1)
    fresh = type(model)(config).train()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_oss", "t5"])
def test_dropout(family):
    model, inputs = with_dropout(family), batch(family, "right")
    if family == "gpt_oss":
        model.set_attn_implementation("eager")

    def losses(seeds):
        found = []
        for seed in seeds:
            torch.manual_seed(seed)
            found.append(run(model, inputs)["gradients"][:4000].norm())
        return torch.stack(found)

    seeds = range(150)
    theirs = losses(seeds)
    lwft_kernels.accelerate(model)
    ours = losses(seeds)
    assert lwft_kernels.stats()["attention"]["fast"] > 0 and "transformers attention" not in lwft_kernels.stats()
    assert agree(ours, theirs)
    assert torch.equal(ours[:5], losses(range(5)))  # the same bits
    model.eval()
    once, again = (model(**inputs).loss for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("form", ["no mask", "bool", "packed", "sinks"])
def test_dropout_is_that_of_sdpa(form):
    # equal scores and values of one: a result is the part of its weights that was kept
    q, k, v = torch.zeros(2, 4, 64, 8), torch.zeros(2, 2, 64, 8), torch.ones(2, 2, 64, 8)
    options = {"dropout": 0.3, "scaling": 1.0, "is_causal": False}
    mask = torch.arange(64) < 40 if form == "bool" else None
    mask = None if mask is None else mask.expand(2, 1, 64, 64)
    more, keys = {}, 40 if form == "bool" else 64
    if form == "packed":
        q, k, v, keys = q[:1], k[:1], v[:1], 32
        more = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 32, 64]))
    if form == "sinks":  # as much weight as all the keys, and never dropped
        more["s_aux"] = torch.full((4,), 64.0).log()
    ours = torch.stack([attention_forward(Layer(False), q, k, v, mask, **options, **more)[0] for _ in range(40)])
    theirs = torch.stack(
        [sdpa_attention_forward(Layer(False), q, k[:, :, :keys], v[:, :, :keys], None, **options)[0] for _ in range(40)]
    )
    ours, theirs = ours[..., 0].flatten(), theirs[..., 0].flatten()  # of each head one number, there are eight alike
    assert agree(ours * 2 if form == "sinks" else ours, theirs)


def agree(x, y):
    """Whether two samples agree in mean and variance: within four standard errors of the difference."""
    n, deviations = len(x), []
    for power in (1, 2):
        a, b = ((s - s.mean()).square() if power == 2 else s for s in (x, y))
        deviations.append(((a.mean() - b.mean()) / ((a.var() + b.var()) / n).sqrt()).abs().item())
    assert x.std() > 0
    return max(deviations) < 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert", "t5"])
def test_gradient_checkpointing(family, reentrant):
    model, inputs = tiny(family, padded=True)
    lwft_kernels.accelerate(model)
    plain = run(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recomputed = run(model, inputs)
    for name in plain:
        if family == "t5" and reentrant:  # the gradients of its shared bias are summed in another order, with SDPA too
            torch.testing.assert_close(plain[name], recomputed[name])
        else:
            assert torch.equal(plain[name], recomputed[name])
    assert "transformers attention" not in lwft_kernels.stats()


def test_deepcopy_and_save(tmp_path):
    model, inputs = tiny("bert", padded=True)
    lwft_kernels.accelerate(model.eval())
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    assert "lwft" not in (tmp_path / "config.json").read_text()
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "family,padded",
    [("bert", False), ("bert", True), ("llama", False), ("mistral", True), ("gpt_oss", True), ("t5", True)],
)
def test_compiles_without_a_graph_break(family, padded):
    model, inputs = tiny(family, padded)
    lwft_kernels.accelerate(model)
    expected = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.slow
def test_compiles_with_inductor():
    model, inputs = tiny("llama", padded=True)
    del model.model.layers[1]
    lwft_kernels.accelerate(model)
    expected = run(model, inputs)
    torch._dynamo.reset()
    found = run(torch.compile(model, fullgraph=True), inputs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_layers_compiled_one_by_one():
    # their mask is made outside of what is compiled
    model, inputs = tiny("llama", padded=True)
    lwft_kernels.accelerate(model)
    expected = run(model, inputs)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    found = run(model, inputs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_not_a_module():
    with pytest.raises(TypeError, match="model must be a torch"):
        lwft_kernels.accelerate("bert")
