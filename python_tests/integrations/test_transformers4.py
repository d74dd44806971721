"""transformers 4.57, with and without AdapterHub's model classes: what is on the list is exact, the rest is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from oracle import assert_accurate
from tiny_models import batch, build

import lwft_kernels
from lwft_kernels.integrations.transformers import upstream
from lwft_kernels.integrations.transformers.masks import CompactMask, compact_mask

if upstream.RELEASE >= (5,):
    pytest.skip("for transformers 4", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("native")

FOLLOWING = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "gpt2", "gpt_neox", "opt", "bart", "mbart",
             "whisper", "vit")  # fmt: skip
# attention chosen when the model is made, or code that does not ask for it by name
OTHERS = ("bert", "roberta", "distilbert", "electra", "albert", "t5", "bloom", "deberta_v2", "gpt_oss", "deepseek_v3")
# of AdapterHub's models those that are among them
WITH_ADAPTERS = ("llama", "mistral", "gpt2", "bart", "mbart", "whisper", "vit", "clip")


def step(model, inputs, dtype=torch.float32):
    inputs = {k: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for k, v in inputs.items()}
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = [p.grad.flatten().double() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return {"loss": output.loss.detach(), "gradients": torch.cat(gradients)}


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("family", FOLLOWING)
def test_loss_and_gradients(family, padding):
    model, inputs = build(family), batch(family, padding)
    before, eager = model.config._attn_implementation, copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    oracle = step(copy.deepcopy(eager).double(), inputs, torch.float64)
    theirs = step(eager, inputs)
    report = lwft_kernels.accelerate(model)
    ours = step(model, inputs)
    assert_accurate(ours, theirs, oracle)
    assert lwft_kernels.stats()["attention"]["fast"] == len(report.replaced) > 0
    assert list(lwft_kernels.stats()) == ["attention"] and not report.declined
    report.undo()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", OTHERS)
def test_the_rest_is_refused(family, adapted):
    model, inputs = build(family), batch(family, "right")
    if adapted:
        add_adapter(model)
    before, implementation = step(model, inputs), model.config._attn_implementation
    report = lwft_kernels.accelerate(model, lora=False, adapters=False)
    (declined,) = (change for change in report.changes if change.was.startswith("attention of"))
    assert declined.now is None and "transformers 4" in declined.reason
    assert model.config._attn_implementation == implementation
    after = step(model, inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "attention" not in lwft_kernels.stats()


def add_adapter(model, config="seq_bn"):
    adapters = pytest.importorskip("adapters")
    try:
        adapters.init(model)
    except ValueError as error:
        pytest.skip(str(error))
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    model.train()


@pytest.mark.parametrize("config", ["seq_bn", "prefix_tuning"])
@pytest.mark.parametrize("family", WITH_ADAPTERS)
def test_with_adapters(family, config):
    model, inputs = build(family), batch(family, "right")
    add_adapter(model, config)
    # eager masks by numbers: under SDPA AdapterHub hides the prefix of a decoder from itself, and so it does here
    results = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        results[name] = step(model, inputs)
    report = lwft_kernels.accelerate(model, lora=False, adapters=False)
    ours = step(model, inputs)
    assert report.replaced and not report.unreached()
    like = "eager" if family in ("bart", "mbart") else "sdpa"
    for name in ours:
        torch.testing.assert_close(ours[name].float(), results[like][name].float())


def test_a_part_that_cannot_is_kept():
    model = transformers.EncoderDecoderModel(
        encoder=build("bert").bert, decoder=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
        ),
    ).eval()  # fmt: skip
    ids = batch("bert")["input_ids"]
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    report = lwft_kernels.accelerate(model)
    assert {change.module.partition(".")[0] for change in report.replaced} == {"decoder"}
    assert [change.module for change in report.declined] == ["encoder"]
    assert model.encoder.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
def test_generate_gives_the_same_tokens(family, cache):
    model, inputs = build(family).eval(), batch(family, "left")
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    if family == "gpt2" and cache == "static":
        del options["cache_implementation"]
    expected = model.generate(**inputs, **options)
    lwft_kernels.accelerate(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert lwft_kernels.stats()["attention"]["fast"] > 0


def test_masks():
    padding = torch.tensor([[1] * 6 + [0] * 3, [1] * 9]).bool()
    function = transformers.masking_utils.sliding_window_causal_mask_function(3)
    for past in (0, 4):
        given = {"batch_size": 2, "cache_position": torch.arange(past, 9), "kv_length": 9, "kv_offset": 0,
                 "mask_function": function, "attention_mask": padding, "local_size": 3}  # fmt: skip
        mask = compact_mask(**given)
        assert isinstance(mask, CompactMask) and mask.rule.window == 3
        assert torch.equal(mask.clone(), transformers.masking_utils.sdpa_mask(**given))


def test_this_release_is_known():
    assert upstream.why_not(strict=True) is None
