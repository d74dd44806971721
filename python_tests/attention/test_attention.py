"""attention: numbers against the oracle, gradients, errors, and every way PyTorch may call it."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from attention_inputs import make
from oracle import check_op, outputs_and_gradients, relative_error
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.attention import reference
from lwft_kernels.dropout import keep_multiplier

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_seed(**arguments):
    """The reference, drawing its dropout seed from the same state of torch's generator as ours."""
    torch.manual_seed(0)
    with lwft_kernels.use_backend("reference"):
        return LF.attention(**arguments)


def ours(**arguments):
    torch.manual_seed(0)
    return LF.attention(**arguments)


def check(arguments, dtype, **options):
    check_op(ours, with_seed, arguments, dtype, **options)


# ---- numbers ----


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 0, 5, 8),  # no tokens
        (2, 2, 1, 3, 0, 16),  # no keys
        (0, 2, 2, 4, 4, 8),  # no sequences
        (1, 1, 1, 1, 1, 1),
        (2, 3, 3, 7, 5, 33),
        (1, 6, 2, 19, 23, 80),  # grouped heads
        (2, 4, 4, 61, 131, 64),
        (1, 2, 2, 70, 300, 128),
        (1, 3, 1, 9, 17, 16),
        (1, 4, 2, 1, 517, 64),  # decoding
        (2, 8, 1, 1, 1100, 128),
        (1, 2, 2, 11, 9, 200),
        (1, 1, 1, 530, 40, 24),
    ],
    ids=str,
)
def test_accuracy(shape, dtype):
    check(make(*shape), dtype)


@every_dtype
@pytest.mark.parametrize(
    "queries,keys",
    [(70, 70), (33, 150), (60, 21), (3, 600)],
    ids=str,
)
@pytest.mark.parametrize(
    "rule",
    [
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 40},
        {"window": 2**62},
        {"softcap": 2.0, "causal": True},
        {"scale": 1.0},
        {"causal": True, "prefix": 6},
        {"causal": True, "window": 30, "prefix": 140, "shared_prefix": False},
    ],
    ids=str,
)
def test_rules(rule, queries, keys, dtype):
    check(make(2, 4, 2, queries, keys, 32, **rule), dtype)


@every_dtype
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 4), (1, 37), (1, 150))), ids=str)
def test_bias_of_every_broadcast(sizes, dtype):
    # The prefix has no bias: without it a bias that is the same for all keys has a gradient of exactly 0.
    check(make(2, 4, 2, 37, 150, 16, prefix=70, bias=sizes), dtype)


@pytest.mark.parametrize("bias", [(150,), (37, 150), (4, 1, 150), (4, 37, 150)], ids=str)
def test_bias_of_fewer_dimensions(bias):
    check(make(2, 4, 4, 37, 150, 16, bias=bias, softcap=3.0, causal=True), torch.float32)


@pytest.mark.parametrize("batch,heads", [(1, 12), (5, 1), (3, 4)])
def test_bias_matrix_with_many_and_with_few_heads(batch, heads):
    """The gradient of a matrix is summed by tasks that differ with the number of heads."""
    for bias in ((1, heads, 60, 290), (1, 1, 60, 290)):
        check(make(batch, heads, heads, 60, 290, 8, bias=bias), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_beside_16_bit(dtype):
    arguments = make(2, 2, 2, 20, 30, 16, bias=(1, 2, 20, 30))
    arguments["bias"] = arguments["bias"].detach().float().requires_grad_()
    check(arguments, dtype, keep=frozenset({"bias"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_shape", [(2, 4, 45, 133), (2, 1, 1, 133), (45, 1), (133,)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_mask(mask_shape, prefix, dtype):
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.4
    check(make(2, 4, 2, 45, 133, 24, mask=mask, prefix=prefix), dtype)


@every_dtype
@pytest.mark.parametrize("queries", [1, 30])
def test_lengths(queries, dtype):
    for lengths in ([0, 3, 200], [-4, 77, 250]):  # the second is clamped to 0..L
        for integers in (torch.int64, torch.int32):
            check(make(3, 2, 1, queries, 200, 16, lengths=torch.tensor(lengths, dtype=integers)), dtype)


def test_what_lies_beyond_lengths_is_never_read():
    arguments = make(2, 2, 2, 5, 40, 8, lengths=torch.tensor([7, 40]))
    plain = outputs_and_gradients(ours, arguments)
    with torch.no_grad():
        for name in ("k", "v"):
            arguments[name][0, :, 7:] = torch.nan
    for name, value in outputs_and_gradients(ours, arguments).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)


@every_dtype
@pytest.mark.parametrize("queries", [2, 20])
def test_rows_that_may_attend_to_nothing(queries, dtype):
    mask = torch.ones(queries, 9, dtype=torch.bool)
    mask[1] = False
    arguments = make(2, 2, 1, queries, 9, 16, mask=mask, dropout_p=0.2, return_lse=True)
    check(arguments, dtype)
    out, lse = ours(**arguments)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert (lse[:, :, 1] == -torch.inf).all() and torch.isfinite(lse[:, :, 0]).all()
    # A gradient that comes in through lse itself must not make NaN either.
    grads = torch.autograd.grad(out.sum() + lse.sum(), [arguments[n] for n in "qkv"])
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(grads[0][:, :, 1], torch.zeros_like(grads[0][:, :, 1]))


@pytest.mark.parametrize("keys", [40, 300])
def test_additive_mask_of_the_lowest_number(keys):
    """As Hugging Face writes its masks: a row of nothing but the lowest float32 is a plain mean."""
    bias = torch.zeros(1, 1, 10, keys)
    bias[..., 20:] = torch.finfo(torch.float32).min
    bias[..., 3, :] = torch.finfo(torch.float32).min
    arguments = make(2, 2, 2, 10, keys, 16)
    arguments["bias"] = bias
    check(arguments, torch.float32)
    out = ours(**{n: v.float() for n, v in arguments.items()})
    torch.testing.assert_close(out[:, :, 3], arguments["v"].float().mean(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value):
    for queries in (3, 20):
        arguments = make(1, 1, 1, queries, 30, 8)
        with torch.no_grad():
            arguments["q"][0, 0, 1, 2] = value
        out = ours(**arguments)
        assert not torch.isfinite(out[0, 0, 1]).any()
        assert torch.isfinite(out[0, 0, 0]).all() and torch.isfinite(out[0, 0, 2]).all()


@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("queries,prefix", [(1, 0), (1, 5), (40, 0), (40, 70)])
def test_dropout(queries, prefix, p, dtype):
    check(make(2, 4, 2, queries, 145, 16, prefix=prefix, causal=True, dropout_p=p), dtype)


def test_dropout_is_that_of_the_stream():
    """Each weight is kept or dropped as `keep_multiplier` says, in the kernel as in the reference."""
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 66, 8)
    v = torch.eye(66).expand(2, 3, 66, 66)
    seed = torch.tensor([3, 4])
    d = F.pad(q, (0, 58)), F.pad(k, (0, 58))
    weights, _ = torch.ops.lwft.attention_forward(*d, v, None, None, None, None, None, seed, 1.0, False, 0, 0.0, 0.3)
    plain = torch.softmax(q @ k.transpose(-2, -1), -1)
    kept = keep_multiplier(seed, torch.arange(2 * 3 * 20), torch.arange(66), 0.3, torch.float32)
    torch.testing.assert_close(weights, plain * kept.view(plain.shape))


@every_dtype
@pytest.mark.parametrize("queries,keys,prefix", [(1, 600, 0), (30, 50, 0), (30, 150, 4)])
def test_lse(queries, keys, prefix, dtype):
    check(make(2, 4, 2, queries, keys, 16, prefix=prefix, causal=True, dropout_p=0.2, return_lse=True), dtype)


def test_gradient_through_lse_alone():
    arguments = make(2, 2, 2, 10, 30, 8, return_lse=True)

    def lse_alone(function):
        return lambda **a: function(**a)[1]

    check_op(lse_alone(ours), lse_alone(with_seed), arguments, torch.float32)


def test_halves_merge_by_lse():
    arguments = {n: v.detach() for n, v in make(2, 2, 2, 9, 64, 16).items()}
    q, k, v = arguments.values()
    parts = [ours(q=q, k=k[:, :, s], v=v[:, :, s], return_lse=True) for s in (slice(0, 20), slice(20, 64))]
    share = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
    merged = sum(w[..., None] * out for w, (out, _) in zip(share, parts, strict=True))
    torch.testing.assert_close(merged, ours(**arguments))


def test_causal_is_aligned_to_the_last_key():
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(2)
    torch.testing.assert_close(
        ours(q=q, k=k, v=v, causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    )


def test_prefix_equals_concatenation():
    arguments = {n: v.detach() for n, v in make(2, 4, 2, 20, 20, 16, prefix=7).items()}
    q, k, v, prefix_k, prefix_v = arguments.values()
    joined = [torch.cat((p.expand(2, -1, -1, -1), t), 2) for p, t in ((prefix_k, k), (prefix_v, v))]
    allowed = torch.cat((torch.ones(20, 7, dtype=torch.bool), torch.ones(20, 20, dtype=torch.bool).tril()), 1)
    expected = F.scaled_dot_product_attention(q, *joined, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(ours(**arguments, causal=True), expected)


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(0, 150),
    keys=st.integers(0, 280),
    prefix=st.integers(0, 40),
    head_dim=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    p=st.sampled_from([0.0, 0.3]),
)
def test_any_shape(batch, kv_heads, group, queries, keys, prefix, head_dim, causal, window, p):
    arguments = make(
        batch, kv_heads * group, kv_heads, queries, keys, head_dim,
        prefix=prefix, causal=causal, window=window, dropout_p=p, return_lse=True,
    )  # fmt: skip
    check(arguments, torch.float64)


# ---- memory layout ----


def test_output_is_laid_out_for_the_projection_that_follows():
    out = ours(**make(2, 3, 3, 5, 5, 4))
    merged = out.transpose(1, 2).reshape(2, 5, 12)
    assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()


@pytest.mark.parametrize("queries", [1, 12])
def test_any_strides(queries):
    def views(t):
        yield t
        yield t.transpose(1, 2).contiguous().transpose(1, 2)
        yield t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        yield torch.stack((t, t), -1)[..., 0]  # last stride 2
        yield F.pad(t, (3, 2))[..., 3:-2]

    q, k, v = torch.randn(2, 4, queries, 20), torch.randn(2, 2, 20, 20), torch.randn(2, 2, 20, 20)
    bias, mask = torch.randn(2, 4, queries, 20), torch.rand(2, 4, queries, 20) > 0.2
    grad = torch.randn(q.shape)
    expected = None
    for q_view, k_view, v_view, bias_view, mask_view, grad_view in zip(
        *(views(t) for t in (q, k, v, bias, mask, grad)), strict=True
    ):
        leaves = [t.detach().requires_grad_() for t in (q_view, k_view, v_view, bias_view)]
        out = LF.attention(*leaves[:3], bias=leaves[3], mask=mask_view)
        results = (out, *torch.autograd.grad(out, leaves, grad_view))
        expected = results if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_expanded_inputs_and_gradient():
    k = torch.randn(1, 1, 9, 8, requires_grad=True)
    q = torch.randn(3, 2, 4, 8)
    shared = k.expand(3, 2, 9, 8)
    LF.attention(q, shared, shared).sum().backward()  # grad_out has stride 0 everywhere
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, shared, shared).sum(), k)[0]
    torch.testing.assert_close(k.grad, expected, rtol=1e-4, atol=1e-5)


# ---- the ways of PyTorch ----


@pytest.mark.parametrize(
    "rule",
    [
        {"causal": True},
        {"softcap": 1.5, "dropout_p": 0.3},
        {"window": 2},
        {"mask": torch.tensor([[True, False, True, True]] * 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix_batch", [1, 2])
def test_gradcheck(rule, prefix_batch):
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (2, 2, 3, 3),
        (2, 1, 4, 3),
        (2, 1, 4, 3),
        (2, 3, 4),
        (prefix_batch, 1, 2, 3),
        (prefix_batch, 1, 2, 3),
    )
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def op(q, k, v, bias, prefix_k, prefix_v):
        torch.manual_seed(3)
        return LF.attention(q, k, v, bias=bias, prefix_k=prefix_k, prefix_v=prefix_v, return_lse=True, **rule)

    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("names", [["q"], ["v"], ["k"], ["bias"], ["prefix_k"], ["prefix_v"], ["q", "prefix_v"]])
def test_gradients_that_are_not_wanted_are_not_computed(names):
    arguments = make(2, 4, 2, 20, 30, 8, prefix=3, bias=(1, 4, 20, 30))
    for name, value in arguments.items():
        value.requires_grad_(name in names)
    check(arguments, torch.float32)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    extra = [None] * 5
    if full:
        extra = [
            torch.randn(1, 4, 6, 7), torch.rand(2, 1, 1, 7) > 0.2, torch.randn(1, 2, 3, 8),
            torch.randn(1, 2, 3, 8), torch.tensor([7, 3]),
        ]  # fmt: skip
    seed = torch.tensor([3, 5]) if full else None
    rule = (0.3, True, 5, 2.0, 0.2) if full else (0.3, False, 0, 0.0, 0.0)
    for tensor in (q, k, v, extra[0], extra[2], extra[3]):
        if tensor is not None:
            tensor.requires_grad_()
    inputs = (q, k, v, *extra, seed, *rule)
    torch.library.opcheck(torch.ops.lwft.attention_forward.default, inputs)
    out, lse = torch.ops.lwft.attention_forward(*inputs)
    for needs in (0b111111, 0b000101):
        arguments = (
            torch.randn(out.shape), torch.randn(lse.shape) if full else None, q, k, v, *extra, out, lse, seed,
            *rule, needs,
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.lwft.attention_backward.default,
            tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments),
        )


class Attend(torch.nn.Module):
    def forward(self, q, k, v, bias=None, prefix=None):
        return LF.attention(
            q, k, v, bias=bias, prefix_k=prefix, prefix_v=prefix, causal=True, window=6, return_lse=True
        )


def test_compile():
    leaves = [t.requires_grad_() for t in (*torch.randn(3, 2, 4, 7, 8), torch.randn(4, 1, 7), torch.randn(1, 4, 2, 8))]

    def run(module):
        out, lse = module(*leaves)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    for mine, expected in zip(run(torch.compile(Attend(), fullgraph=True)), run(Attend()), strict=True):
        torch.testing.assert_close(mine, expected)


def test_compile_with_dropout():
    def attend(q, k, v):
        return LF.attention(q, k, v, dropout_p=0.5)

    q, k = torch.randn(2, 2, 4, 64, 8)
    v = torch.ones(2, 4, 64, 8)
    out = torch.compile(attend, fullgraph=True)(q, k, v)
    assert abs(out.mean().item() - 1) < 0.05 and out.std() > 0.01


def test_export_with_a_dynamic_length():
    inputs = tuple(torch.randn(3, 2, 4, 7, 8))
    tokens = torch.export.Dim("tokens", min=2, max=600)
    program = torch.export.export(Attend(), inputs, dynamic_shapes=({2: tokens},) * 3)
    longer = tuple(torch.randn(3, 2, 4, 130, 8))
    for mine, expected in zip(program.module()(*longer), Attend()(*longer), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_hands_over_mixed_inputs(dtype):
    linear = torch.nn.Linear(16, 16)
    x = torch.randn(2, 3, 10, 16)
    bias, prefix = torch.randn(1, 3, 10, 10, requires_grad=True), torch.randn(1, 3, 2, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        q = linear(x)
        out = LF.attention(q, x, x, bias=bias, prefix_k=prefix, prefix_v=prefix)
    assert q.dtype == out.dtype == dtype
    k = torch.cat((prefix.expand(2, 3, 2, 16), x), 2)
    with torch.autocast("cpu", dtype=dtype):
        expected = F.scaled_dot_product_attention(linear(x), k, k, attn_mask=F.pad(bias, (2, 0)))
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.02)
    grads = torch.autograd.grad(out.float().square().sum(), (linear.weight, bias, prefix))
    assert all(g.dtype == torch.float32 for g in grads)


def test_checkpoint_draws_the_same_dropout():
    leaves = list(make(2, 2, 2, 12, 12, 8).values())

    def attend(q, k, v):
        return LF.attention(q, k, v, dropout_p=0.4)

    results = []
    for run in (attend, lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 12, 150, 150, 16),  # many heads
        (1, 2, 1, 300, 500, 16),  # few: rows and keys are split
        (1, 2, 1, 2, 1500, 16),  # decoding
        (1, 12, 6, 1, 700, 16),  # decoding with as many heads at once as leave enough tasks
        (1, 12, 12, 20, 300, 16),  # backward likewise
    ],
    ids=str,
)
def test_same_bits_for_every_thread_count(shape):
    arguments = make(*shape, prefix=5, causal=True, dropout_p=0.1, bias=(1, *shape[1:2], *shape[3:5]), return_lse=True)
    arguments = {
        n: v.detach().float().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()
    }
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(ours, arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_counts():
    arguments = make(1, 1, 1, 2, 2, 4)
    LF.attention(**arguments)
    assert lwft_kernels.stats() == {"attention": {"fast": 1, "declined": {}}}


def test_what_is_not_supported_says_so():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 1, 3, 8))
    (grad,) = torch.autograd.grad(LF.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: LF.attention(t, k, v).sum())(q)


# ---- errors ----

WRONG = [
    ({"q": "text"}, TypeError, "q must be a Tensor"),
    ({"v": None}, TypeError, "v must be a Tensor"),
    ({"k": torch.ones(2, 2, 5, 8, dtype=torch.int64)}, TypeError, "k must be float"),
    ({"q": torch.ones(2, 3, 8)}, ValueError, "q must have shape"),
    ({"k": torch.ones(2, 2, 5, 9)}, ValueError, "k must have shape"),
    ({"k": torch.ones(3, 2, 5, 8)}, ValueError, "k must have shape"),
    ({"v": torch.ones(2, 2, 6, 8)}, ValueError, "v must have shape"),
    ({"v": torch.ones(2, 2, 5, 4)}, ValueError, "v must have shape"),
    ({"q": torch.ones(2, 3, 3, 8)}, ValueError, "multiple of that of k and v, got 3 and 2"),
    ({"k": torch.ones(2, 0, 5, 8), "v": torch.ones(2, 0, 5, 8)}, ValueError, "multiple of that of k"),
    (dict.fromkeys("qkv", torch.ones(2, 2, 5, 0)), ValueError, "head size, is empty"),
    ({"k": torch.ones(2, 2, 5, 8, device="meta")}, ValueError, "k is on meta"),
    ({"v": torch.ones(2, 2, 5, 8).bfloat16()}, TypeError, "v is torch.bfloat16 but q is torch.float32"),
    ({"bias": torch.ones(4, 3, 4)}, ValueError, "bias must be broadcastable"),
    ({"bias": torch.ones(1, 2, 4, 3, 5)}, ValueError, "bias must be broadcastable"),
    ({"bias": torch.ones(5).double()}, TypeError, "bias is torch.float64"),
    ({"bias": torch.ones(5, dtype=torch.bool)}, TypeError, "bias must be float"),
    ({"bias": torch.ones(1, 4, 3, 4)}, ValueError, "bias must be broadcastable"),
    ({"bias": torch.ones(1, 1, 1, 5).double()}, TypeError, "bias is torch.float64"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor"),
    ({"mask": torch.ones(5)}, TypeError, "pass an additive mask as bias"),
    ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "mask must be broadcastable"),
    ({"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    ({"mask": torch.ones(1, 1, 3, 5)}, TypeError, "pass an additive mask as bias"),
    ({"mask": torch.ones(2, 2, 3, 5, dtype=torch.bool)}, ValueError, "mask must be broadcastable"),
    ({"mask": True}, TypeError, "mask must be a Tensor"),
    ({"prefix_k": torch.ones(1, 2, 3, 8)}, ValueError, "prefix_v is None but prefix_k is given"),
    ({"prefix_v": torch.ones(1, 2, 3, 8)}, ValueError, "prefix_k is None but prefix_v is given"),
    (dict.fromkeys(("prefix_k", "prefix_v"), torch.ones(3, 2, 3, 8)), ValueError, "prefix_k must have shape"),
    (dict.fromkeys(("prefix_k", "prefix_v"), torch.ones(1, 4, 3, 8)), ValueError, "prefix_k must have shape"),
    (
        {"prefix_k": torch.ones(1, 2, 3, 8), "prefix_v": torch.ones(1, 2, 2, 8)},
        ValueError,
        "prefix_v must have shape that of prefix_k",
    ),
    (
        dict.fromkeys(("prefix_k", "prefix_v"), torch.ones(1, 2, 3, 8).half()),
        TypeError,
        "prefix_k is torch.float16",
    ),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"scale": "big"}, TypeError, "scale must be a number"),
    ({"causal": 1}, TypeError, "causal must be True or False"),
    ({"return_lse": None}, TypeError, "return_lse must be True or False"),
    ({"window": 0}, ValueError, "window must be at least 1"),
    ({"window": -3}, ValueError, "window must be at least 1"),
    ({"window": 2.0}, TypeError, "window must be an int"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    ({"lengths": torch.ones(2)}, TypeError, "lengths must be integers"),
    ({"lengths": torch.ones(2, dtype=torch.bool)}, TypeError, "lengths must be integers"),
    ({"lengths": torch.ones(3, dtype=torch.int64)}, ValueError, "lengths must have shape"),
    ({"lengths": [5, 5]}, TypeError, "lengths must be a Tensor"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
]


@pytest.mark.parametrize("change,error,words", WRONG, ids=[words for *_, words in WRONG])
def test_errors_name_the_argument(change, error, words):
    arguments = {"q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 2, 5, 8), "v": torch.ones(2, 2, 5, 8)}
    with pytest.raises(error, match=words):
        LF.attention(**{**arguments, **change})


# ---- the reference itself ----


def test_reference_is_scaled_dot_product_attention():
    q, k, v = (t.double() for t in torch.randn(3, 2, 4, 6, 8))
    bias = torch.randn(4, 6, 6, dtype=torch.float64)
    for mine, expected in (
        (reference.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)),
        (reference.attention(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)),
        (reference.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ):
        assert relative_error(mine, expected) < 1e-14
