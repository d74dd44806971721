"""What this room builds on in transformers, by release."""

from __future__ import annotations

import transformers

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Attention classes of transformers 4 (and AdapterHub's below them) whose whole model follows the name in its config.
KNOWN_IN_4 = frozenset(
    {
        "BartAttention",
        "CLIPAttention",
        "Gemma2Attention",
        "GemmaAttention",
        "GPT2Attention",
        "GPTNeoXAttention",
        "LlamaAttention",
        "MBartAttention",
        "MistralAttention",
        "OPTAttention",
        "Phi3Attention",
        "PhiAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "ViTSelfAttention",
        "WhisperAttention",
    }
)


def why_not(strict: bool) -> str | None:
    return None
