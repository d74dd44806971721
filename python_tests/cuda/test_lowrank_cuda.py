"""The CUDA low-rank products in the emulation of csrc/common/cuda: their numbers, without a GPU."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from emulated import MODES, to_numpy, to_torch
from oracle import assert_accurate

from lwft_kernels.lowrank import reference

SEED, OFFSET, SCALE = 11, 13, 0.7
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))  # of activations and of factors


def arguments(tokens, d_in, rank, d_out, dtypes, adapters=0):
    """`adapters` > 0: stacked, with an index that has runs, strays and tokens of none."""
    dtype, parameter = dtypes

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape) * scale).to(dtype)

    index = None
    if adapters:
        index = torch.arange(tokens) * adapters // max(tokens, 1)
        strays = torch.rand(tokens) < 0.2
        index[strays] = torch.randint(-1, adapters, (int(strays.sum()),))
    stack = (adapters or 1,)
    return {
        "x": normal(tokens, d_in),
        "a": normal(*stack, rank, d_in, scale=d_in**-0.5, dtype=parameter),
        "b": normal(*stack, d_out, rank, scale=rank**-0.5, dtype=parameter),
        "bias": normal(d_out),
        "base": normal(tokens, d_out),
        "index": index,
        "direction": normal(tokens, d_out),
    }


def arrays_of(values):
    return {name: None if value is None else to_numpy(value) for name, value in values.items()}


def forward(values, accumulate=False, p=0.0):
    v = arrays_of(values)
    base = v["base"] if accumulate else None
    return lwft_harness.low_rank_forward(
        "cuda", v["x"], v["a"], v["b"], v["bias"], base, v["index"], SCALE, SEED, OFFSET, p
    )


def backward(values, p=0.0, **wanted):
    v = arrays_of(values)
    _, hidden = forward(values, p=p)
    wanted.setdefault("want_dbias", values["index"] is None)
    return lwft_harness.low_rank_backward(
        "cuda", v["direction"], v["x"], v["a"], v["b"], to_numpy(torch.from_numpy(hidden)), v["index"], SCALE, SEED,
        OFFSET, p, **wanted,
    )  # fmt: skip


def plain(values, dtype, p, accumulate=False):
    """The reference in `dtype`, or, for None, as PyTorch computes it in the dtypes that the values have."""
    cast = {
        name: value if dtype is None or value is None or name == "index" else value.to(dtype)
        for name, value in values.items()
    }
    leaves = {name: cast[name].clone().requires_grad_() for name in ("x", "a", "b", "bias")}
    stacked = values["index"] is not None
    a, b = (leaves[name] if stacked else leaves[name][0] for name in ("a", "b"))
    seed = torch.tensor([SEED, OFFSET])
    delta = reference.lora_delta(leaves["x"], a, b, cast["index"], scale=SCALE, dropout_p=p, seed=seed)
    out = (delta + (cast["base"] if accumulate else leaves["bias"])).to(cast["x"].dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if name != "bias" or not (accumulate or stacked)}
    grads = torch.autograd.grad(out, list(wanted.values()), cast["direction"])
    named = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), **named}


def check(values, p=0.0, accumulate=False):
    out, _ = forward(values, accumulate, p)
    grads = backward(values, p, **({"want_dbias": False} if accumulate else {}))
    names = ("dx", "da", "db", "dbias")
    found = {"out": out, **dict(zip(names, grads, strict=True))}
    oracle = plain(values, torch.float64, p, accumulate)
    assert_accurate({name: to_torch(found[name]) for name in oracle}, plain(values, None, p, accumulate), oracle)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens,d_in,rank,d_out",
    [(1, 8, 1, 8), (63, 64, 8, 136), (65, 136, 16, 64), (17, 72, 20, 200), (70, 200, 33, 72), (3, 264, 64, 40)],
)
def test_accuracy(tokens, d_in, rank, d_out, dtypes):
    check(arguments(tokens, d_in, rank, d_out, dtypes))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("rank", [65, 128])
def test_high_ranks(rank, dtype):
    check(arguments(20, 136, rank, 72, (dtype, dtype)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_added_to_what_is_there(dtypes):
    check(arguments(66, 72, 12, 136, dtypes), accumulate=True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("rank", [8, 40])
def test_dropout_is_that_of_the_stream(rank, p, dtypes):
    check(arguments(70, 200, rank, 72, dtypes), p)


def test_all_is_dropped():
    check(arguments(5, 72, 8, 40, (F16, F16)), 1.0)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,rank,adapters,p", [(70, 8, 3, 0.0), (130, 20, 2, 0.25), (40, 40, 4, 0.1)])
def test_stacked_adapters(tokens, rank, adapters, p, dtypes):
    check(arguments(tokens, 136, rank, 72, dtypes, adapters), p)
    check(arguments(tokens, 72, rank, 136, dtypes, adapters), p, accumulate=True)


@pytest.mark.parametrize("dtypes", DTYPES[::3], ids=str)
def test_few_tokens_of_a_wide_layer(dtypes):
    """Partial sums of the middle: three slices of 512 columns and less; ds of the same."""
    check(arguments(3, 1288, 16, 1160, dtypes), 0.1)


def test_ranges_of_tokens():
    """A slice of columns alone: every tile is a range of its own, and 530 tiles are two to a range."""
    check(arguments(530 * 64 - 7, 8, 4, 8, (BF16, BF16)), 0.5)


def test_a_stacked_batch_may_be_of_no_adapter():
    values = arguments(70, 72, 8, 40, (BF16, BF16), 2)
    values["index"][:] = -1
    check(values)
    values["index"][69] = 1
    check(values)


def test_an_index_of_no_adapter_gives_nan_in_its_row():
    values = arguments(70, 72, 8, 40, (BF16, BF16), 2)
    expected = [*forward(values), *backward(values)[:1]]
    values["index"][[3, 66]] = torch.tensor([2, -2])
    for found, right in zip([*forward(values), *backward(values)[:1]], expected, strict=True):
        found, right = to_torch(found), to_torch(right)
        assert found[[3, 66]].isnan().all()
        rest = [i for i in range(70) if i not in (3, 66)]
        assert torch.equal(found[rest], right[rest])


def test_infinities_stay_with_their_adapter():
    values = arguments(70, 72, 8, 40, (BF16, BF16), 2)
    values["index"] = (torch.arange(70) >= 30).long()
    values["x"][40] = values["direction"][41] = torch.inf
    out, _ = forward(values)
    _, da, db, _ = backward(values)
    assert to_torch(out)[:30].isfinite().all()
    assert to_torch(da)[0].isfinite().all()
    assert to_torch(db)[0].isfinite().all()
    assert not to_torch(da)[1].isfinite().all()


@pytest.mark.parametrize("rank,dtypes", [(8, DTYPES[0]), (40, DTYPES[2])])
@pytest.mark.parametrize("wanted", ["dx", "da", "db", "dbias"])
def test_a_gradient_alone_is_the_same(wanted, rank, dtypes):
    """To the bit, but where ds comes from another pass."""
    values = arguments(70, 136, rank, 72, dtypes)
    names = ("dx", "da", "db", "dbias")
    together = dict(zip(names, backward(values, 0.1), strict=True))
    alone = dict(zip(names, backward(values, 0.1, **{f"want_{n}": n == wanted for n in names}), strict=True))
    if wanted in ("db", "dbias") or rank > 32:
        assert together[wanted].tobytes() == alone[wanted].tobytes()
    else:
        oracle = plain(values, torch.float64, 0.1)
        assert_accurate({wanted: to_torch(alone[wanted])}, {wanted: plain(values, None, 0.1)[wanted]},
                        {wanted: oracle[wanted]})  # fmt: skip


@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize("schedule,early_copies", MODES)
def test_the_order_of_threads_and_copies_does_not_matter(schedule, early_copies, adapters):
    values = arguments(70, 200, 12, 136, (BF16, F32), adapters)
    expected = [*forward(values, p=0.1), *backward(values, 0.1)[:3]]
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for mine, theirs in zip([*forward(values, p=0.1), *backward(values, 0.1)[:3]], expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    "shape,dtypes,words",
    [((3, 12, 8, 16), DTYPES[0], "multiples of 8"), ((3, 16, 8, 12), DTYPES[0], "multiples of 8"),
     ((3, 16, 136, 16), DTYPES[0], "at most 128"), ((3, 16, 72, 16), DTYPES[2], "float32 factors must be at most 64"),
     ((3, 16, 8, 16), (F32, F32), "x must be bfloat16 or float16"),
     ((3, 16, 8, 16), (BF16, F16), "the dtype of x, or be float32")],
)  # fmt: skip
def test_declines_what_it_cannot_serve(shape, dtypes, words):
    values = arguments(*shape, dtypes)
    with pytest.raises(ValueError, match=words):
        forward(values)


def test_declines_a_bias_gradient_beside_stacked_adapters():
    with pytest.raises(ValueError, match="gradient of the bias"):
        backward(arguments(3, 16, 8, 16, DTYPES[0], 2), want_dbias=True)


def test_declines_rows_off_the_grid():
    v = arrays_of(arguments(3, 24, 8, 16, DTYPES[0]))
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        lwft_harness.low_rank_forward(
            "cuda", v["x"][:, 1:17], v["a"][:, :, :16].copy(), v["b"], v["bias"], None, None, SCALE, SEED, OFFSET, 0.0
        )


def test_zero_tokens():
    values = arguments(0, 16, 8, 24, DTYPES[0])
    out, hidden = forward(values)
    assert out.shape == (0, 24)
    assert hidden.shape == (0, 8)
    dx, *sums = backward(values)
    assert dx.shape == (0, 16)
    assert not any(np.asarray(value).any() for value in sums)
