"""Sequences one after the other in a row: each attends within itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lwft_kernels.integrations.transformers.masks import Rule

Attend = Callable[[Tensor, Tensor, Tensor, Rule], Tensor]


@dataclass(frozen=True)
class Packing:
    """Where sequences end, as FlashAttention is told: `cu_seq_lens_q` and `cu_seq_lens_k` of transformers, from 0 on.

    SDPA knows nothing of them; here they hold beside whatever the mask says.
    """

    ends_q: Tensor  # (sequences + 1,)
    ends_k: Tensor

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Packing | None:
        """What the arguments of an attention function say, if they do."""
        ends_q, ends_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
        return None if ends_q is None or ends_k is None else cls(ends_q, ends_k)

    def why_not(self, query: Tensor, key: Tensor) -> str | None:
        """Why it does not go with these queries and keys, or None."""
        if query.shape[0] != 1:
            return "cu_seq_lens are given for more than one row"
        if torch.compiler.is_compiling():  # no value may be looked at
            return None
        ends_q, ends_k = self._values
        if ends_q[-1] != query.shape[2] or ends_k[-1] != key.shape[2]:
            return "cu_seq_lens do not end with the queries and keys"
        return None

    @functools.cached_property
    def _values(self) -> tuple[list[int], list[int]]:
        return self.ends_q.tolist(), self.ends_k.tolist()

    def restrict(self, rule: Rule, queries: int, keys: int, bias: Tensor | None) -> Rule:
        """`rule` within each sequence."""
        elementwise = rule.mask is not None or rule.lengths is not None or bias is not None
        if not elementwise and not torch.compiler.is_compiling():
            of_queries, of_keys = (tuple(b - a for a, b in itertools.pairwise(ends)) for ends in self._values)
            return replace(rule, sequences=(of_queries,), key_sequences=(of_keys,))
        i, j = (torch.arange(n, device=self.ends_q.device) for n in (queries, keys))
        of_i, of_j = torch.bucketize(i, self.ends_q[1:], right=True), torch.bucketize(j, self.ends_k[1:], right=True)
        allowed = of_i[:, None] == of_j
        if rule.causal:  # counted from the end of each, as the op does
            allowed = allowed & ((j - self.ends_k[1:][of_j]) <= (i - self.ends_q[1:][of_i])[:, None])
        mask = allowed if rule.mask is None else allowed & rule.mask
        return replace(rule, causal=False, mask=mask, sequences=None)


def by_sequence(attend: Attend, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """`attend` on each sequence of `rule` by itself; its results, (1, S, H, D), beside each other again."""
    assert rule.sequences is not None
    alone = replace(rule, sequences=None, key_sequences=None)
    rows = []
    for row, of_queries in enumerate(rule.sequences):
        of_keys = of_queries if rule.key_sequences is None else rule.key_sequences[row]
        parts = zip(
            query[row : row + 1].split(of_queries, 2),
            key[row : row + 1].split(of_keys, 2),
            value[row : row + 1].split(of_keys, 2),
            strict=True,
        )
        rows.append(torch.cat([attend(*part, alone) for part in parts], 1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)
