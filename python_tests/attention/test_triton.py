"""attention's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import make
from oracle import check_op, outputs_and_gradients

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.attention import autograd, triton_op
from lwft_kernels.dropout import draw_seed, keep_multiplier
from lwft_kernels.triton.launch import record

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def ours(**arguments):
    torch.manual_seed(0)
    return LF.attention(**arguments)


def reference(**arguments):
    torch.manual_seed(0)
    with lwft_kernels.use_backend("reference"):
        return LF.attention(**arguments)


def on(device, arguments, dtype=torch.float64):
    """The arguments on `device`, the floating ones in `dtype`; strides as they are."""
    placed = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            target = dtype if value.dtype == torch.float64 else value.dtype
            placed[name] = value.detach().to(device, target).clone().requires_grad_(value.requires_grad)
    return placed


def check(device, arguments, dtype=torch.float32, **options):
    check_op(ours, reference, on(device, arguments), dtype, **options)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 0, 5, 8),  # no tokens
        (2, 2, 1, 3, 0, 16),  # no keys
        (0, 2, 2, 4, 4, 8),  # no sequences
        (1, 1, 1, 1, 1, 1),
        (2, 3, 3, 7, 5, 33),
        (1, 6, 2, 19, 83, 80),  # grouped heads
        (1, 2, 2, 130, 131, 64),
        (1, 3, 1, 9, 77, 16),
        (1, 4, 2, 1, 1100, 64),  # decoding
        (1, 1, 1, 11, 9, 200),
    ],
    ids=str,
)
def test_accuracy(triton_device, shape, dtype):
    check(triton_device, make(*shape), dtype)


@pytest.mark.parametrize("queries,keys", [(70, 70), (33, 150), (60, 21)], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 40},
        {"window": 2**62},
        {"softcap": 2.0, "causal": True},
        {"scale": -1.0},
        {"causal": True, "prefix": 6},
        {"causal": True, "window": 30, "prefix": 140, "shared_prefix": False},
    ],
    ids=str,
)
def test_rules(triton_device, rule, queries, keys):
    check(triton_device, make(1, 4, 2, queries, keys, 32, **rule))


@every_dtype
def test_prefix_of_each_sequence_and_of_all(triton_device, dtype):
    for shared in (True, False):
        arguments = make(3, 2, 1, 21, 70, 24, prefix=17, shared_prefix=shared, causal=True)
        check(triton_device, arguments, dtype)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 4), (1, 37), (1, 150))), ids=str)
def test_bias_of_every_broadcast(triton_device, sizes):
    # The prefix has no bias: without it a bias that is the same for all keys has a gradient of exactly 0.
    check(triton_device, make(2, 4, 2, 37, 150, 16, prefix=7, bias=sizes))


@pytest.mark.parametrize("rule", [{"causal": True}, {"window": 30, "softcap": 3.0}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 130, 140), (2, 1, 1, 140), (2, 1, 130, 1)], ids=str)
def test_bias_beside_rules(triton_device, sizes, rule):
    lengths = torch.tensor([140, 66])
    check(triton_device, make(2, 2, 1, 130, 140, 16, prefix=7, bias=sizes, lengths=lengths, **rule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_beside_16_bit(triton_device, dtype):
    arguments = make(2, 2, 2, 20, 30, 16, bias=(1, 2, 20, 30))
    arguments["bias"] = arguments["bias"].detach().float().requires_grad_()
    check(triton_device, arguments, dtype, keep=frozenset({"bias"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_shape", [(2, 4, 45, 133), (2, 1, 1, 133), (45, 1), (133,)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_mask(triton_device, mask_shape, prefix, dtype):
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.4
    check(triton_device, make(2, 4, 2, 45, 133, 24, mask=mask, prefix=prefix), dtype)


@every_dtype
@pytest.mark.parametrize("queries", [1, 30])
def test_lengths(triton_device, queries, dtype):
    for lengths in ([0, 3, 200], [-4, 77, 250]):  # the second is clamped to 0..L
        check(triton_device, make(3, 2, 1, queries, 200, 16, lengths=torch.tensor(lengths)), dtype)


def test_what_lies_beyond_lengths_is_never_read(triton_device):
    arguments = make(2, 2, 2, 5, 40, 8, lengths=torch.tensor([7, 40]), dropout_p=0.2)
    plain = outputs_and_gradients(ours, on(triton_device, arguments, torch.float32))
    with torch.no_grad():
        for name in ("k", "v"):
            arguments[name][0, :, 7:] = torch.nan
    for name, value in outputs_and_gradients(ours, on(triton_device, arguments, torch.float32)).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)


@every_dtype
@pytest.mark.parametrize("queries", [2, 40])
def test_rows_that_may_attend_to_nothing(triton_device, queries, dtype):
    mask = torch.ones(queries, 9, dtype=torch.bool)
    mask[1] = False
    arguments = make(2, 2, 1, queries, 9, 16, mask=mask, dropout_p=0.2, return_lse=True)
    check(triton_device, arguments, dtype)
    arguments = on(triton_device, arguments, dtype)
    out, lse = ours(**arguments)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert (lse[:, :, 1] == -torch.inf).all() and torch.isfinite(lse[:, :, 0]).all()
    # A gradient that comes in through lse itself must not make NaN either.
    grads = torch.autograd.grad(out.sum() + lse.sum(), [arguments[n] for n in "qkv"])
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(grads[0][:, :, 1], torch.zeros_like(grads[0][:, :, 1]))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("queries,keys", [(40, 140), (2, 1100)])
def test_additive_mask(triton_device, queries, keys, lowest):
    """As Hugging Face writes its masks: a row of nothing but the lowest float32 is a plain mean, also in parts."""
    arguments = make(1, 2, 2, queries, keys, 16, prefix=0)
    bias = torch.zeros(1, 1, queries, keys)
    bias[..., 20:] = lowest
    bias[..., 1, :] = lowest
    arguments["bias"] = bias.requires_grad_()
    check(triton_device, arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(triton_device, value):
    for queries in (3, 20):
        arguments = on(triton_device, make(1, 1, 1, queries, 30, 8), torch.float32)
        with torch.no_grad():
            arguments["q"][0, 0, 1, 2] = value
        out = ours(**arguments)
        assert not torch.isfinite(out[0, 0, 1]).any()
        assert torch.isfinite(out[0, 0, 0]).all() and torch.isfinite(out[0, 0, 2]).all()


@every_dtype
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("queries,prefix", [(1, 5), (40, 0), (40, 70)])
def test_dropout(triton_device, queries, prefix, p, dtype):
    arguments = make(2, 4, 2, queries, 145, 16, prefix=prefix, causal=True, dropout_p=p)
    check(triton_device, arguments, dtype)


@pytest.mark.parametrize("prefix", [0, 3, 64, 70])
@pytest.mark.parametrize("queries,heads", [(20, 3), (2, 3), (20, 6)])
def test_dropout_is_that_of_the_stream(triton_device, queries, heads, prefix):
    """Each weight is kept or dropped as `keep_multiplier` says: with V = 1 in one column each, out is the weights."""
    keys = 100
    columns = prefix + keys
    q = torch.zeros(2, heads, queries, columns, device=triton_device)  # so all weights are 1 / columns
    v = torch.eye(columns, device=triton_device)
    v = v.expand(2, 3, columns, columns)
    parts = {}
    if prefix:
        parts = {"prefix_k": torch.zeros_like(v[:, :, :prefix]), "prefix_v": v[:, :, :prefix]}
    values = v[:, :, prefix:]
    torch.manual_seed(3)
    weights = LF.attention(q, torch.zeros_like(values), values, dropout_p=0.3, **parts)
    torch.manual_seed(3)
    seed = draw_seed(triton_device)
    rows, cols = (torch.arange(n, device=triton_device) for n in (2 * heads * queries, columns))
    kept = keep_multiplier(seed, rows, cols, 0.3, torch.float32).view(weights.shape)
    assert torch.equal(weights != 0, kept != 0)
    torch.testing.assert_close(weights, kept / columns)


@every_dtype
@pytest.mark.parametrize("queries,keys,prefix", [(1, 1100, 0), (30, 50, 0), (30, 150, 4)])
def test_lse(triton_device, queries, keys, prefix, dtype):
    arguments = make(2, 4, 2, queries, keys, 16, prefix=prefix, causal=True, dropout_p=0.2, return_lse=True)
    check(triton_device, arguments, dtype)


def test_gradient_through_lse_alone(triton_device):
    arguments = on(triton_device, make(2, 2, 2, 10, 80, 8, prefix=3, return_lse=True), torch.float32)
    check_op(lambda **a: ours(**a)[1], lambda **a: reference(**a)[1], arguments, torch.float32)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 4, 2, 1, 2100, 64), (2, 8, 1, 1, 1100, 128), (1, 6, 2, 3, 1500, 40)], ids=str)
def test_decoding_cuts_the_keys(triton_device, shape, dtype, monkeypatch):
    launched = []
    launch = triton_op.launch
    monkeypatch.setattr(triton_op, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    rule = {"causal": True, "prefix": 5, "dropout_p": 0.1, "return_lse": True}
    check(triton_device, make(*shape, **rule), dtype)
    assert triton_op.attention_merge_kernel in launched


def test_decoding_with_everything(triton_device):
    arguments = make(2, 4, 2, 2, 1300, 24, prefix=600, bias=(1, 4, 1, 1300), softcap=2.0, window=1000,
                     mask=torch.rand(2, 1, 1, 1300) > 0.2, lengths=torch.tensor([1290, 700]))  # fmt: skip
    check(triton_device, arguments)


@pytest.mark.parametrize("rule", [{}, {"causal": True}, {"causal": True, "dropout_p": 0.2, "prefix": 3}], ids=str)
def test_many_rows_before_few_keys(triton_device, rule):
    """The rows are cut into parts, whose dK and dV are summed."""
    check(triton_device, make(1, 2, 1, 530, 40, 24, **rule), torch.bfloat16)


@pytest.mark.parametrize("names", [["q"], ["v"], ["k"], ["bias"], ["prefix_k"], ["prefix_v"], ["q", "prefix_v"]])
def test_gradients_that_are_not_wanted_are_not_computed(triton_device, names):
    arguments = make(2, 4, 2, 20, 40, 8, prefix=3, bias=(1, 4, 20, 40), dropout_p=0.1)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value.requires_grad_(name in names)
    check(triton_device, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 33, 80, 96, 256])
def test_everything_at_once(triton_device, head_dim, dtype):
    arguments = make(
        2, 6, 2, 70, 90, head_dim, prefix=20, bias=(2, 1, 70, 90), softcap=3.0, causal=True, window=60,
        mask=torch.rand(1, 6, 70, 90) > 0.2, lengths=torch.tensor([90, 50]), dropout_p=0.2, return_lse=True,
    )  # fmt: skip
    check(triton_device, arguments, dtype)


def views(t):
    yield t
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    yield torch.stack((t, t), -1)[..., 0]  # last stride 2
    yield F.pad(t, (3, 2))[..., 3:-2]


@pytest.mark.parametrize("queries", [1, 12])
def test_any_strides(triton_device, queries):
    shapes = [(2, 4, queries, 20), (2, 2, 20, 20), (2, 2, 20, 20), (2, 4, queries, 20), (2, 2, 3, 20), (2, 2, 3, 20)]
    tensors = [torch.randn(shape, device=triton_device) for shape in shapes]
    mask, grad = torch.rand(tensors[3].shape, device=triton_device) > 0.2, torch.randn_like(tensors[0])
    expected = None
    for *inputs, mask_view, grad_view in zip(*(views(t) for t in (*tensors, mask, grad)), strict=True):
        q, k, v, bias, prefix_k, prefix_v = leaves = [t.detach().requires_grad_() for t in inputs]
        out = LF.attention(q, k, v, bias=bias, mask=mask_view, prefix_k=prefix_k, prefix_v=prefix_v)
        results = (out, *torch.autograd.grad(out, leaves, grad_view))
        expected = results if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_expanded_inputs_and_gradient(triton_device):
    k = torch.randn(1, 1, 9, 8, device=triton_device, requires_grad=True)
    q = torch.randn(3, 2, 4, 8, device=triton_device)
    shared = k.expand(3, 2, 9, 8)
    LF.attention(q, shared, shared).sum().backward()  # grad_out has stride 0 everywhere
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, shared, shared).sum(), k)[0]
    torch.testing.assert_close(k.grad, expected, rtol=1e-4, atol=1e-5)


def test_results_are_laid_out_by_token(triton_device):
    arguments = on(triton_device, make(2, 3, 3, 5, 5, 4), torch.float32)
    out = ours(**arguments)
    merged = out.transpose(1, 2).reshape(2, 5, 12)
    assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()
    for grad in torch.autograd.grad(out.sum(), [arguments[name] for name in "qkv"]):
        assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 90, 16), (1, 2, 1, 2, 1500, 16)], ids=str)
def test_same_bits_twice(triton_device, shape):
    arguments = make(*shape, prefix=5, causal=True, dropout_p=0.1, bias=(1, shape[1], 1, shape[4]), return_lse=True)
    first, second = (outputs_and_gradients(ours, on(triton_device, arguments, torch.float32)) for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_float64_is_declined(triton_device):
    q = torch.randn(1, 1, 2, 8, dtype=torch.float64, device=triton_device)
    with pytest.raises(RuntimeError, match="float64 goes to the reference"):
        LF.attention(q, q, q)


def test_large_heads_are_declined(triton_device):
    q = torch.randn(1, 1, 2, 257, device=triton_device)
    with pytest.raises(RuntimeError, match="heads of at most 256 elements, not 257"):
        LF.attention(q, q, q)


def test_results_have_the_shapes_of_the_fakes(triton_device):
    """On meta tensors too, on which nothing runs: nothing reads a number back."""
    q, k = torch.empty(2, 4, 6, 8, device="meta"), torch.empty(2, 2, 70, 8, device="meta")
    bias, prefix = torch.empty(1, 4, 1, 70, device="meta"), torch.empty(1, 2, 3, 8, device="meta")
    inputs = (q, k, k, bias, None, prefix, prefix, None)
    rule = (1.0, True, 0, 0.0, 0.0)
    results = []

    def run():
        out, lse = triton_op.attention_forward(*inputs, None, *rule)
        results.extend((out, lse))
        results.extend(triton_op.attention_backward(out, None, *inputs, out, lse, None, *rule, 0b111111))

    assert len(record(run)) > 5
    fakes = [*autograd._forward_fake(*inputs, None, *rule)]
    fakes += autograd._backward_fake(fakes[0], None, *inputs, *fakes, None, *rule, 0b111111)
    for mine, fake in zip(results, fakes, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
