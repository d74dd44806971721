"""Accelerated models under what people train with: the same losses and weights as without, within the error rule.

Each run is made three times from the same weights: as it is in float64 (the oracle), as it is, and accelerated. Plain
SGD, so that rounding is not amplified. Several processes: see test_distributed.py.
"""

from __future__ import annotations

import accelerate
import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import lwft_kernels

pytestmark = pytest.mark.usefixtures("native")

VOCABULARY, LENGTH, STEPS = 61, 12, 3
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "dense"]}


def base(family="llama"):
    torch.manual_seed(1)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        model = transformers.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # transformers finds it too, with a warning that torch.compile stumbles over
        return model
    if family == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**WIDTHS, intermediate_size=48, **quiet))
    config = transformers.LlamaConfig(**WIDTHS, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def lora_config(family="llama", **options):
    return LoraConfig(**{"target_modules": TARGETS[family], "r": 4, "task_type": "CAUSAL_LM", **options})


def with_branches(model):
    """lora_B is zero at the start, which would hide the branch."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def build(family="llama", **options):
    return with_branches(get_peft_model(base(family), lora_config(family, **options)))


def examples(count=8, padded=True):
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(count):
        ids = torch.randint(4, VOCABULARY, (LENGTH,), generator=generator)
        keep = torch.ones_like(ids)
        if padded and index % 2:
            keep[-(1 + index % 4) :] = 0
        rows.append({"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)})
    return rows


def batch(count=2, padded=True):
    rows = examples(count, padded)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(model):
    """The adapters in one vector: single rounding errors of tiny tensors are luck."""
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])


def same_with_and_without(run, ops=("lora_linear", "attention")):
    """`run(dtype, accelerated)` gives tensors by name; the accelerated ones must be as accurate as the others."""
    oracle, theirs = run(torch.float64, False), run(torch.float32, False)
    assert lwft_kernels.stats() == {}
    ours = run(torch.float32, True)
    assert_accurate(ours, theirs, oracle)
    stats = lwft_kernels.stats()
    for op in ops:
        assert stats[op]["fast"] > 0, stats
    assert not any(counts["declined"] for counts in stats.values()), stats


# ---- Trainer ----


def recorded(trainer):
    """A Trainer that keeps every loss: those in the log are rounded."""

    class Recorded(trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.losses = []

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.double())
            return loss

    return Recorded


def train(trainer, accelerated, resume=None):
    """The losses of a training run, and what it has added to the weights."""
    start = trained(trainer.model)
    if accelerated:
        report = lwft_kernels.accelerate(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    if accelerated:
        assert report.replaced and not report.unreached(), str(report)
    return {"losses": torch.stack(trainer.losses), "change": trained(trainer.model) - start}


def arguments(path, **options):
    """Of a Trainer on one CPU: a few steps of SGD, nothing written."""
    return {
        "output_dir": str(path), "max_steps": STEPS, "per_device_train_batch_size": 2, "optim": "sgd",
        "learning_rate": 0.5, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 3, "max_grad_norm": 1.0, **options,
    }  # fmt: skip


TRAINERS = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def trainer(model, path, **options):
    settings = transformers.TrainingArguments(**arguments(path, **options))
    return recorded(transformers.Trainer)(model, settings, train_dataset=examples())


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_trainer(tmp_path, options):
    def run(dtype, accelerated):
        return train(trainer(build().to(dtype), tmp_path, **options), accelerated)

    same_with_and_without(run)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_trainer_on_other_families(tmp_path, family):
    def run(dtype, accelerated):
        return train(trainer(build(family, task_type=None).to(dtype), tmp_path), accelerated)

    same_with_and_without(run, ["attention"])


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    """A checkpoint of an accelerated run is a checkpoint: a run without us goes on from it."""

    def weights(accelerated, steps, resume=None):
        model = build()
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        train(trainer(model, tmp_path, **options), accelerated, resume)
        return trained(model)

    start, two = trained(build()), weights(True, 2)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    with_us, without = weights(True, 4, str(checkpoint)), weights(False, 4, str(checkpoint))
    assert not torch.allclose(start, two) and not torch.allclose(two, with_us)
    torch.testing.assert_close(with_us, without)


# ---- TRL ----


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    sentences = [" ".join(f"w{(3 * i + j) % 58}" for j in range(3 + i % 6)) for i in range(12)]

    def run(dtype, accelerated):
        settings = trl.SFTConfig(**arguments(tmp_path, max_length=16, packing=packing, bf16=False))
        rows = datasets.Dataset.from_list([{"text": text} for text in sentences])
        sft = recorded(trl.SFTTrainer)(
            base(), settings, train_dataset=rows, processing_class=tokenizer(), peft_config=lora_config()
        )
        with_branches(sft.model).to(dtype)
        return train(sft, accelerated)

    same_with_and_without(run)


# ---- Accelerator ----


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_accelerator(precision, when):
    """Gradient accumulation over two batches, with and without mixed precision."""

    def run(dtype, accelerated):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=2,
            mixed_precision="no" if dtype == torch.float64 else precision,
        )  # fmt: skip
        model = build().to(dtype)
        if accelerated and when == "before prepare":
            lwft_kernels.accelerate(model)
        loader = torch.utils.data.DataLoader(examples(), batch_size=2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if accelerated and when == "after prepare":
            lwft_kernels.accelerate(model)
        start, losses = trained(model), []
        for inputs in loader:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                losses.append(loss.detach().double())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return {"losses": torch.stack(losses), "change": trained(model) - start}

    same_with_and_without(run)


# ---- gradient checkpointing ----


def fast_calls():
    return sum(counts["fast"] for counts in lwft_kernels.stats().values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(reentrant):
    """Both forms, with dropout in the branch and in the attention: to the bit what is computed without."""
    model = build(lora_dropout=0.3).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    lwft_kernels.accelerate(model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(**batch(), use_cache=False).loss
        calls = fast_calls()
        loss.backward()
        assert (fast_calls() > calls) == checkpointing, "what is computed again is computed by us again"
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# ---- torch.compile ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_whole_model_compiles_without_a_graph_break(family):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(family, task_type=None)
    report = lwft_kernels.accelerate(model)
    inputs = batch()

    def step(call):
        model.zero_grad()
        loss = call(**inputs).loss
        loss.backward()
        return loss.detach(), trained_gradients(model)

    expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(compiled), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert report.replaced and not report.unreached()


def trained_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# ---- what is done to adapters between steps ----


def switched(model, path):
    model.add_adapter("other", lora_config(r=2))
    with_branches(model)
    model.set_adapter("other")
    yield
    model.set_adapter("default")
    yield
    model.delete_adapter("other")
    yield


def hot_swapped(model, path):
    yield
    hotswap_adapter(model, str(path / "other"), adapter_name="default")
    yield


def merged(model, path):
    model.merge_adapter()
    yield
    model.unmerge_adapter()
    yield
    with model.disable_adapter():
        yield
    yield


def reloaded(model, path):
    model.save_pretrained(path / "again")
    model.load_adapter(path / "again", "again")
    model.set_adapter("again")
    yield
    model.add_weighted_adapter(["default", "again"], [0.7, 0.6], "both", combination_type="linear")
    model.set_adapter("both")
    yield


@pytest.mark.parametrize("actions", [switched, hot_swapped, merged, reloaded])
def test_adapters_come_and_go(tmp_path, actions):
    torch.manual_seed(9)
    other = get_peft_model(base(), lora_config(init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    inputs = batch()

    def run(dtype, accelerated):
        model = build().to(dtype).eval()
        if accelerated:
            lwft_kernels.accelerate(model)
        results = {}
        for index, _ in enumerate(actions(model, tmp_path)):
            model.to(dtype)
            results[f"logits {index}"] = model(**inputs).logits
        return results

    oracle, theirs, ours = run(torch.float64, False), run(torch.float32, False), run(torch.float32, True)
    assert_accurate(ours, theirs, oracle)
    first, *rest = (oracle[name] for name in oracle)
    if rest:
        assert not torch.allclose(first, rest[0]) or actions is merged, "the action did nothing"
    assert lwft_kernels.stats()["lora_linear"]["fast"] > 0


def test_save_and_load_round_trip(tmp_path):
    """What an accelerated model writes, one without us reads, and accelerated it gives the same numbers."""
    model = build().eval()
    keys = list(model.state_dict())
    lwft_kernels.accelerate(model)
    expected = model(**batch()).logits
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert lwft_kernels.accelerate(loaded).replaced
    assert torch.equal(loaded(**batch()).logits, expected)

    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    assert "lwft" not in (tmp_path / "merged" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.config._attn_implementation == "sdpa"
    torch.testing.assert_close(again(**batch()).logits, expected)
