"""Tiny random models of transformers' families, with dropout off: one builder each, and a batch that suits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

VOCABULARY, BATCH, LENGTH = 61, 3, 11
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
}  # fmt: skip
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 16, "patch_size": 4}  # fmt: skip
SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip


def _made(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(t, model)(getattr(t, config)(**settings))


BUILDERS: dict[str, Callable[[], Any]] = {
    # encoders
    "bert": _made("BertForMaskedLM", "BertConfig", **WIDE, **QUIET),
    "roberta": _made("RobertaForMaskedLM", "RobertaConfig", **WIDE, **QUIET, pad_token_id=0),
    "electra": _made("ElectraForMaskedLM", "ElectraConfig", **WIDE, **QUIET, embedding_size=16),
    "albert": _made("AlbertForMaskedLM", "AlbertConfig", **WIDE, **QUIET, embedding_size=16),
    "distilbert": _made("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=VOCABULARY, dim=32, n_layers=2,
                        n_heads=4, hidden_dim=48, dropout=0.0, attention_dropout=0.0),
    "modernbert": _made("ModernBertForMaskedLM", "ModernBertConfig", **WIDE, pad_token_id=0, local_attention=6,
                        global_attn_every_n_layers=2, layer_types=["sliding_attention", "full_attention"]),
    # decoders
    "gpt2": _made("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4,
                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": _made("GPTNeoXForCausalLM", "GPTNeoXConfig", **WIDE),
    "opt": _made("OPTForCausalLM", "OPTConfig", **SMALL, ffn_dim=48, dropout=0.0, word_embed_proj_dim=32,
                 max_position_embeddings=64),
    "phi": _made("PhiForCausalLM", "PhiConfig", **WIDE),
    "llama": _made("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": _made("Qwen2ForCausalLM", "Qwen2Config", **{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": _made("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "mistral": _made("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4),
    "gemma": _made("GemmaForCausalLM", "GemmaConfig", **GROUPED),
    # sharp enough a cap to matter at this scale of weights
    "gemma2": _made("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, attn_logit_softcapping=0.5,
                    query_pre_attn_scalar=16, sliding_window=4),
    "gpt_oss": _made("GptOssForCausalLM", "GptOssConfig", **GROUPED, num_local_experts=2, num_experts_per_tok=1,
                     layer_types=["sliding_attention", "full_attention"], sliding_window=4),
    "granite_swa": _made("GraniteSWAForCausalLM", "GraniteSWAConfig", **{**GROUPED, "head_dim": 8}, sliding_window=4),
    # values narrower than queries and keys
    "deepseek_v3": _made("DeepseekV3ForCausalLM", "DeepseekV3Config", **WIDE, num_key_value_heads=4, q_lora_rank=8,
                         kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2),
    # both
    "t5": _made("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4,
                d_ff=48, num_layers=2, dropout_rate=0.0, decoder_start_token_id=0),
    "bart": _made("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ, max_position_embeddings=32),
    "mbart": _made("MBartForConditionalGeneration", "MBartConfig", **SEQ2SEQ, max_position_embeddings=32),
    # images and sound
    "vit": _made("ViTForImageClassification", "ViTConfig", **IMAGE, **QUIET),
    "clip": _made("CLIPModel", "CLIPConfig", text_config={**WIDE, "bos_token_id": 1, "eos_token_id": 2},
                  vision_config=IMAGE),
    "whisper": _made("WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ, num_mel_bins=8,
                     max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                     decoder_start_token_id=1),
    "wav2vec2": _made("Wav2Vec2ForCTC", "Wav2Vec2Config", **{**WIDE, "vocab_size": 12}, **SPEECH),
    # code that does not go through the attention interface
    "bloom": _made("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "deberta_v2": _made("DebertaV2ForMaskedLM", "DebertaV2Config", **WIDE, **QUIET),
}  # fmt: skip

DECODERS = ("gpt2", "gpt_neox", "opt", "phi", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt_oss",
            "granite_swa", "deepseek_v3")  # fmt: skip


def build(family: str, seed: int = 1) -> Any:
    """A model of `family`, in training mode, its parameters drawn wide enough for attention to differ by key."""
    torch.manual_seed(seed)
    model = BUILDERS[family]().train()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def batch(family: str, padding: str = "none") -> dict[str, torch.Tensor]:
    """Inputs with labels. `padding` on the "right" or "left", where the family takes an attention mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, 8:] = 0  # every query of a window of 4 sees a key: SDPA answers NaN where none is
        mask[2, 9:] = 0
    elif padding == "left":
        mask[0, :3] = 0
        mask[2, :2] = 0
    elif padding != "none":
        raise ValueError(padding)
    labels = ids.masked_fill(mask == 0, -100)
    if padding == "left":  # nor is a word to be predicted from a query that sees nothing
        labels[0, 3] = labels[2, 2] = -100
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator), "labels": ids[:, 0] % 2}
    if family == "clip":
        pixels = torch.randn(BATCH, 3, 16, 16, generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "return_loss": True}
    if family == "whisper":
        return {"input_features": torch.randn(BATCH, 8, 32, generator=generator), "labels": ids}
    if family == "wav2vec2":
        sound, heard = torch.randn(BATCH, 160, generator=generator), torch.ones(BATCH, 160, dtype=torch.int64)
        heard[0, 100:] = 0
        return {"input_values": sound, "labels": ids[:, :3] % 10 + 1} | (
            {"attention_mask": heard} if padding == "right" else {}
        )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
