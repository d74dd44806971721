"""Calls so small that PyTorch's own operations take less time are left to them: same numbers, same errors as ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import check_op

import lwft_kernels
from lwft_kernels import backend
from lwft_kernels import functional as LF
from lwft_kernels.attention import functional as attention_functional
from lwft_kernels.attention import reference as attention_reference
from lwft_kernels.norm import functional as norm_functional
from lwft_kernels.norm import reference as norm_reference

pytestmark = pytest.mark.usefixtures("small_calls")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def by_token(batch, heads, length, head_dim, seed):
    """(B, H, S, D) as models hand it over."""
    return normal(batch, length, heads, head_dim, seed=seed).detach().transpose(1, 2).requires_grad_()


def left(op):
    return lwft_kernels.stats().get(op, {"declined": {}})["declined"].get(backend.SMALL, 0)


NORMS = {
    "plain": {
        "x": normal(3, 33),
        "sublayer_out": normal(3, 33, seed=1),
        "weight": normal(33),
        "bias": normal(33, seed=2),
    },
    "without parameters": {"x": normal(2, 1, 5), "sublayer_out": normal(2, 1, 5, seed=1)},
    "without bias": {"x": normal(7), "sublayer_out": normal(7, seed=1), "weight": normal(7, seed=3)},
}
ATTENTIONS = {
    "plain": {name: by_token(2, 3, 5, 8, seed) for seed, name in enumerate("qkv")},
    "one head": {name: normal(2, 1, 5, 8, seed=seed) for seed, name in enumerate("qkv")},
    "causal": {**{name: by_token(1, 3, 7, 8, seed) for seed, name in enumerate("qkv")}, "causal": True, "scale": 0.3},
    "cross": {name: by_token(2, 3, 4 if name == "q" else 9, 8, seed) for seed, name in enumerate("qkv")},
    "decode": {name: normal(2, 3, 1 if name == "q" else 9, 8, seed=seed) for seed, name in enumerate("qkv")},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_add_layer_norm(name, dtype):
    def reference(x, sublayer_out, weight=None, bias=None):
        return norm_reference.add_layer_norm(x, sublayer_out, weight, bias)

    check_op(LF.add_layer_norm, reference, NORMS[name], dtype)
    assert lwft_kernels.stats() == {"add_layer_norm": {"fast": 0, "declined": {backend.SMALL: 1}}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, dtype):
    def ours(**arguments):
        out = LF.attention(**arguments)
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()  # laid out as promised
        return out

    check_op(ours, attention_reference.attention, ATTENTIONS[name], dtype)
    assert lwft_kernels.stats() == {"attention": {"fast": 0, "declined": {backend.SMALL: 1}}}


X, W, Q = normal(3, 8), normal(8), normal(2, 1, 5, 8)
KV = normal(2, 1, 0, 8)
# what PyTorch would compute in its own way, or not at all
NOT_LEFT = {
    "dropout": lambda: LF.add_layer_norm(X, X, W, W, dropout_p=0.1),
    "mixed dtypes": lambda: LF.add_layer_norm(X, X.float()),
    "no elements": lambda: LF.add_layer_norm(X[:0], X[:0]),
    "mask": lambda: LF.attention(Q, Q, Q, mask=torch.zeros(5, 5, dtype=torch.bool)),
    "bias": lambda: LF.attention(Q, Q, Q, bias=normal(5, 5)),
    "prefix": lambda: LF.attention(Q, Q, Q, prefix_k=Q, prefix_v=Q),
    "window": lambda: LF.attention(Q, Q, Q, window=2),
    "softcap": lambda: LF.attention(Q, Q, Q, softcap=2.0),
    "lengths": lambda: LF.attention(Q, Q, Q, lengths=torch.tensor([0, 5])),
    "lse": lambda: LF.attention(Q, Q, Q, return_lse=True),
    "attention dropout": lambda: LF.attention(Q, Q, Q, dropout_p=0.1),
    "causal beside the last key": lambda: LF.attention(Q[:, :, :2], Q, Q, causal=True),
    "no keys": lambda: LF.attention(Q, KV, KV),
    "grouped heads": lambda: LF.attention(normal(2, 2, 5, 8), Q, Q),
    "another layout": lambda: LF.attention(*[normal(1, 2, 3, 4)] * 3),
}


@pytest.mark.parametrize("name", NOT_LEFT)
def test_kept(name):
    out = NOT_LEFT[name]()
    assert not any(torch.isnan(value).any() for value in (out if isinstance(out, tuple) else (out,)))
    counts = lwft_kernels.stats()
    assert [count["fast"] for count in counts.values()] == [1]
    assert not any(count["declined"] for count in counts.values())


@pytest.mark.parametrize("where", ["native", "autocast", "compiled", "threshold", "no gradient"])
def test_kept_where(where):
    x = torch.randn(2, 8, requires_grad=True)
    q = torch.randn(1, 2, 4, 1, requires_grad=True)

    def run():
        return LF.add_layer_norm(x, x), LF.attention(q, q, q)

    if where == "native":
        with lwft_kernels.use_backend("native"):
            run()
    elif where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            run()
    elif where == "compiled":
        graphs = []

        def backend_of_the_test(graph, _):
            graphs.append(graph)
            return graph.forward

        torch.compile(run, backend=backend_of_the_test, fullgraph=True)()
        called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
        assert {"lwft.add_layer_norm_forward.default", "lwft.attention_forward.default"} <= called
        assert lwft_kernels.stats() == {}
        return
    elif where == "threshold":
        assert _past(backward=True) == 0
        return
    else:
        assert _past(backward=False) == 0
        return
    assert {op: count["fast"] for op, count in lwft_kernels.stats().items()} == {"add_layer_norm": 1, "attention": 1}


def _past(backward):
    """How many of two calls just past their thresholds are left to PyTorch."""
    norm, attention = norm_functional._SMALL, attention_functional._SMALL
    x = torch.randn((norm.backward if backward else norm.forward) + 1, requires_grad=backward)
    work = attention.backward if backward else attention.forward
    q = torch.randn(1, 1, 1, 64, requires_grad=backward)
    keys = torch.randn(1, 1, work // 64 + 1, 64)
    LF.add_layer_norm(x, x)
    LF.attention(q, keys, keys)
    if not backward:
        with torch.no_grad():
            x.requires_grad_(), q.requires_grad_()
            LF.add_layer_norm(x, x)
            LF.attention(q, keys, keys)
    return left("add_layer_norm") + left("attention")


def test_up_to_the_threshold():
    """A call that wants a gradient is left to PyTorch up to a larger size than one that does not."""
    x = torch.randn(norm_functional._SMALL.backward)
    q, keys = torch.randn(1, 1, 1, 64), torch.randn(1, 1, attention_functional._SMALL.backward // 64, 64)
    LF.add_layer_norm(x, x)
    LF.attention(q, keys, keys)
    assert left("add_layer_norm") == left("attention") == 0
    x.requires_grad_()
    keys.requires_grad_()
    LF.add_layer_norm(x, x)
    LF.attention(q, keys, keys)
    assert left("add_layer_norm") == left("attention") == 1


WRONG = {
    "x no tensor": lambda: LF.add_layer_norm([1.0], X),
    "x an integer": lambda: LF.add_layer_norm(torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.int64)),
    "sublayer_out an integer": lambda: LF.add_layer_norm(X, torch.ones(3, 8, dtype=torch.int64)),
    "sublayer_out to be broadcast": lambda: LF.add_layer_norm(X, X[:1]),
    "x without dimensions": lambda: LF.add_layer_norm(X[0, 0], X[0, 0]),
    "weight too short": lambda: LF.add_layer_norm(X, X, W[:1]),
    "weight a matrix": lambda: LF.add_layer_norm(X, X, X),
    "weight elsewhere": lambda: LF.add_layer_norm(X, X, W.to("meta")),
    "bias of another dtype": lambda: LF.add_layer_norm(X, X, W, W.float()),
    "weight of another dtype": lambda: LF.add_layer_norm(X, X, W.bfloat16(), W.bfloat16()),
    "eps zero": lambda: LF.add_layer_norm(X, X, W, W, 0.0),
    "eps infinite": lambda: LF.add_layer_norm(X, X, W, W, float("inf")),
    "dropout no number": lambda: LF.add_layer_norm(X, X, W, W, dropout_p=False),
    "q flat": lambda: LF.attention(X, X, X),
    "q in five dimensions": lambda: LF.attention(*[normal(2, 1, 1, 2, 8)] * 3),
    "k of another dtype": lambda: LF.attention(Q, Q.float(), Q),
    "k an integer": lambda: LF.attention(*[torch.ones(1, 1, 2, 8, dtype=torch.int64)] * 3),
    "k elsewhere": lambda: LF.attention(Q, Q.to("meta"), Q.to("meta")),
    "k of another batch": lambda: LF.attention(Q, Q[:1], Q[:1]),
    "v of another head size": lambda: LF.attention(Q, Q, Q[..., :4]),
    "v shorter": lambda: LF.attention(Q, Q, Q[:, :, :2]),
    "causal a number": lambda: LF.attention(Q, Q, Q, causal=0),
    "scale no number": lambda: LF.attention(Q, Q, Q, scale=True),
    "scale not finite": lambda: LF.attention(Q, Q, Q, scale=float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_same(name, monkeypatch):
    with pytest.raises((TypeError, ValueError)) as small:
        WRONG[name]()
    monkeypatch.setattr(backend, "leave_small_calls", False)
    with pytest.raises((TypeError, ValueError)) as checked:
        WRONG[name]()
    assert (small.type, str(small.value)) == (checked.type, str(checked.value))
    assert not any(count["declined"] for count in lwft_kernels.stats().values())


def test_counts_of_a_self_test_are_not_kept():
    LF.add_layer_norm(X, X)
    with backend.not_counted():
        LF.add_layer_norm(X, X)
    assert left("add_layer_norm") == 1
    lwft_kernels.reset_stats()
    assert lwft_kernels.stats() == {}


def test_it_is_pytorch_that_computes():
    out = LF.add_layer_norm(X, X, W)
    assert torch.equal(out, F.layer_norm(X + X, (8,), W))
    assert out.grad_fn.name() == "NativeLayerNormBackward0"
