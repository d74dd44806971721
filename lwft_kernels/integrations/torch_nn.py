"""torch.nn: `MultiheadAttention`, `TransformerEncoderLayer` and `TransformerDecoderLayer`, by class swap.

The modules stay the same objects with the same parameters. `nn.TransformerEncoder`, `nn.TransformerDecoder` and
`nn.Transformer` only call them in turn and are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lwft_kernels import backend, checks, registration
from lwft_kernels.attention import modules
from lwft_kernels.integrations import drift, reached
from lwft_kernels.integrations.add_and_norm import add_and_norm
from lwft_kernels.integrations.class_swap import PLAIN, described, difference, is_plain, swapped
from lwft_kernels.integrations.frozen_linear import LINEAR
from lwft_kernels.integrations.report import Change


class MultiheadAttention(modules.MultiheadAttention):
    """`nn.MultiheadAttention` on the attention op: the forward of `lwft_kernels.nn.MultiheadAttention`.

    What that refuses or does otherwise than torch is left to torch here.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        reason = _why_not_attention(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason is not None:
            backend.record_decline("nn.MultiheadAttention", reason)
            return self._declined(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        reached.mark(self)
        return self._fused(query, key, value, key_padding_mask, attn_mask, is_causal), None


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with the norm last: each sum, dropout and norm is one op."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerEncoderLayer.forward`."""
        reason = _why_not_layer(self, src)
        if reason is None and _torch_fuses_layer(self, src) and _torch_is_faster(src, src_mask, src_key_padding_mask):
            reason = _FASTER
        if reason is not None:
            backend.record_decline("nn.TransformerEncoderLayer", reason)
            declined: Tensor = super().forward(src, src_mask, src_key_padding_mask, is_causal)
            return declined
        attended = self.self_attn(
            src, src, src,
            attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False, is_causal=is_causal,
        )[0]  # fmt: skip
        x = add_and_norm(self, src, attended, self.dropout1, self.norm1)
        return add_and_norm(self, x, _feed_forward(self, x), self.dropout2, self.norm2)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with the norm last: each sum, dropout and norm is one op."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerDecoderLayer.forward`."""
        reason = _why_not_layer(self, tgt)
        if reason is not None:
            backend.record_decline("nn.TransformerDecoderLayer", reason)
            declined: Tensor = super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            return declined
        attended = self.self_attn(
            tgt, tgt, tgt,
            attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal, need_weights=False,
        )[0]  # fmt: skip
        x = add_and_norm(self, tgt, attended, self.dropout1, self.norm1)
        attended = self.multihead_attn(
            x, memory, memory,
            attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal,
            need_weights=False,
        )[0]  # fmt: skip
        x = add_and_norm(self, x, attended, self.dropout2, self.norm2)
        return add_and_norm(self, x, _feed_forward(self, x), self.dropout3, self.norm3)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
    return out


def _why_not_attention(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    is_causal: bool,
) -> str | None:
    """Why the op cannot serve this call, or None."""
    if need_weights:
        return "need_weights=True asks for the attention matrix; pass need_weights=False"
    for tensor in (query, key, value, key_padding_mask, attn_mask):
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_nested):
            return "an argument is not a plain tensor"
    reason = _why_not_shapes(module, query, key, value, key_padding_mask, attn_mask)
    if reason is not None:
        return reason
    if is_causal and attn_mask is None:
        return "is_causal without attn_mask"
    if is_causal and key_padding_mask is None and (module.bias_k is not None or module.add_zero_attn):
        # torch drops the mask for the hint, and by that the appended keys are later than every query
        return "is_causal hides the key that add_bias_kv or add_zero_attn appends"
    if query is key and key is value and _torch_fuses_attention(module, query):
        floating = any(m is not None and m.dtype != torch.bool for m in (key_padding_mask, attn_mask))
        if not floating and _torch_is_faster(query, attn_mask, key_padding_mask):
            return _FASTER
    for part in (module, module.out_proj):
        for weight in part._parameters.values():
            if weight is not None and not is_plain(weight):
                return "the weights are sharded or of a tensor subclass"
    if not torch.compiler.is_compiling():
        if registration.transforms_active():
            return "a torch.func transform or forward-mode AD is under way"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit.trace"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not("attention", query.device)


def _why_not_shapes(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Any,
    attn_mask: Any,
) -> str | None:
    """Whether these are shapes and dtypes that torch takes; what it refuses, it refuses itself."""
    refused = "torch.nn refuses it"
    dims = query.dim()
    if dims not in (2, 3) or query.dtype not in checks.FLOATING or query.shape[-1] != module.embed_dim:
        return refused
    token = 1 if module.batch_first and dims == 3 else 0
    batch = 1 if dims == 2 else query.shape[1 - token]
    queries = keys = query.shape[token]
    if key is not query or value is not key:
        if key.dim() != dims or key.shape[:-1] != value.shape[:-1] or not query.device == key.device == value.device:
            return refused
        keys = key.shape[token]
        if dims == 3 and key.shape[1 - token] != batch:
            return refused
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool and key_padding_mask.dtype not in checks.FLOATING:
            return refused
        if key_padding_mask.shape != ((batch, keys) if dims == 3 else (keys,)):
            return refused
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in checks.FLOATING:
            return refused
        if attn_mask.shape not in ((queries, keys), (batch * module.num_heads, queries, keys)):
            return refused
    return None


def _torch_fuses_attention(module: nn.MultiheadAttention, x: Tensor) -> bool:
    """Whether torch has one op for this self-attention: in evaluation, where nothing wants a gradient.

    Torch looks at more than this; where it then takes its long way after all, the numbers are the same.
    """
    return (
        not module.training
        and module.batch_first
        and x.dim() == 3
        and module.in_proj_weight is not None
        and module.in_proj_bias is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.num_heads % 2 == 0
        and not (torch.is_grad_enabled() and (x.requires_grad or module.in_proj_weight.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
        and torch.backends.mha.get_fastpath_enabled()
    )


def _torch_fuses_layer(layer: nn.TransformerEncoderLayer, x: Tensor) -> bool:
    """Whether torch has one op for this whole layer.

    That op reads the weights of the parts and calls none of them: where a part is of another class (PEFT's Linear),
    it would leave out what is special about it. There the parts are called.
    """
    return (
        not layer.training
        and layer.activation_relu_or_gelu != 0
        and type(layer.self_attn) in (MultiheadAttention, nn.MultiheadAttention)
        and type(layer.linear1) in LINEAR
        and type(layer.linear2) in LINEAR
        and type(layer.norm1) is type(layer.norm2) is nn.LayerNorm
        and not (torch.is_grad_enabled() and layer.linear1.weight.requires_grad)
        and _torch_fuses_attention(layer.self_attn, x)
    )


def _torch_is_faster(x: Tensor, *masks: Tensor | None) -> bool:
    """Whether torch's op for inference is expected to be faster. Beside a mask it has a matrix of scores.

    Measured on a CPU with AVX-512 and AMX, float32 and bfloat16, 1 to 1024 tokens.
    """
    return x.shape[1] < (_LONG if all(mask is None for mask in masks) else _LONG_BESIDE_A_MASK)


def _why_not_layer(layer: nn.Module, x: Any) -> str | None:
    """Why a layer's own forward must serve this call, or None. The parts of the layer decide for themselves."""
    if type(x) not in PLAIN or x.is_nested:
        return "the input is not a plain tensor"
    if layer.norm_first:
        return _NORM_FIRST
    return None


_LONG, _LONG_BESIDE_A_MASK = 256, 128  # tokens, from which on ours is faster
_FASTER = "torch's own op for inference is faster here"
_NORM_FIRST = (
    "norm_first: the sum is needed beside its norm, so the two are not one op; its attention is looked at alone"
)


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per `nn.MultiheadAttention`, encoder layer and decoder layer of `model`, and per subclass of these."""
    changes = []
    named = dict(model.named_modules())
    for name, module in named.items():
        for theirs, (ours, now, upstream) in _SWAPS.items():
            if isinstance(module, theirs):
                reason = _why_not_module(module, theirs, ours, named.get(name.rpartition(".")[0]))
                if reason is None:
                    reason = drift.why_not(upstream(), strict)
                if reason is None:
                    changes.append(swapped(name, module, ours, now))
                else:
                    changes.append(Change(name, described(type(module)), reason=reason))
    return changes


def _why_not_module(
    module: nn.Module, theirs: type[nn.Module], ours: type[nn.Module], parent: nn.Module | None
) -> str | None:
    if isinstance(module, (ours, modules.MultiheadAttention)):
        return "replaced already" if type(module) is ours else "it is one of lwft_kernels already"
    if type(module) is not theirs:
        return f"a subclass of {described(theirs)}: its code is not known"
    for method in ("forward", *_METHODS):
        if method in module.__dict__:
            return f"somebody else has replaced its {method}"
    if parent is not None and type(parent).__module__.partition(".")[0] == "peft":
        return f"PEFT's {type(parent).__name__} around it computes with its weights"
    if getattr(module, "norm_first", False):
        return _NORM_FIRST
    return None


# What the forward of a layer calls on itself: replaced by ours together with it.
_METHODS = ("_sa_block", "_mha_block", "_ff_block")


def _attention_upstream() -> drift.Upstream:
    return drift.Upstream(
        "torch.nn.MultiheadAttention.forward",
        (nn.MultiheadAttention.forward, nn.functional.multi_head_attention_forward),
        # torch 2.13 and 2.14, 2.12, 2.11, 2.10. The older ones were read, from one to the next: they differ in how they
        # raise, in annotations, in when memory is freed, and in the strides of a result that make_fx traces.
        frozenset({"5fcb6bea738b4228", "571932a8a5689ff8", "d0a1925a5ce46858", "85690a7a99686cd4"}),
        _self_test_of_attention,
    )


def _encoder_upstream() -> drift.Upstream:
    layer = nn.TransformerEncoderLayer
    return drift.Upstream(
        "torch.nn.TransformerEncoderLayer.forward",
        (layer.forward, layer._sa_block, layer._ff_block),
        frozenset({"8033a434d582cbf0"}),  # torch 2.10 to 2.14
        _self_test_of_encoder,
    )


def _decoder_upstream() -> drift.Upstream:
    layer = nn.TransformerDecoderLayer
    return drift.Upstream(
        "torch.nn.TransformerDecoderLayer.forward",
        (layer.forward, layer._sa_block, layer._mha_block, layer._ff_block),
        frozenset({"c5aeb844b3b1d480"}),  # torch 2.10 to 2.14
        _self_test_of_decoder,
    )


def _self_test_of_attention() -> str | None:
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, memory = (torch.randn(3, n, 8, dtype=torch.float64) for n in (5, 4))
    hidden = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
    later = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    def calls(attend: nn.Module) -> Mapping[str, Tensor]:
        return {
            "self-attention": attend(x, x, x, attn_mask=later, is_causal=True, need_weights=False)[0],
            "cross-attention": attend(x, memory, memory, key_padding_mask=hidden, need_weights=False)[0],
        }

    return difference(module, MultiheadAttention, calls)


def _self_test_of_encoder() -> str | None:
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    return difference(module, TransformerEncoderLayer, lambda layer: {"out": layer(x, src_key_padding_mask=hidden)})


def _self_test_of_decoder() -> str | None:
    module = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x, memory = (torch.randn(3, n, 8, dtype=torch.float64) for n in (5, 4))
    later = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)

    def calls(layer: nn.Module) -> Mapping[str, Tensor]:
        return {"out": layer(x, memory, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=hidden)}

    return difference(module, TransformerDecoderLayer, calls)


_SWAPS: dict[type[nn.Module], tuple[type[nn.Module], str, Callable[[], drift.Upstream]]] = {
    nn.MultiheadAttention: (MultiheadAttention, "attention", _attention_upstream),
    nn.TransformerEncoderLayer: (TransformerEncoderLayer, "add_layer_norm", _encoder_upstream),
    nn.TransformerDecoderLayer: (TransformerDecoderLayer, "add_layer_norm", _decoder_upstream),
}
