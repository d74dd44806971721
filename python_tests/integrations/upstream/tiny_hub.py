"""A pytest plugin: tests run in a directory of tiny random models, under the names that PEFT's tests ask a hub for.

Libraries take a directory of that name for the model, so nothing is patched. The names not made here fail as they do
without a network.
"""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SMALL, "intermediate_size": 37, "max_position_embeddings": 512}
_GROUPED = {**_WIDE, **_TOKENS, "num_key_value_heads": 2}
_GPT = {"vocab_size": 1000, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_inner": 37, "n_positions": 512, **_TOKENS}
_OPT = {
    **_SMALL, **_TOKENS, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "ffn_dim": 4,
    "max_position_embeddings": 100,
}  # fmt: skip
# grouped_mm wants strides of 16 bytes
_EXPERTS = {**_GROUPED, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

# PEFT's tests choose layers by number and adapters by parameter count, so some sizes are theirs.
_MODELS = {
    "peft-internal-testing/opt-125m": (t.OPTForCausalLM, t.OPTConfig(**_OPT)),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig(**_OPT)),
    "peft-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**_GPT)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, t.GPT2Config(**_GPT)),
    "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**_GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, t.GPTJConfig(**_GPT, rotary_dim=4)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig(**_GROUPED)),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig(**_GROUPED)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        t.LlamaForCausalLM,
        t.LlamaConfig(**{**_GROUPED, "hidden_size": 16, "num_key_value_heads": 4}),
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig(**_GROUPED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=512),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**_GROUPED)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (t.Qwen3ForCausalLM, t.Qwen3Config(**_GROUPED, head_dim=8)),
    "trl-internal-testing/tiny-GptOssForCausalLM": (t.GptOssForCausalLM, t.GptOssConfig(**_EXPERTS)),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        t.Llama4ForCausalLM,
        t.Llama4TextConfig(**_EXPERTS, intermediate_size_mlp=64),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        t.BloomForCausalLM,
        t.BloomConfig(vocab_size=1000, hidden_size=32, n_layer=5, n_head=4, **_TOKENS),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**_WIDE, **_TOKENS)),
    "peft-internal-testing/tiny-random-BertModel": (t.BertModel, t.BertConfig(**_WIDE)),
    "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig(**_WIDE)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        t.RobertaForSequenceClassification,
        t.RobertaConfig(**_WIDE),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig(**_WIDE)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config(**_WIDE)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        t.BartForConditionalGeneration,
        t.BartConfig(
            vocab_size=1000, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=4, decoder_ffn_dim=4, **_TOKENS,
        ),
    ),
    "peft-internal-testing/tiny-random-t5": (
        t.T5ForConditionalGeneration,
        t.T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4),
    ),
}  # fmt: skip


def pytest_sessionstart(session):
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(1000)}, unk_token="word3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"word{i}" for i, name in enumerate(("pad", "bos", "eos", "unk"))}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    session.tiny_hub = tempfile.TemporaryDirectory()
    os.chdir(session.tiny_hub.name)
    t.utils.logging.disable_progress_bar()
    for name, (kind, config) in _MODELS.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(name)
        tokenizer.save_pretrained(name)


def pytest_sessionfinish(session):
    os.chdir(session.config.invocation_params.dir)
    session.tiny_hub.cleanup()
