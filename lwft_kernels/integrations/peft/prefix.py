"""PEFT's soft prompts: prefix tuning and LLaMA-Adapter, as keys and values that attention reads beside its own.

PEFT hands a prefix over in a key-value cache: it is repeated for the batch, and in every layer all keys and values are
copied behind it; with gradient checkpointing, which drops the cache, it is refused. Here the cache says how long the
prefix is, which is all that positions and masks want of it, and the prefix itself goes to the attention function as
`prefix_k` and `prefix_v`. `generate` is PEFT's own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import peft
import torch
from peft import PeftModel, PeftType
from peft.tuners.adaption_prompt import layer as adaption
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations import drift, reached
from lwft_kernels.integrations import transformers as transformers_room
from lwft_kernels.integrations.class_swap import described, has_hooks, swapped
from lwft_kernels.integrations.frozen_linear import LINEAR
from lwft_kernels.integrations.report import Change
from lwft_kernels.integrations.transformers import attention as attention_room
from lwft_kernels.integrations.transformers.masks import CompactMask, Rule
from lwft_kernels.integrations.transformers.models import calls_interface

_PREFIX, _ADAPTION = "peft prefix tuning", "peft AdaptedAttention"  # as declined calls are named in stats()

# --- prefix tuning ------------------------------------------------------------------------------------------------


class PrefixLayer(DynamicLayer):
    """A layer of the cache whose beginning is the prefix, one for the batch, joined to the rest when somebody asks."""

    _pair: tuple[Tensor | None, Tensor | None] = (None, None)  # keys and values, but for the newest
    _new: tuple[Tensor, Tensor] | None = None

    def __init__(self, number: int, keys: Tensor, values: Tensor, prefix: Prefix) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._number, self._prefix = number, prefix
        self._pair = keys, values  # (1, Hkv, P, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """While the prefix goes to attention by itself: the new keys and values as they are."""
        if self._prefix.under_way:
            self._prefix.owed.add(self._number)
            self._new = key_states, value_states
            return self._new
        joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return joined

    def get_seq_length(self) -> int:
        """The number of positions taken, those of the prefix included."""
        stored = self._pair[0]
        new = 0 if self._new is None else self._new[0].shape[-2]
        return new if stored is None or not self.is_initialized else stored.shape[-2] + new

    def _whole(self) -> tuple[Tensor | None, Tensor | None]:
        if self._new is not None:
            (keys, values), (more_keys, more_values) = self._pair, self._new
            assert keys is not None and values is not None
            self._pair, self._new = (_joined(keys, more_keys), _joined(values, more_values)), None
        return self._pair

    @property
    def keys(self) -> Tensor | None:
        """As the library's: (B, Hkv, P + L, D)."""
        return self._whole()[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._pair = value, self._whole()[1]

    @property
    def values(self) -> Tensor | None:
        """As the library's: (B, Hkv, P + L, D)."""
        return self._whole()[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._pair = self._whole()[0], value


def _joined(prefix: Tensor, rest: Tensor) -> Tensor:
    """Prefix and rest as PEFT has them, in one tensor for each of the batch."""
    return torch.cat([prefix.expand(rest.shape[0], -1, -1, -1), rest], dim=-2)


class Prefix:
    """The prefix of one forward pass of a model: what its attention is called with, and what its cache knows of it.

    It travels as an argument, so that a layer that gradient checkpointing computes again finds that of its own pass.
    """

    def __init__(self, model: PeftModel, get_prompt: Callable[..., Any]) -> None:
        self.model, self.adapter, self.grad = model, model.active_adapter, torch.is_grad_enabled()
        self.under_way = True
        self.owed: set[int] = set()  # layers whose cache has left the prefix to attention,
        self.given: set[int] = set()  # and those whose attention has had it
        self._get_prompt = get_prompt
        self._arguments: dict[str, Any] = {}
        self._pairs: list[tuple[Tensor, Tensor]] | None = None
        self._reentrant = False

    def prompt(self, batch_size: int, **arguments: Any) -> Any:
        """What PEFT's `get_prompt` returns, with the prefix of one instead of `batch_size`."""
        cache = self._get_prompt(1, **arguments)
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            # layers with a window of their own, above all: it moves past the prefix
            backend.record_decline(_PREFIX, f"its cache is not a plain one but {type(cache).__name__} with others")
            return self._get_prompt(batch_size, **arguments)
        self._arguments = arguments
        self._pairs = [(layer.keys, layer.values) for layer in cache.layers]
        cache.layers = [PrefixLayer(i, *pair, self) for i, pair in enumerate(self._pairs)]
        return cache

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """The attention function, over the prefix and what the model gives; arguments and results are its own."""
        if self._pairs is None:
            return attention_room.attention_forward(module, query, key, value, attention_mask, **options)
        prefix_key, prefix_value = self._of(module.layer_idx)
        rule = _rule_beside(prefix_key, module, query, key, value, attention_mask, options)
        if isinstance(rule, str):
            backend.record_decline(_PREFIX, rule)
            key, value = _joined(prefix_key, key), _joined(prefix_value, value)
            return attention_room.attention_forward(module, query, key, value, attention_mask, **options)
        reached.mark(module)
        out = attention_room.attend(
            query, key, value, rule, None, options.get("s_aux"), scale=options["scaling"],
            softcap=options.get("softcap"), dropout_p=options["dropout"], prefix_k=prefix_key, prefix_v=prefix_value,
        )  # fmt: skip
        return out, None

    def _of(self, layer: int) -> tuple[Tensor, Tensor]:
        assert self._pairs is not None
        self.given.add(layer)
        if self.grad and not torch.is_grad_enabled():
            self._reentrant = True
        elif self._reentrant:
            # Reentrant checkpointing differentiates each layer by itself: none may share a graph with another.
            if self.model.active_adapter != self.adapter:
                raise RuntimeError("the active adapter was changed between forward and backward")
            again = self._get_prompt(1, **self._arguments).layers[layer]
            return again.keys, again.values
        return self._pairs[layer]


def _rule_beside(
    prefix: Tensor,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Rule | str:
    """Which of the keys after the prefix a query sees, all of them seeing the prefix; or why that is not so."""
    queries, keys, length = query.shape[2], key.shape[2], prefix.shape[2]
    if options.get("position_bias") is not None or value.shape[-1] != query.shape[-1]:
        return "there is a position bias, or values are narrower than keys"
    if options.get("cu_seq_lens_q") is not None:
        return "the sequences are packed"
    if prefix.dtype != key.dtype and checks.autocast_dtype(query.device) is None:
        return f"the prefix is {prefix.dtype}, the keys are {key.dtype}"
    # as the attention room asks of its own calls
    kwargs = {name: given for name, given in options.items() if name not in ("position_bias", "s_aux", "softcap")}
    reason = attention_room.why_not(
        query, key, value, attention_mask, options.get("scaling"), options.get("s_aux"), None, kwargs
    )
    if reason is not None:
        return reason
    if attention_mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return "it is causal without a mask" if causal and queries > 1 else Rule()
    shape = (query.shape[0], 1, queries, length + keys)
    if isinstance(attention_mask, CompactMask) and attention_mask.rule is not None and attention_mask.shape == shape:
        rule = attention_mask.rule
        if rule.window is not None or rule.sequences is not None:
            return "a window moves past the prefix, or sequences are packed"
        mask = rule.mask
        lengths = None if rule.lengths is None else rule.lengths - length
        if mask is None or mask.shape[-1] == 1:
            return replace(rule, lengths=lengths)
        if not mask[..., :length].all():
            return "the mask hides the prefix"
        return replace(rule, lengths=lengths, mask=mask[..., length:])
    if attention_mask.dtype != torch.bool or attention_mask.shape[-1] != length + keys:
        return "the mask is not a bool one over prefix and keys"
    if not attention_mask[..., :length].all():
        return "the mask hides the prefix"
    return Rule(mask=attention_mask[..., length:])


_serving: ContextVar[Prefix | None] = ContextVar("lwft_kernels prefix", default=None)
# Models by whether their code hands an argument that it does not know on to attention; found out at the first call.
_hands_on: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class _Served(PeftModel):
    """What our subclasses of PEFT's models have in common."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, without its key-value cache for the prefix."""
        config = self.active_peft_config
        if config.peft_type != PeftType.PREFIX_TUNING:
            return super().forward(*args, **kwargs)
        base = self.get_base_model()
        reason = _why_not_model(base)
        if reason is not None:
            backend.record_decline(_PREFIX, reason)
            return super().forward(*args, **kwargs)
        if base in _hands_on:
            return self._forward_beside(args, kwargs)
        # The first call: where the argument does not come through, or is not welcome, PEFT's own path is taken.
        state = torch.get_rng_state()
        try:
            result = self._forward_beside(args, kwargs)
        except Exception:
            torch.set_rng_state(state)
            result = super().forward(*args, **kwargs)  # unless the fault is not ours
            _hands_on[base] = False
        else:
            _hands_on[base] = True
        return result

    def _forward_beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefix = Prefix(self, super().get_prompt)
        token = _serving.set(prefix)
        try:
            result = super().forward(*args, **kwargs, **{attention_room.INSTEAD: prefix})
        finally:
            _serving.reset(token)
            prefix.under_way = False
        if not prefix.given or not prefix.owed <= prefix.given:
            raise RuntimeError(
                f"{type(self.get_base_model()).__name__} did not hand the prefix to the attention of layers "
                f"{sorted(prefix.owed - prefix.given)}"
            )
        reached.mark(self)
        return result

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; within `forward`, a cache that leaves the prefix to attention."""
        prefix = _serving.get()
        if prefix is None or prefix.model is not self or args:
            return super().get_prompt(batch_size, *args, **kwargs)
        return prefix.prompt(batch_size, **kwargs)


def _why_not_model(base: nn.Module) -> str | None:
    """Why the prefix of this call cannot go to attention by itself, or None."""
    if not isinstance(base, PreTrainedModel) or base.config._attn_implementation != transformers_room.NAME:
        return "the attention of the model is not ours"
    if not _hands_on.get(base, True):
        return "the code of the model does not hand an argument on to its attention"
    if torch.compiler.is_compiling():
        return "torch.compile traces the whole PeftModel"
    if registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    return None


class PrefixCausalLM(_Served, peft.PeftModelForCausalLM):
    """`peft.PeftModelForCausalLM` with its prefix beside the keys."""


class PrefixFeatureExtraction(_Served, peft.PeftModelForFeatureExtraction):
    """`peft.PeftModelForFeatureExtraction` with its prefix beside the keys."""


_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    peft.PeftModelForCausalLM: PrefixCausalLM,
    peft.PeftModelForFeatureExtraction: PrefixFeatureExtraction,
}

# --- LLaMA-Adapter ------------------------------------------------------------------------------------------------


class _Beside:
    """The attention function that computes, with the same queries, what they find in the adaption prompt."""

    def __init__(self, key: Tensor, value: Tensor, gate: Tensor, added: bool) -> None:
        self.prompt, self.gate, self.added = (key, value), gate, added
        self.found: Tensor | None = None  # (B, S, H, D)
        self.dtype: torch.dtype | None = None  # of the queries

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        """The attention function, arguments and results are its own; what is found is added, or kept for later."""
        out, weights = attention_room.attention_forward(module, query, key, value, *args, **options)
        prompt_key, prompt_value = (part.to(query.dtype) for part in self.prompt)
        # no keys but the prompt's, which are one for the batch
        found = LF.attention(
            query, key[:, :, :0].to(query.dtype), value[:, :, :0].to(query.dtype), prefix_k=prompt_key,
            prefix_v=prompt_value, scale=1.0 / math.sqrt(query.shape[-1]),
        )  # fmt: skip
        self.found, self.dtype = self.gate * found.transpose(1, 2), query.dtype
        return (out + self.found if self.added else out), weights


class FusedAdaptedAttention(adaption.AdaptedAttention):
    """`AdaptedAttention` of Llama and Mistral: queries computed once, the prompt not repeated for the batch."""

    def forward(self, **kwargs: Any) -> Any:
        """As PEFT's: attention, plus gate * attention over the adaption prompt."""
        reason = _why_not_adapted(self, kwargs.get("hidden_states"))
        if reason is not None:
            backend.record_decline(_ADAPTION, reason)
            return super().forward(**kwargs)
        reached.mark(self)
        attention: Any = self.model
        project = attention.o_proj
        # one product for both where the layer is linear, and nothing else
        at_once = type(project) in LINEAR and project._parameters["bias"] is None and not has_hooks(project)
        key, value = (_heads(part(self.adaption_prompt), attention) for part in (attention.k_proj, attention.v_proj))
        beside = _Beside(key, value, self.adaption_gate, at_once)
        output, *rest = attention(**kwargs, **{attention_room.INSTEAD: beside})
        found = _found(beside)
        if not at_once:
            output = output + project(found.reshape(*found.shape[:2], -1))
        return output.to(beside.dtype), *rest


class FusedAdaptedAttentionGPT(adaption.AdaptedAttentionGPT):
    """`AdaptedAttentionGPT` of GPT-2: queries computed once, the prompt not repeated for the batch."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's: attention, plus gate * attention over the adaption prompt."""
        reason = _why_not_adapted(self, hidden_states)
        if reason is None and (args or kwargs.get("encoder_hidden_states") is not None):
            reason = "positional arguments, or cross-attention"
        if reason is not None:
            backend.record_decline(_ADAPTION, reason)
            return super().forward(hidden_states, *args, **kwargs)
        reached.mark(self)
        attention: Any = self.model
        _, key, value = attention.c_attn(self.adaption_prompt).split(attention.split_size, dim=2)
        beside = _Beside(_heads(key, attention), _heads(value, attention), self.adaption_gate, added=False)
        output, *rest = attention(hidden_states=hidden_states, **kwargs, **{attention_room.INSTEAD: beside})
        found = _found(beside)
        output = output + found.reshape(*found.shape[:2], -1)
        return output.to(beside.dtype), *rest


def _heads(projected: Tensor, attention: Any) -> Tensor:
    """(1, A, H D) as (1, H, A, D)."""
    heads: Tensor = projected.view(1, projected.shape[1], -1, attention.head_dim).transpose(1, 2)
    return heads


def _found(beside: _Beside) -> Tensor:
    if beside.found is None:
        raise RuntimeError("the attention of the model did not call the attention function")
    return beside.found


# What each class is replaced by, and the attention classes that hand an argument on to the attention function
_ADAPTED: dict[type[nn.Module], tuple[type[nn.Module], tuple[type[nn.Module], ...]]] = {
    adaption.AdaptedAttention: (FusedAdaptedAttention, (LlamaAttention, MistralAttention)),
    adaption.AdaptedAttentionGPT: (FusedAdaptedAttentionGPT, (GPT2Attention,)),
}


def _why_not_adapted(module: Any, hidden_states: Any) -> str | None:
    """Why this call of an adapted attention is PEFT's, or None."""
    attention = module.model
    if attention.config._attn_implementation != transformers_room.NAME:
        return "the attention of the model is not ours"
    if getattr(attention, "reorder_and_upcast_attn", False):
        return "GPT-2 computes this attention in float32 by itself"
    if not isinstance(hidden_states, Tensor):
        return "the hidden states are not given by name"
    if checks.autocast_dtype(hidden_states.device) is None and hidden_states.dtype != module.adaption_gate.dtype:
        return f"an adaption prompt of {module.adaption_gate.dtype} beside {hidden_states.dtype}"
    if registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    return None


# --- what there is to change --------------------------------------------------------------------------------------


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per model with a soft prompt, and per attention with an adaption prompt."""
    drifted: dict[type[nn.Module], str | None] = {}
    changes = []
    for name, module in model.named_modules():
        if isinstance(module, PeftModel):
            kinds = sorted({c.peft_type.value for c in module.peft_config.values() if c.is_prompt_learning})
            if not kinds:
                continue
            reason, now = _why_not_peft_model(module), "prefix beside the keys"
            ours = _MODELS.get(type(module))
            was = f"{described(type(module))}: {', '.join(kinds)}"
        elif isinstance(module, adaption._BaseAdaptedAttention):
            reason, now = _why_not_attention(module), "adaption prompt beside the keys"
            ours = _ADAPTED.get(type(module), (None,))[0]
            was = described(type(module))
        else:
            continue
        if reason is None:
            assert ours is not None
            if type(module) not in drifted:
                reasons = (drift.why_not(upstream, strict) for upstream in _upstream(type(module)))
                drifted[type(module)] = next((found for found in reasons if found is not None), None)
            reason = drifted[type(module)]
        if reason is not None:
            changes.append(Change(name, was, reason=reason))
        else:
            assert ours is not None
            change = swapped(name, module, ours, now)
            change.was = was
            changes.append(_minding_bound_forward(change, module, ours))
    return changes


def _minding_bound_forward(change: Change, module: nn.Module, ours: type[nn.Module]) -> Change:
    """`change`, for PEFT's `disable_adapter`: it leaves a bound method on the module, which wins over the class."""
    swap, swap_back, left = change.apply, change.revert, module.__dict__.get("forward")

    def apply() -> str | None:
        module.__dict__.pop("forward", None)
        return swap()

    def revert() -> None:
        if getattr(module.__dict__.get("forward"), "__func__", None) is ours.forward:
            del module.__dict__["forward"]
        swap_back()
        if left is not None:
            module.__dict__.setdefault("forward", left)

    change.apply, change.revert = apply, revert
    return change


def _why_not_peft_model(module: PeftModel) -> str | None:
    if type(module) in _MODELS.values():
        return "replaced already"
    types = {config.peft_type for config in module.peft_config.values() if config.is_prompt_learning}
    if PeftType.PREFIX_TUNING not in types:
        return "its virtual tokens are part of the sequence, which the attention kernel serves like any other"
    if type(module) is peft.PeftModelForSeq2SeqLM:
        return "an encoder-decoder: PEFT's prefix lies in two caches, and may have position biases"
    if type(module) not in _MODELS:
        return f"with PEFT {peft.__version__} it is known of causal language models and of feature extraction only"
    if "forward" in module.__dict__ and getattr(module.forward, "__func__", None) is not type(module).forward:
        return "somebody else has replaced its forward"
    parts = module.get_base_model().modules()
    numbers = [getattr(part, "layer_idx", None) for part in parts if calls_interface(part)]
    if None in numbers or len(numbers) != len(set(numbers)) or not numbers:
        return "its attention layers are not numbered one by one"
    return None


def _why_not_attention(module: nn.Module) -> str | None:
    if any(type(module) is ours for ours, _ in _ADAPTED.values()):
        return "replaced already"
    if type(module) not in _ADAPTED:
        return f"the class is not known (PEFT {peft.__version__})"
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    attention = module.model
    if type(attention) not in _ADAPTED[type(module)][1] or "forward" in attention.__dict__:
        return f"what it wraps is a {type(attention).__name__}, not one that is known"
    return None


_KNOWN = {
    "peft.PeftModelForCausalLM.forward": frozenset({"af4e4ee014143120"}),
    "peft.PeftModelForFeatureExtraction.forward": frozenset({"a74a90ac271837eb"}),
    "transformers.cache_utils.DynamicLayer.update": frozenset({"a3283d41195991a6"}),
    "peft.tuners.adaption_prompt.layer.AdaptedAttention.forward": frozenset({"f972718b263d8813"}),
    "peft.tuners.adaption_prompt.layer.AdaptedAttentionGPT.forward": frozenset({"d00fdf3d57dfaf87"}),
    "transformers.LlamaAttention.forward": frozenset({"44e32fc113003391"}),
    "transformers.MistralAttention.forward": frozenset({"16b1fbd329065893"}),
    "transformers.GPT2Attention.forward": frozenset({"8672ea850c32b382"}),
}


def _upstream(original: type[nn.Module]) -> list[drift.Upstream]:
    """What is overridden in a class, and what of PEFT and transformers our version builds on."""

    def one(name: str, *functions: Callable[..., Any]) -> drift.Upstream:
        return drift.Upstream(name, functions, _KNOWN.get(name, frozenset()), lambda: _differs(original))

    if original in _ADAPTED:
        attentions = _ADAPTED[original][1]
        queries = [
            adaption.TRANSFORMERS_MODEL_CONFIG[kind].compute_query_states
            for kind in ("llama" if original is adaption.AdaptedAttention else "gpt2",)
        ]
        return [
            one(f"peft.tuners.adaption_prompt.layer.{original.__name__}.forward", original.forward, *queries),
            *(one(f"transformers.{kind.__name__}.forward", kind.forward) for kind in attentions),
        ]
    return [
        one(f"peft.{original.__name__}.forward", original.forward, PeftModel.get_prompt),
        one(
            "transformers.cache_utils.DynamicLayer.update", DynamicLayer.update, DynamicLayer.get_seq_length,
            DynamicLayer.get_mask_sizes, DynamicCache.__init__,
        ),
    ]  # fmt: skip


def _differs(original: type[nn.Module]) -> str | None:
    """The self-test: a tiny model with a soft prompt, forward and backward, against PEFT's own path."""
    sizes = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if original is adaption.AdaptedAttentionGPT:
        base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **sizes))
    else:
        llama = LlamaConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
            **sizes,
        )  # fmt: skip
        base = (LlamaForCausalLM if original in (*_ADAPTED, peft.PeftModelForCausalLM) else LlamaModel)(llama)
    config: peft.PeftConfig
    if original in _ADAPTED:
        config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=3)
    model = original(base, config) if original in _MODELS else peft.get_peft_model(base, config)
    for change in transformers_room.plan(model):
        change.apply()
    model.double().eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def run() -> dict[str, Tensor | None]:
        out = model(input_ids=ids, attention_mask=mask)[0]
        return {f"result {i}": value for i, value in enumerate((out, *torch.autograd.grad(out.cos().sum(), trained)))}

    theirs = run()
    for module in model.modules():
        if type(module) is original:
            module.__class__ = _MODELS[original] if original in _MODELS else _ADAPTED[original][0]
    # PEFT takes the softmax over an adaption prompt in float32, whatever the model is in
    return drift.first_difference(run(), theirs, limit=1e-6 if original in _ADAPTED else 1e-9)
