"""The CUDA attention backward in the emulation of csrc/common/cuda: its numbers, without a GPU."""

from __future__ import annotations

import lwft_harness
import pytest
import torch
from emulated import MODES, to_numpy, to_torch
from oracle import assert_accurate

from lwft_kernels.attention import reference

SEED, OFFSET = 11, 13
DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("q", "k", "v", "bias", "prefix_k", "prefix_v")


def arguments(
    queries, keys, head_dim=16, *, dtype=torch.bfloat16, batch=2, heads=2, kv_heads=1, prefix=0, prefix_batch=1,
    bias=None, bias_dtype=None, mask=None, lengths=None,
):  # fmt: skip
    """bias, mask: their shapes."""

    def normal(*shape):
        return torch.randn(shape).to(dtype)

    return {
        "q": normal(batch, heads, queries, head_dim),
        "k": normal(batch, kv_heads, keys, head_dim),
        "v": normal(batch, kv_heads, keys, head_dim),
        "bias": None if bias is None else normal(*bias).to(bias_dtype or dtype),
        "prefix_k": normal(prefix_batch, kv_heads, prefix, head_dim) if prefix else None,
        "prefix_v": normal(prefix_batch, kv_heads, prefix, head_dim) if prefix else None,
        "mask": None if mask is None else torch.rand(mask) > 0.3,
        "lengths": None if lengths is None else torch.tensor(lengths),
        "grad_out": normal(batch, heads, queries, head_dim),
        "grad_lse": torch.randn(batch, heads, queries),
    }  # fmt: skip


def plain(values, dtype, rule, grad_lse):
    """Results of the reference in `dtype`, and gradients."""
    leaves = {
        name: values[name].to(
            values[name].dtype if values[name].dtype == torch.float32 and dtype != torch.float64 else dtype, copy=True
        ).requires_grad_()
        for name in NAMES
        if values[name] is not None
    }  # fmt: skip
    out, lse = reference.attention(
        **leaves, mask=values["mask"], lengths=values["lengths"], scale=rule["scale"], causal=rule["causal"],
        window=rule["window"] or None, softcap=rule["softcap"] or None, dropout_p=rule["dropout_p"],
        seed=torch.tensor([SEED, OFFSET]), return_lse=True,
    )  # fmt: skip
    outs, directions = [out], [values["grad_out"].to(out.dtype)]
    if grad_lse:
        outs.append(torch.where(torch.isfinite(lse), lse, 0))
        directions.append(values["grad_lse"].to(lse.dtype))
    grads = torch.autograd.grad(outs, list(leaves.values()), directions, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return out.detach(), lse.detach(), found


def emulated(values, out, lse, rule, grad_lse=True, needs=63):
    def array(name):
        value = values[name]
        return None if value is None else to_numpy(value.to(torch.uint8) if value.dtype == torch.bool else value)

    return lwft_harness.attention_backward(
        "cuda", array("grad_out"), array("grad_lse") if grad_lse else None, *map(array, NAMES),
        to_numpy(out.to(values["q"].dtype)), to_numpy(lse.float()), **rule, seed=SEED, offset=OFFSET,
        mask=array("mask"), lengths=array("lengths"), needs=needs,
    )  # fmt: skip


def rule_of(scale=0.3, causal=False, window=0, softcap=0.0, dropout_p=0.0):
    return {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "dropout_p": dropout_p}


def check(values, grad_lse=True, **rule):
    rule = rule_of(**rule)
    out, lse, oracle = plain(values, torch.float64, rule, grad_lse)
    _, _, eager = plain(values, values["q"].dtype, rule, grad_lse)
    grads = emulated(values, out, lse, rule, grad_lse)
    ours = {name: to_torch(grad) for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
    assert_accurate(ours, eager, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_lse", [False, True])
@pytest.mark.parametrize(
    "queries,keys,head_dim,heads,kv_heads",
    [
        (1, 1, 8, 1, 1),
        (3, 70, 40, 4, 2),
        (64, 64, 64, 1, 1),
        (65, 129, 72, 1, 1),
        (70, 33, 128, 2, 1),
        (23, 97, 16, 6, 2),
    ],
)
def test_accuracy(queries, keys, head_dim, heads, kv_heads, grad_lse, dtype):
    check(arguments(queries, keys, head_dim, dtype=dtype, heads=heads, kv_heads=kv_heads), grad_lse)


@pytest.mark.parametrize(
    "queries,keys,heads,kv_heads", [(70, 70, 2, 1), (40, 130, 1, 1), (130, 40, 2, 2), (33, 65, 3, 1)]
)
@pytest.mark.parametrize("causal,window", [(True, 0), (True, 1), (True, 37), (False, 20), (False, 1)])
def test_which_keys_a_query_sees(queries, keys, heads, kv_heads, causal, window):
    """More queries than keys: the first see nothing."""
    check(arguments(queries, keys, heads=heads, kv_heads=kv_heads), causal=causal, window=window)


def test_a_window_wider_than_any_key():
    check(arguments(20, 30), window=2**62)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[70, 0], [64, 65], [1, 63]])
def test_lengths(lengths, causal):
    check(arguments(40, 70, lengths=lengths), causal=causal)


@pytest.mark.parametrize("shape", [(2, 2, 40, 70), (1, 1, 40, 70), (2, 1, 1, 70), (2, 1, 40, 1)])
def test_mask(shape):
    check(arguments(40, 70, mask=shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap, dtype):
    check(arguments(40, 70, dtype=dtype, prefix=3), softcap=softcap, causal=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    check(arguments(20, 70), scale=scale)


@pytest.mark.parametrize("prefix,prefix_batch", [(1, 1), (5, 2), (64, 1), (70, 2), (130, 1)])
@pytest.mark.parametrize("keys", [0, 40])
def test_prefix(prefix, prefix_batch, keys):
    check(arguments(40, keys, prefix=prefix, prefix_batch=prefix_batch), causal=True)


@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("prefix,head_dim", [(0, 16), (5, 72), (70, 16), (100, 16)])
def test_dropout_is_that_of_the_stream(prefix, head_dim, p):
    check(arguments(40, 140, head_dim, heads=3, kv_heads=1, prefix=prefix), dropout_p=p)


def test_dropout_where_a_window_leaves_tiles_out():
    """From the prefix's columns of the random stream straight to those far behind."""
    check(arguments(40, 300, prefix=70), dropout_p=0.5, window=30, causal=True)


@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("queries", [70, 1])
@pytest.mark.parametrize("keys", [90, 1])
def test_bias_of_every_kind(batch, heads, queries, keys):
    check(arguments(70, 90, bias=(batch, heads, queries, keys), prefix=3), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_bias_with_everything(bias_dtype, dtype):
    values = arguments(
        50, 90, 72, dtype=dtype, heads=4, kv_heads=2, bias=(1, 4, 50, 90), bias_dtype=bias_dtype, prefix=9,
        mask=(2, 1, 50, 90), lengths=[90, 77],
    )  # fmt: skip
    check(values, causal=True, window=60, softcap=3.0, dropout_p=0.2)


def test_a_bias_so_large_that_lse_has_lost_the_sum():
    """As masks of padding are made: rows of one sequence where all keys are biased by the lowest number."""
    values = arguments(70, 90, dtype=torch.bfloat16, bias=(2, 1, 70, 90))
    values["bias"][1, :, 3:40] = torch.finfo(torch.bfloat16).min
    check(values, grad_lse=False)


def test_strides_as_models_hand_them_over():
    values = arguments(33, 70, 24, heads=4, kv_heads=2, prefix=5)
    rule = rule_of(causal=True)
    out, lse, oracle = plain(values, torch.float64, rule, True)
    _, _, eager = plain(values, torch.bfloat16, rule, True)

    def by_token(tensor):
        return to_numpy(tensor.transpose(1, 2).contiguous()).transpose(0, 2, 1, 3)

    tensors = [by_token(values[name]) for name in ("q", "k", "v")]
    grads = lwft_harness.attention_backward(
        "cuda", by_token(values["grad_out"]), to_numpy(values["grad_lse"]), *tensors, None,
        by_token(values["prefix_k"]), by_token(values["prefix_v"]), by_token(out.bfloat16()), to_numpy(lse.float()),
        **rule, seed=SEED, offset=OFFSET,
    )  # fmt: skip
    ours = {name: to_torch(grad) for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
    assert_accurate(ours, eager, oracle)


@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone_has_the_same_bits(wanted):
    values = arguments(40, 70, prefix=5, bias=(1, 2, 40, 70))
    rule = rule_of(dropout_p=0.1)
    out, lse, _ = plain(values, torch.float64, rule, True)
    everything = emulated(values, out, lse, rule)
    alone = emulated(values, out, lse, rule, needs=1 << wanted)
    for i, grad in enumerate(alone):
        assert (grad is None) == (i != wanted)
    assert alone[wanted].tobytes() == everything[wanted].tobytes()


@pytest.mark.parametrize("schedule,early_copies", MODES)
def test_the_order_of_threads_and_copies_does_not_matter(schedule, early_copies):
    values = arguments(40, 90, 72, prefix=5, bias=(1, 1, 1, 90), lengths=[90, 50])
    rule = rule_of(dropout_p=0.1, causal=True, softcap=2.0)
    out, lse, _ = plain(values, torch.float64, rule, True)
    expected = emulated(values, out, lse, rule)
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for mine, theirs in zip(emulated(values, out, lse, rule), expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def many_rows():
    """More tiles of rows than there are parts of a sum: blocks of dbias and of the prefix take several in turn."""
    return arguments(4300, 3, 8, prefix=3, bias=(1, 1, 1, 1))


def test_more_rows_than_parts():
    check(many_rows())


@pytest.mark.parametrize("schedule,early_copies", MODES[1::2])
def test_the_order_of_threads_does_not_matter_to_turns(schedule, early_copies):
    values, rule = many_rows(), rule_of()
    out, lse, _ = plain(values, torch.float64, rule, True)
    expected = emulated(values, out, lse, rule, needs=8)
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    assert emulated(values, out, lse, rule, needs=8)[3].tobytes() == expected[3].tobytes()


@pytest.mark.parametrize("batch,queries,keys,prefix", [(0, 5, 7, 3), (2, 0, 7, 3), (2, 5, 0, 0), (2, 5, 0, 3)])
def test_nothing_to_sum(batch, queries, keys, prefix):
    values = arguments(
        queries, keys, batch=batch, prefix=prefix, bias=(1, 1, 1, keys), lengths=[keys] * batch
    )  # fmt: skip
    check(values)


@pytest.mark.parametrize(
    "head_dim,dtype,words",
    [(136, torch.bfloat16, "at most 128"), (12, torch.float16, "multiple of 8"), (16, torch.float32, "bfloat16 or")],
)
def test_declines_what_it_cannot_serve(head_dim, dtype, words):
    with pytest.raises(ValueError, match=words):
        check(arguments(3, 5, head_dim, dtype=dtype))


def test_declines_rows_off_the_grid():
    values = arguments(3, 5)
    out, lse, _ = plain(values, torch.float64, rule_of(), False)
    wide = to_numpy(torch.zeros(2, 2, 3, 17).bfloat16())[..., :16]
    arrays = [to_numpy(values[name]) for name in ("q", "k", "v")]
    with pytest.raises(ValueError, match="grad_out and out must start at multiples of 16 bytes"):
        lwft_harness.attention_backward(
            "cuda", wide, None, *arrays, None, None, None, to_numpy(out.bfloat16()), to_numpy(lse.float()),
            **rule_of(), seed=SEED, offset=OFFSET,
        )  # fmt: skip
