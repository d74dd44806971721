"""The CUDA attention forward in the emulation of csrc/common/cuda: its numbers, without a GPU."""

from __future__ import annotations

import lwft_harness
import numpy as np
import pytest
import torch
from emulated import MODES, to_numpy, to_torch
from oracle import assert_accurate

from lwft_kernels.attention import reference

SEED, OFFSET = 11, 13
DTYPES = (torch.bfloat16, torch.float16)
FLOATS = ("q", "k", "v", "bias", "prefix_k", "prefix_v")


def arguments(
    batch, heads, kv_heads, queries, keys, head_dim, dtype, *, prefix=0, shared_prefix=True, bias=None, **rule
):
    """As models hand them over: q, k, v are `(B, S, H, D).transpose(1, 2)` views."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys + head_dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    values = {
        "q": normal(batch, queries, heads, head_dim).transpose(1, 2),
        "k": normal(batch, keys, kv_heads, head_dim).transpose(1, 2),
        "v": normal(batch, keys, kv_heads, head_dim).transpose(1, 2),
        "bias": None if bias is None else normal(*bias),
        "prefix_k": None,
        "prefix_v": None,
    }
    if prefix:
        shape = (1 if shared_prefix else batch, kv_heads, prefix, head_dim)
        values["prefix_k"], values["prefix_v"] = normal(*shape), normal(*shape)
    return {**values, **rule}


def aligned(tensor):
    """The tensor's strides, on memory that the kernels' vector loads need."""
    order = sorted(range(tensor.dim()), key=lambda i: -tensor.stride(i))
    array = to_numpy(tensor.permute(order).contiguous())
    return array.transpose([order.index(i) for i in range(tensor.dim())])


def emulated(values, level="cuda", p=0.0):
    values = dict(values)
    arrays = [None if values[name] is None else aligned(values[name]) for name in FLOATS]
    scale = values.get("scale")
    rule = (
        values["q"].shape[3] ** -0.5 if scale is None else scale, values.get("causal", False),
        values.get("window") or 0, values.get("softcap") or 0.0, SEED, OFFSET, p,
    )  # fmt: skip
    mask, lengths = values.get("mask"), values.get("lengths")
    out, lse = lwft_harness.attention_forward(
        level, *arrays, *rule,
        mask=None if mask is None else mask.numpy(), lengths=None if lengths is None else lengths.numpy(),
    )  # fmt: skip
    return {"out": to_torch(np.ascontiguousarray(out)), "lse": to_torch(lse)}


def check(values, p=0.0):
    def run(dtype):
        cast = {n: v.to(dtype) if n in FLOATS and v is not None else v for n, v in values.items()}
        if dtype != torch.float64 and values["bias"] is not None:
            cast["bias"] = values["bias"]
        out, lse = reference.attention(
            **cast, dropout_p=p, seed=torch.tensor([SEED, OFFSET]) if p else None, return_lse=True
        )
        return {"out": out, "lse": lse}

    assert_accurate(emulated(values, p=p), run(values["q"].dtype), run(torch.float64))


RULES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 9},
    "causal window": {"causal": True, "window": 20},
    "softcap": {"softcap": 1.5},
    "scale below zero": {"scale": -0.2},
    "lengths": {"lengths": True},
    "mask": {"mask": "full"},
    "mask of queries": {"mask": "rows"},
    "bias": {"bias": "full"},
    "bias by head": {"bias": "heads"},
    "bias by key": {"bias": "keys"},
    "prefix": {"prefix": 5},
    "prefix of each": {"prefix": 70, "shared_prefix": False},
    "all": {
        "causal": True, "window": 30, "softcap": 2.0, "lengths": True, "mask": "full", "bias": "full", "prefix": 37,
    },
}  # fmt: skip


def ruled(rule, batch, heads, kv_heads, queries, keys, head_dim, dtype):
    rule = dict(rule)
    shapes = {
        "full": (batch, heads, queries, keys), "heads": (1, heads, queries, keys),
        "keys": (batch, 1, 1, keys), "rows": (1, heads, queries, 1),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(keys)
    if "mask" in rule:
        rule["mask"] = torch.rand(shapes[rule["mask"]], generator=generator) < 0.7
    if "lengths" in rule:
        rule["lengths"] = torch.tensor([keys - 3, 0, keys + 5, -2][:batch])
    if "bias" in rule:
        rule["bias"] = shapes[rule["bias"]]
    return arguments(batch, heads, kv_heads, queries, keys, head_dim, dtype, **rule)


# 4 rows and 16 of a key head go the way of decoding, 84 do not
SHAPES = [(2, 2, 1, 2, 70, 64), (3, 2, 2, 70, 83, 40), (1, 4, 2, 42, 66, 128), (2, 4, 1, 4, 37, 256)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rules(shape, rule, p):
    check(ruled(RULES[rule], *shape, DTYPES[len(rule) % 2]), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch,heads,kv_heads,queries,keys,head_dim",
    [
        (1, 1, 1, 1, 1, 8), (1, 1, 1, 129, 1, 16), (1, 3, 1, 43, 64, 64), (2, 1, 1, 65, 65, 72),
        (1, 2, 2, 130, 97, 120), (1, 1, 1, 67, 131, 136), (1, 1, 1, 66, 40, 248), (1, 6, 2, 1, 200, 96),
        (2, 32, 2, 1, 33, 80), (1, 1, 1, 64, 65, 64),
    ],
)  # fmt: skip
def test_shapes(batch, heads, kv_heads, queries, keys, head_dim, dtype):
    check(arguments(batch, heads, kv_heads, queries, keys, head_dim, dtype))
    check(arguments(batch, heads, kv_heads, queries, keys, head_dim, dtype, causal=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rule", ["plain", "all"])
def test_parts_of_the_keys(rule, head_dim):
    """1100 and more keys in two parts and more, which a second kernel merges."""
    check(ruled(RULES[rule], 1, 3, 1, 1, 1100, head_dim, torch.bfloat16), 0.2 if rule == "all" else 0.0)
    if rule == "plain":
        # the second part sees nothing
        values = arguments(1, 3, 1, 2, 1100, head_dim, torch.float16, lengths=torch.tensor([90]), prefix=3)
        check(values)


def test_float32_bias_beside_16_bits():
    for shape in SHAPES[:2]:
        values = ruled(RULES["bias"], *shape, torch.bfloat16)
        values["bias"] = torch.randn(values["bias"].shape)
        check(values)


def test_a_row_that_sees_nothing_gives_zeros():
    for queries in (3, 70):
        values = arguments(
            1, 2, 1, queries, 20, 16, torch.bfloat16, mask=torch.ones(1, 1, queries, 20, dtype=torch.bool)
        )
        values["mask"][:, :, 1] = False
        values["bias"] = torch.zeros(1, 1, 1, 20).bfloat16()
        found = emulated(values)
        assert not found["out"][:, :, 1].any()
        assert (found["lse"][:, :, 1] == -torch.inf).all()
        check(values)
        values["bias"][:] = -torch.inf
        assert not emulated(values)["out"].any()


def test_all_is_dropped():
    values = arguments(1, 2, 1, 5, 20, 16, torch.bfloat16)
    assert not emulated(values, p=1.0)["out"].any()


@pytest.mark.parametrize("keys", [0, 12])
def test_nothing_but_a_prefix(keys):
    values = arguments(2, 2, 1, 3, keys, 16, torch.float16, prefix=7, lengths=torch.tensor([0, 0]))
    check(values, 0.4)


def test_no_keys_and_no_rows():
    for queries in (3, 70):
        found = emulated(arguments(1, 2, 1, queries, 0, 16, torch.float16))
        assert not found["out"].any()
        assert (found["lse"] == -torch.inf).all()
    assert emulated(arguments(0, 2, 1, 3, 5, 16, torch.float16))["out"].shape == (0, 2, 3, 16)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(
    "queries,prefix,head_dim", [(1, 0, 64), (1, 19, 128), (70, 0, 128), (70, 33, 64), (65, 64, 256)]
)
def test_dropout_is_that_of_the_stream(queries, prefix, head_dim, p):
    """With a column of the head for each key, `out` shows the weights one by one: kept where the CPU keeps."""
    keys = head_dim - prefix
    values = arguments(1, 2, 1, queries, keys, head_dim, torch.float16, prefix=prefix)
    eye = torch.eye(head_dim).half()
    values["v"] = eye[None, None, prefix:]
    if prefix:
        values["prefix_v"] = eye[None, None, :prefix]
    found, expected = emulated(values, p=p)["out"], emulated(values, level=lwft_harness.levels()[0], p=p)["out"]
    assert torch.equal(found == 0, expected == 0)
    assert (found == 0).any() and (found != 0).any()


@pytest.mark.parametrize("schedule,early_copies", MODES)
@pytest.mark.parametrize("queries", [1, 70])
def test_the_order_of_threads_and_copies_does_not_matter(queries, schedule, early_copies):
    values = ruled(RULES["all"], 1, 2, 1, queries, 600, 72, torch.bfloat16)
    expected = emulated(values, p=0.1)
    lwft_harness.set_cuda_emulation(schedule, early_copies)
    for name, value in emulated(values, p=0.1).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "head_dim,dtype,words",
    [(12, torch.float16, "multiple of 8 and at most 256"), (264, torch.float16, "multiple of 8 and at most 256"),
     (16, torch.float32, "bfloat16 or float16")],
)  # fmt: skip
def test_declines_what_it_cannot_serve(head_dim, dtype, words):
    with pytest.raises(ValueError, match=words):
        emulated(arguments(1, 2, 1, 3, 5, head_dim, dtype))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_declines_rows_off_the_grid(name):
    values = arguments(1, 2, 1, 3, 5, 20, torch.float16)
    arrays = {n: aligned(values[n])[..., :16] if n == name else aligned(values[n][..., :16]) for n in ("q", "k", "v")}
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        lwft_harness.attention_forward(
            "cuda", *arrays.values(), None, None, None, 0.25, False, 0, 0.0, SEED, OFFSET, 0.0
        )
