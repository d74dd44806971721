"""Attention modules: `MultiheadAttention` (torch's, same keys), `PrefixAttention`, `MemoryAttention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwft_kernels import backend, checks
from lwft_kernels.attention.functional import attention


def _check_heads(module: str, embed_dim: object, num_heads: object) -> None:
    width, heads = checks.size(module, "embed_dim", embed_dim), checks.size(module, "num_heads", num_heads)
    if width % heads:
        raise ValueError(f"{module}: embed_dim must be a multiple of num_heads, got {width} and {heads}")


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (Vaswani et al. 2017, section 3.2.2) on the fused attention op.

    Constructor, forward arguments, mask conventions and state_dict are torch's, so a torch module's state loads as it
    is. Every mask form is served: boolean (True = may not attend) or float, per key or per query, 2-D or 3-D, with
    `is_causal`; `add_bias_kv`, `add_zero_attn`, `kdim`/`vdim`, unbatched inputs and both layouts too.

    Two things differ. A query that may attend to nothing gets zeros before the output projection, never NaN; and
    dropout draws from the package's own stream. A call with ``need_weights=True`` (torch's default) asks for the
    (S, L) matrix this package exists to avoid: it is answered by torch's own code and counted as declined in `stats`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        _check_heads(name, embed_dim, num_heads)
        dropout = checks.probability(name, "dropout", dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

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
        """As `torch.nn.MultiheadAttention.forward`: (attn_output, None), or torch's pair with need_weights."""
        reason = self._why_not(query, key, value, need_weights)
        if reason is not None:
            backend.record_decline(type(self).__name__, reason)
            return self._declined(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask; pass attn_mask as well")
        return self._fused(query, key, value, key_padding_mask, attn_mask, is_causal), None

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """The output, by one projection of what is one tensor, and the attention op."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = (self._split_heads(t) for t in self._project(query, key, value))
        # torch's causal mask is aligned to the first key, the op's to the last: the same only when square
        causal = is_causal and q.shape[2] == k.shape[2]
        mask, bias = self._masks(q, k, None if causal else attn_mask, key_padding_mask)
        prefix_k, prefix_v = self._prefix(q)
        heads = attention(
            q, k, v, bias=bias, mask=mask, prefix_k=prefix_k, prefix_v=prefix_v, causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out = self._merge_heads(heads)
        return out if batched else out.squeeze(0 if self.batch_first else 1)

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str | None:
        """The reason why the fused op cannot serve this call, or None."""
        if need_weights:
            return "need_weights=True asks for the attention matrix; pass need_weights=False"
        if query.dim() not in (2, 3):
            return "the query is neither 2-D nor 3-D"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        return None

    def _declined(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections; one product where query, key and value are one tensor."""
        e = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        q = F.linear(query, weight[:e], None if bias is None else bias[:e])
        if key is value:
            k, v = F.linear(key, weight[e:], None if bias is None else bias[e:]).chunk(2, dim=-1)
            return q, k, v
        k = F.linear(key, weight[e : 2 * e], None if bias is None else bias[e : 2 * e])
        v = F.linear(value, weight[2 * e :], None if bias is None else bias[2 * e :])
        return q, k, v

    def _split_heads(self, projected: Tensor) -> Tensor:
        """(B, S, E) or (S, B, E) -> (B, H, S, D), a view the op reads as it is."""
        split: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return split.transpose(1, 2) if self.batch_first else split.permute(1, 2, 0, 3)

    def _merge_heads(self, heads: Tensor) -> Tensor:
        """(B, H, S, D) -> the output projection, in the layout of the query."""
        merged = heads.transpose(1, 2) if self.batch_first else heads.permute(2, 0, 1, 3)
        return F.linear(merged.flatten(2), self.out_proj.weight, self.out_proj.bias)

    def _masks(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's two masks as the op's: bool True = may attend, and an additive bias."""
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        masks: list[Tensor] = []
        biases: list[Tensor] = []
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise ValueError(
                    f"MultiheadAttention: key_padding_mask must have shape (B, L) = ({batch}, {keys}), got "
                    f"{tuple(key_padding_mask.shape)}"
                )
            padding = key_padding_mask[:, None, None, :]
            masks.append(~padding) if padding.dtype == torch.bool else biases.append(padding)
        if attn_mask is not None:
            if attn_mask.shape == (queries, keys):
                per_query = attn_mask[None, None]
            elif attn_mask.shape == (batch * heads, queries, keys):
                per_query = attn_mask.unflatten(0, (batch, heads))
            else:
                raise ValueError(
                    f"MultiheadAttention: attn_mask must have shape (S, L) = ({queries}, {keys}) or (B*H, S, L) = "
                    f"({batch * heads}, {queries}, {keys}), got {tuple(attn_mask.shape)}"
                )
            masks.append(~per_query) if per_query.dtype == torch.bool else biases.append(per_query)
        mask = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        bias = biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None
        return mask, None if bias is None else bias.to(q.dtype)

    def _prefix(self, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The keys and values every query sees, (1, H, P, D): what add_bias_kv and add_zero_attn append."""
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(1, self.num_heads, 1, self.head_dim))
            values.append(self.bias_v.view(1, self.num_heads, 1, self.head_dim))
        if self.add_zero_attn:
            zero = q.new_zeros(1, self.num_heads, 1, self.head_dim)
            keys.append(zero)
            values.append(zero)
        if not keys:
            return None, None
        return torch.cat(keys, 2).to(q.dtype), torch.cat(values, 2).to(q.dtype)


class PrefixAttention(MultiheadAttention):
    """Multi-head attention with learned keys and values that every query sees: prefix tuning (Li & Liang 2021, eq. 3).

    The prefix is never concatenated to the keys. Its parameters are `prefix_k` and `prefix_v`, (1, H, P, D); the rest
    of the state_dict is `torch.nn.MultiheadAttention`'s.

    Args:
        embed_dim, num_heads: as in `torch.nn.MultiheadAttention`.
        prefix_length: number P of learned keys.
        **kwargs: the remaining arguments of `torch.nn.MultiheadAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, prefix_length: int, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, **kwargs)
        checks.size("PrefixAttention", "prefix_length", prefix_length)
        shape = (1, num_heads, prefix_length, self.head_dim)
        self.prefix_k = nn.Parameter(self.out_proj.weight.new_empty(shape))
        self.prefix_v = nn.Parameter(self.out_proj.weight.new_empty(shape))
        nn.init.normal_(self.prefix_k, std=0.02)
        nn.init.normal_(self.prefix_v, std=0.02)

    @classmethod
    def from_attention(cls, module: nn.MultiheadAttention, prefix_length: int) -> PrefixAttention:
        """The pretrained `module` with a learned prefix; its own parameters are shared and frozen."""
        result = cls(
            module.embed_dim,
            module.num_heads,
            prefix_length,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=module.out_proj.weight.device,
            dtype=module.out_proj.weight.dtype,
        )
        for name, parameter in module.named_parameters():
            owner = result.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], parameter.requires_grad_(False))
        return result.train(module.training)

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str | None:
        if need_weights:
            raise ValueError("PrefixAttention: torch's code knows no prefix; pass need_weights=False")
        return super()._why_not(query, key, value, need_weights)

    def _prefix(self, q: Tensor) -> tuple[Tensor, Tensor]:
        appended_k, appended_v = super()._prefix(q)
        prefix_k, prefix_v = self.prefix_k.to(q.dtype), self.prefix_v.to(q.dtype)
        if appended_k is None or appended_v is None:
            return prefix_k, prefix_v
        return torch.cat((prefix_k, appended_k), 2), torch.cat((prefix_v, appended_v), 2)


class MemoryAttention(nn.Module):
    """Attention of queries over a memory (context): o = sum_i softmax_i(scale * (B q) . (A m_i)) C m_i.

    With one head and ``scale=1.0`` (the default) this is the read of end-to-end memory networks (Sukhbaatar et al.
    2015, eq. 1-2); with heads and ``scale=None`` it is scaled cross attention. `num_slots` adds learned keys and values
    that every query sees besides the memory (persistent memory, Sukhbaatar et al. 2019).

    Args:
        embed_dim: width of queries and result.
        num_heads: number of heads; divides `embed_dim`.
        memory_dim: width of the memory; None for `embed_dim`.
        num_slots: number of learned keys and values.
        scale: factor of the scores; None for 1/sqrt(head size).
        bias: whether the projections have one.
        dropout: probability of an attention weight to be zeroed in training.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        memory_dim: int | None = None,
        num_slots: int = 0,
        scale: float | None = 1.0,
        bias: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_heads(name, embed_dim, num_heads)
        checks.size(name, "num_slots", num_slots, least=0)
        memory_dim = embed_dim if memory_dim is None else checks.size(name, "memory_dim", memory_dim)
        dropout = checks.probability(name, "dropout", dropout)
        scale = None if scale is None else checks.number(name, "scale", scale)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scale, self.dropout = scale, dropout
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.k_proj = nn.Linear(memory_dim, embed_dim, **factory)
        self.v_proj = nn.Linear(memory_dim, embed_dim, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.slot_k: nn.Parameter | None
        self.slot_v: nn.Parameter | None
        if num_slots:
            shape = (1, num_heads, num_slots, self.head_dim)
            self.slot_k = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02))
            self.slot_v = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02))
        else:
            self.register_parameter("slot_k", None)
            self.register_parameter("slot_v", None)

    def forward(
        self, query: Tensor, memory: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Read the memory.

        Args:
            query: (B, S, embed_dim).
            memory: (B, L, memory_dim), or (L, memory_dim) for one memory shared by the batch.
            mask: bool, broadcastable to (B, H, S, L); True = may attend.
            lengths: (B,) integer, the valid rows of each memory.

        Returns:
            (B, S, embed_dim); the read of an empty memory is zero before the output projection.
        """
        if query.dim() != 3:
            raise ValueError(f"MemoryAttention: query must have shape (B, S, embed_dim), got {tuple(query.shape)}")
        if memory.dim() == 2:
            memory = memory.unsqueeze(0)
        if memory.dim() != 3 or memory.shape[0] not in (1, query.shape[0]):
            raise ValueError(
                f"MemoryAttention: memory must have shape (B, L, memory_dim) with B = {query.shape[0]}, or "
                f"(L, memory_dim), got {tuple(memory.shape)}"
            )
        q = self._heads(self.q_proj(query))
        k, v = (self._heads(p(memory)).expand(query.shape[0], -1, -1, -1) for p in (self.k_proj, self.v_proj))
        slots = (None, None) if self.slot_k is None or self.slot_v is None else (self.slot_k, self.slot_v)
        prefix_k, prefix_v = (None if s is None else s.to(q.dtype) for s in slots)
        read = attention(
            q, k, v, mask=mask, prefix_k=prefix_k, prefix_v=prefix_v, scale=self.scale, lengths=lengths,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        result: Tensor = self.out_proj(read.transpose(1, 2).flatten(2))
        return result

    def _heads(self, projected: Tensor) -> Tensor:
        split: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return split.transpose(1, 2)

    def extra_repr(self) -> str:
        slots = 0 if self.slot_k is None else self.slot_k.shape[2]
        return f"num_heads={self.num_heads}, scale={self.scale}, dropout={self.dropout}, num_slots={slots}"
