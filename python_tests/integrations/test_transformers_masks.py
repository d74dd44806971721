"""Masks that say what they mask: the elements of transformers' own, whoever looks, and the same attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny_models import BATCH, LENGTH, batch, build
from torch import nn
from transformers import masking_utils

import lwft_kernels
from lwft_kernels.integrations.transformers import attention, masks, upstream
from lwft_kernels.integrations.transformers.attention import attention_forward
from lwft_kernels.integrations.transformers.masks import CompactMask, compact_mask

if upstream.RELEASE < (5,):
    pytest.skip("for transformers 5", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("native")

FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
    "blocks": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.tensor([[0, 0, 1] * 3] * 2))
    ),
}
PADDING = {
    "none": None,
    "no token": torch.ones(2, 9, dtype=torch.bool),
    "right": torch.tensor([[1] * 6 + [0] * 3, [1] * 9]).bool(),
    "left": torch.tensor([[0] * 2 + [1] * 7, [1] * 9]).bool(),
    "holes": torch.tensor([[1, 0, 1] * 3, [1] * 9]).bool(),
    "short": torch.tensor([[1] * 5, [1] * 4 + [0]]).bool(),
    "a whole row": torch.tensor([[0] * 9, [1] * 9]).bool(),
}


def arguments(function, padding, queries=9, keys=9, key_offset=0, **changed):
    return {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": keys - queries + key_offset,
        "kv_offset": key_offset, "mask_function": FUNCTIONS[function], "attention_mask": PADDING[padding],
        "allow_is_causal_skip": False, "device": "cpu", **changed,
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [(9, 9, 0), (4, 9, 0), (4, 7, 2), (1, 9, 0)])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_elements_are_those_of_transformers(function, padding, sizes):
    if function == "blocks" and sizes != (9, 9, 0):
        pytest.skip("written for one length")
    given = arguments(function, padding, *sizes)
    expected, mask = masking_utils.sdpa_mask(**given), compact_mask(**given)
    compact = function not in ("chunks", "blocks") and sizes[0] > 1
    assert isinstance(mask, CompactMask) == compact
    assert (mask.shape, mask.dtype, mask.device) == (expected.shape, torch.bool, expected.device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, dtype=torch.float64).transpose(1, 2) for n in (sizes[0], sizes[1], sizes[1]))
    ours, theirs = (attention_forward(nn.Module(), q, k, v, m)[0] for m in (mask, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(mask.clone(), expected)


@pytest.mark.parametrize("function", ["causal", "bidirectional", "window"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("sizes", [(9, 9, 0), (4, 9, 0), (1, 9, 0)])
def test_no_mask_where_transformers_takes_none(function, padding, sizes):
    both_ways = function == "bidirectional"
    skips = {"allow_is_causal_skip": not both_ways, "allow_is_bidirectional_skip": both_ways}
    if function == "window":
        skips["local_size"] = 3
    given = arguments(function, padding, *sizes, **skips)
    assert (compact_mask(**given) is None) == (masking_utils.sdpa_mask(**given) is None)


def packed(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_packed_by_their_positions(window):
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, attn_implementation="lwft")
    config.sliding_window = window
    attention_of_sdpa = copy.deepcopy(config)
    attention_of_sdpa._attn_implementation = "sdpa"
    lwft_kernels.accelerate(build("llama"))  # registers the name
    rows = [(20, 17, 30), (40, 27)]
    positions = torch.cat([packed(row) for row in rows])
    embedded = torch.zeros(2, 67, 32)
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    ours = make(config, embedded, None, None, positions)
    theirs = make(attention_of_sdpa, embedded, None, None, positions)
    assert isinstance(ours, CompactMask) and ours.rule.sequences == tuple(rows) and ours.rule.window == window
    q, k, v = (torch.randn(2, 67, h, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for h in (4, 2, 2))
    results = []
    for mask in (ours, theirs):
        out = attention_forward(nn.Module(), q, k, v, mask)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    assert torch.equal(ours & True, theirs)
    # so short that one by one would cost more, and positions that do not run on within a sequence
    assert type(make(config, embedded, None, None, torch.zeros(2, 67, dtype=torch.int64))) is torch.Tensor


def test_positions_that_jump_are_not_taken_for_a_sequence():
    causal = masking_utils.causal_mask_function
    number = torch.tensor([[0] * 32])
    jumping = torch.arange(32)[None].roll(5, 1)
    function = masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(causal, jumping),
        masking_utils.packed_sequence_mask_function(number),
    )
    given = {"batch_size": 1, "q_length": 32, "kv_length": 32, "mask_function": function, "allow_is_causal_skip": False}
    assert torch.equal(compact_mask(**given), masking_utils.sdpa_mask(**given))


def causal_with_padding():
    return compact_mask(**arguments("causal", "right"))


def test_who_looks_at_the_elements_may_change_them():
    for change in (
        lambda mask: mask.fill_(True),
        lambda mask: mask[..., :3].fill_(False),
        lambda mask: mask.logical_not_(),
        lambda mask: mask.masked_fill_(torch.ones(9, 9).triu().bool(), False),
    ):
        mask, plain = causal_with_padding(), masking_utils.sdpa_mask(**arguments("causal", "right"))
        change(mask)
        change(plain)
        assert mask.rule is None and torch.equal(mask.clone(), plain)
        q = torch.randn(2, 2, 9, 8)
        ours, theirs = (attention_forward(nn.Module(), q, q, q, m)[0] for m in (mask, plain))
        assert torch.equal(ours, theirs)


def test_it_is_a_tensor_like_any_other():
    mask, plain = causal_with_padding(), masking_utils.sdpa_mask(**arguments("causal", "right"))
    assert mask.rule is not None and "lengths" in repr(mask)
    alias = mask.detach()
    assert alias.rule is mask.rule
    for use in (
        lambda m: m[:, :, :, :5],
        lambda m: ~m,
        lambda m: m.expand(2, 4, 9, 9),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.cat([m, m], -1),
        lambda m: m.to(torch.float32),
        lambda m: m.repeat_interleave(2, 0),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):
        result = use(causal_with_padding())
        assert type(result) is torch.Tensor and torch.equal(result, use(plain))
    assert alias.rule is not None
    alias.sum()
    assert alias.rule is None and mask.rule is None  # they share their elements


@pytest.mark.parametrize("family", ["llama", "mistral", "bert", "t5", "bart", "modernbert", "gpt_oss"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_models_hand_it_over_untouched(family, padding, monkeypatch):
    seen = []
    original = attention._rule_and_bias
    monkeypatch.setattr(attention, "_rule_and_bias", lambda q, k, mask, *more: (
        seen.append(mask is None or mask.rule is not None), original(q, k, mask, *more))[1])  # fmt: skip
    model = build(family)
    report = lwft_kernels.accelerate(model)
    model(**batch(family, padding))
    assert len(seen) == len(report.replaced) and all(seen)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("told", ["positions", "cu_seq_lens", "both", "cu_seq_lens beside a cache"])
def test_packed_sequences_are_sequences_by_themselves(family, told):
    if (family, told) == ("gpt_oss", "positions"):
        pytest.skip("its code hands no positions over to its masks")
    lengths = (20, 17, 30)
    model = build(family).double().eval()
    if family == "gpt_oss":
        model.set_experts_implementation("eager")
    ids = torch.randint(4, 61, (1, sum(lengths)))
    expected = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    report = lwft_kernels.accelerate(model)
    ends = torch.tensor([0, 20, 37, 67], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": packed(lengths), "use_cache": "cache" in told}
    if told != "positions":
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 30, "max_length_k": 30}
    if told == "cu_seq_lens":
        inputs["attention_mask"] = None
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert lwft_kernels.stats()["attention"]["fast"] == len(report.replaced) * len(lengths)
    if family == "gpt_oss":
        return  # experts one by one depend on the data
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_keys_of_other_lengths_than_the_queries(causal):
    of_queries, of_keys = (3, 4), (5, 6)
    q, k, v = (torch.randn(1, n, 2, 8).transpose(1, 2) for n in (7, 11, 11))
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 7]), "cu_seq_lens_k": torch.tensor([0, 5, 11])}
    expected = torch.cat([
        lwft_kernels.functional.attention(*part, causal=causal)
        for part in zip(q.split(of_queries, 2), k.split(of_keys, 2), v.split(of_keys, 2), strict=True)
    ], 2).transpose(1, 2)  # fmt: skip
    found, _ = attention_forward(nn.Module(), q, k, v, None, is_causal=causal, **ends)
    assert torch.equal(found, expected)
    compiled = torch.compile(attention_forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(nn.Module(), q, k, v, None, is_causal=causal, **ends)[0], expected)
    mask = torch.rand(1, 1, 7, 11) < 0.8  # what a mask says holds beside
    both, _ = attention_forward(nn.Module(), q, k, v, mask, **ends)
    block = torch.block_diag(torch.ones(3, 5), torch.ones(4, 6)).bool()
    assert torch.equal(both, attention_forward(nn.Module(), q, k, v, mask & block)[0])


@pytest.mark.parametrize("ends,reason", [
    ([0, 3, 8], "do not end"),
    ([0, 3, 7], "more than one row"),
])  # fmt: skip
def test_packing_that_does_not_fit_goes_to_the_library(ends, reason):
    q = torch.randn(2 if "row" in reason else 1, 2, 7, 8)
    ends = torch.tensor(ends)
    attention_forward(nn.Module(), q, q, q, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    (declined,) = lwft_kernels.stats()["transformers attention"]["declined"]
    assert reason in declined


def test_the_function_says_so_when_it_does_not_know_a_part(monkeypatch):
    # a release that made masks otherwise gets transformers' own mask
    monkeypatch.setattr(masks, "_known_code", dict)
    assert type(compact_mask(**arguments("window", "right"))) is torch.Tensor
    assert type(causal_with_padding()) is CompactMask  # known by itself


def test_bidirectional_masks_of_an_encoder():
    lwft_kernels.accelerate(build("bert"))
    config = transformers.BertConfig(attn_implementation="lwft")
    embedded = torch.zeros(BATCH, LENGTH, 32)
    mask = masking_utils.create_bidirectional_mask(config, embedded, batch("bert", "right")["attention_mask"])
    assert mask.rule.lengths.tolist() == [8, 11, 9] and mask.rule.mask is None and not mask.rule.causal
    assert masking_utils.create_bidirectional_mask(config, embedded, batch("bert")["attention_mask"]) is None
