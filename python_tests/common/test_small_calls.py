"""A plain eager call on the CPU is tried before its arguments are looked at, and is as good as one looked at first."""

from __future__ import annotations

import pytest
import torch

import lwft_kernels
from lwft_kernels import backend, checks
from lwft_kernels import functional as LF

X, D = torch.randn(3, 8), {"down_weight": torch.randn(4, 8), "up_weight": torch.randn(8, 4)}
Q, KV = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)

CALLS = {
    "add_layer_norm": lambda **p: LF.add_layer_norm(X, X + 1, **p),
    "adapter": lambda **p: LF.adapter(X, D["down_weight"], None, D["up_weight"], None, residual=X, **p),
    "lora_linear": lambda **p: LF.lora_linear(X, torch.ones(8, 8), None, *D.values(), **p),
    "low_rank_linear": lambda **p: LF.low_rank_linear(X, *D.values(), torch.ones(8)),
    "attention": lambda **p: LF.attention(
        Q, KV, KV, mask=torch.ones(1, 1, 3, 5, dtype=torch.bool), lengths=torch.tensor([5, 2]), causal=True, **p
    ),
}


def _not_asked(*_: object) -> None:
    raise AssertionError("the arguments were looked at")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", CALLS)
def test_tried_first_and_the_same(native, monkeypatch, op, dropout_p):
    def run():
        torch.manual_seed(3)
        return CALLS[op](dropout_p=dropout_p)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "attempts", lambda x: False)
        expected = run()
    for name in ("floating", "shape", "probability", "number", "positive"):
        monkeypatch.setattr(checks, name, _not_asked)
    lwft_kernels.reset_stats()
    assert torch.equal(run(), expected)
    assert lwft_kernels.stats() == {op: {"fast": 1, "declined": {}}}
