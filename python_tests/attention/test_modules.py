"""MultiheadAttention against torch's own in every mask form; PrefixAttention, MemoryAttention against plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from ddp import assert_averages_gradients
from oracle import assert_accurate
from torch import nn

import lwft_kernels
from lwft_kernels.nn import MemoryAttention, MultiheadAttention, PrefixAttention

pytestmark = pytest.mark.usefixtures("native")

E, H, B, S, L = 24, 3, 4, 5, 7
NEVER = float("-inf")


def bool_mask(*shape):
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(shape, generator=generator) < 0.4
    mask[..., 0] = False  # torch answers NaN or zeros, by path, for a query that sees nothing
    return mask


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, NEVER)


def attn_masks():
    square = bool_mask(S, L)
    per_head = bool_mask(B * H, S, L)
    return {
        "none": None, "bool": square, "float": as_float(square), "additive": torch.randn(S, L),
        "bool 3-D": per_head, "float 3-D": as_float(per_head),
    }  # fmt: skip


def key_padding_masks():
    mask = bool_mask(B, L)
    return {"none": None, "bool": mask, "float": as_float(mask)}


@pytest.fixture(autouse=True)
def double_precision():
    """Equality with torch's module is tested in float64; test_accuracy_in_float32 holds float32 to the oracle."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def twins(**kwargs):
    theirs = nn.MultiheadAttention(E, H, **kwargs)
    for parameter in theirs.parameters():  # torch starts biases at zero
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def outputs_and_gradients(module, inputs, **masks):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, weights = module(*leaves, need_weights=False, **masks)
    assert weights is None
    grads = torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()], allow_unused=True)
    return {"out": out, **{str(i): g for i, g in enumerate(grads) if g is not None}}


def assert_same(ours, theirs, inputs, **masks):
    mine, other = (outputs_and_gradients(module, inputs, **masks) for module in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name])


@pytest.mark.parametrize("attn,padding", list(itertools.product(attn_masks(), key_padding_masks())))
def test_every_mask_form(attn, padding):
    ours, theirs = twins(batch_first=True)
    inputs = (torch.randn(B, S, E), torch.randn(B, L, E), torch.randn(B, L, E))
    with pytest.warns(UserWarning, match="mismatched") if _mixed(attn, padding) else contextlib.nullcontext():
        assert_same(ours, theirs, inputs, attn_mask=attn_masks()[attn], key_padding_mask=key_padding_masks()[padding])
    assert lwft_kernels.stats()["attention"]["fast"] == 1


def _mixed(attn, padding):
    """torch warns when one mask is bool and the other float."""
    return "none" not in (attn, padding) and (attn.split()[0] == "bool") != (padding == "bool")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_in_the_dtype_of_models(dtype):
    ours, theirs = (module.to(dtype) for module in twins(batch_first=True))
    oracle = copy.deepcopy(theirs).double()
    inputs = [torch.randn(B, length, E).to(dtype) for length in (S, L, L)]
    masks = {"attn_mask": bool_mask(S, L)}
    assert_accurate(
        outputs_and_gradients(ours, inputs, **masks),
        outputs_and_gradients(theirs, inputs, **masks),
        outputs_and_gradients(oracle, [t.double() for t in inputs], **masks),
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_first": True, "bias": False},
        {"batch_first": False},
        {"add_bias_kv": True, "batch_first": True},
        {"add_zero_attn": True, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 10, "vdim": 11, "batch_first": True},
    ],
    ids=str,
)
def test_every_constructor_form(kwargs):
    ours, theirs = twins(**kwargs)
    k, v = kwargs.get("kdim", E), kwargs.get("vdim", E)
    shapes = ((B, S, E), (B, L, k), (B, L, v))
    inputs = [torch.randn(shape if kwargs.get("batch_first") else (shape[1], shape[0], shape[2])) for shape in shapes]
    assert_same(ours, theirs, inputs, key_padding_mask=bool_mask(B, L))


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first):
    ours, theirs = twins(batch_first=batch_first)
    inputs = (torch.randn(S, E), torch.randn(L, E), torch.randn(L, E))
    assert_same(ours, theirs, inputs, key_padding_mask=bool_mask(L), attn_mask=bool_mask(S, L))


def test_self_attention_and_shared_key_value():
    ours, theirs = twins(batch_first=True)
    x, memory = torch.randn(B, S, E), torch.randn(B, L, E)
    for arguments in ((x, x, x), (x, memory, memory)):
        torch.testing.assert_close(ours(*arguments, need_weights=False)[0], theirs(*arguments, need_weights=False)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(padded):
    ours, theirs = twins(batch_first=True)
    x = [torch.randn(B, S, E)] * 3
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    padding = as_float(bool_mask(B, S)) if padded else None
    assert_same(ours, theirs, x, attn_mask=mask, is_causal=True, key_padding_mask=padding)
    with pytest.raises(ValueError, match="is_causal"):
        ours(*x, need_weights=False, is_causal=True)


def test_weights_come_from_torch_and_are_counted():
    ours, theirs = twins(batch_first=True)
    x = torch.randn(B, S, E)
    for mine, other in zip(ours(x, x, x), theirs(x, x, x), strict=True):
        assert torch.equal(mine, other)
    (reason,) = lwft_kernels.stats()["MultiheadAttention"]["declined"]
    assert "need_weights" in reason


def test_inside_an_encoder_layer_in_training():
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    twin = copy.deepcopy(layer)
    twin.self_attn = MultiheadAttention(E, H, batch_first=True)
    twin.self_attn.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(B, S, E)
    padding = bool_mask(B, S)
    torch.testing.assert_close(twin(x, src_key_padding_mask=padding), layer(x, src_key_padding_mask=padding))
    assert lwft_kernels.stats()["attention"]["fast"] == 1


def test_a_query_that_sees_nothing_gets_the_output_bias():
    ours, _ = twins(batch_first=True)
    x = torch.randn(1, S, E)
    out, _ = ours(x, x, x, need_weights=False, key_padding_mask=torch.ones(1, S, dtype=torch.bool))
    torch.testing.assert_close(out, ours.out_proj.bias.expand(1, S, E))


def test_dropout_only_in_training():
    ours, _ = twins(batch_first=True, dropout=0.5)
    x = torch.randn(B, S, E)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


def test_prefix_attention_equals_concatenated_keys():
    base = nn.MultiheadAttention(E, H, batch_first=True)
    module = PrefixAttention.from_attention(base, prefix_length=6)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["prefix_k", "prefix_v"]
    assert module.in_proj_weight is base.in_proj_weight
    x = torch.randn(B, S, E)
    out, _ = module(x, x, x, need_weights=False)

    q, k, v = F.linear(x, base.in_proj_weight, base.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (H, E // H)).transpose(1, 2) for t in (q, k, v))
    k = torch.cat((module.prefix_k.expand(B, -1, -1, -1), k), 2)
    v = torch.cat((module.prefix_v.expand(B, -1, -1, -1), v), 2)
    expected = base.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    mine = torch.autograd.grad(out.square().sum(), (module.prefix_k, module.prefix_v))
    other = torch.autograd.grad(expected.square().sum(), (module.prefix_k, module.prefix_v))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="need_weights=False"):
        module(x, x, x)
    with pytest.raises(ValueError, match="prefix_length"):
        PrefixAttention(E, H, 0)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_attention(slots, shared):
    module = MemoryAttention(E, H, memory_dim=10, num_slots=slots)
    query, memory = torch.randn(B, S, E), torch.randn(1 if shared else B, L, 10)
    lengths = torch.tensor([7, 3, 1, 5])
    out = module(query, memory[0] if shared else memory, lengths=lengths)

    def heads(t):
        return t.unflatten(-1, (H, E // H)).transpose(1, 2).expand(B, -1, -1, -1)

    q, k, v = heads(module.q_proj(query)), heads(module.k_proj(memory)), heads(module.v_proj(memory))
    mask = torch.arange(L) < lengths[:, None, None, None]
    if slots:
        k, v = (torch.cat((p.expand(B, -1, -1, -1), t), 2) for p, t in ((module.slot_k, k), (module.slot_v, v)))
        mask = torch.cat((torch.ones(B, 1, 1, slots, dtype=torch.bool), mask), -1)
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    torch.testing.assert_close(out, module.out_proj(read.transpose(1, 2).flatten(2)))


def test_memory_attention_errors():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MemoryAttention(10, 3)
    with pytest.raises(ValueError, match="num_slots"):
        MemoryAttention(8, num_slots=-1)
    module = MemoryAttention(8)
    with pytest.raises(ValueError, match="query must have shape"):
        module(torch.randn(3, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match="memory must have shape"):
        module(torch.randn(2, 3, 8), torch.randn(3, 4, 8))


@pytest.mark.parametrize(
    "module",
    [
        MultiheadAttention(E, H, batch_first=True),
        PrefixAttention(E, H, 4, batch_first=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_copies(module):
    x = torch.randn(B, S, E)
    module = module.double()
    expected = module(x, x, x, need_weights=False)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], expected)


def test_compiles_without_a_graph_break():
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, S, E)

    def run(t):
        return module(t, t, t, need_weights=False)[0]

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    module, theirs = twins(batch_first=True)
    x, padding = torch.randn(B, S, E), as_float(bool_mask(B, S))
    oracle = theirs(x, x, x, need_weights=False, key_padding_mask=padding)[0]
    x, padding = x.float(), padding.float()
    with torch.autocast("cpu", dtype=dtype):
        mine, other = (m.float()(x, x, x, need_weights=False, key_padding_mask=padding)[0] for m in (module, theirs))
    assert mine.dtype == other.dtype == dtype
    assert_accurate({"out": mine}, {"out": other}, {"out": oracle})


@pytest.mark.parametrize(
    "module,change,error,words",
    [
        (MultiheadAttention, {"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads"),
        (MultiheadAttention, {"dropout": 1.5}, ValueError, "dropout must be a probability"),
        (MultiheadAttention, {"embed_dim": -12}, ValueError, "embed_dim must be at least 1"),
        (PrefixAttention, {"prefix_length": 0}, ValueError, "prefix_length must be at least 1"),
        (PrefixAttention, {"prefix_length": 1.5}, TypeError, "prefix_length must be an int"),
        (MemoryAttention, {"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads"),
        (MemoryAttention, {"num_slots": -1}, ValueError, "num_slots must be at least 0"),
        (MemoryAttention, {"memory_dim": 0}, ValueError, "memory_dim must be at least 1"),
        (MemoryAttention, {"scale": float("nan")}, ValueError, "scale must be finite"),
        (MemoryAttention, {"dropout": -0.1}, ValueError, "dropout must be a probability"),
    ],
)
def test_constructor_errors(module, change, error, words):
    needed = {"prefix_length": 3} if module is PrefixAttention else {}
    with pytest.raises(error, match=f"{module.__name__}: {words}"):
        module(**{"embed_dim": 12, "num_heads": 3, **needed, **change})


def test_trains_under_ddp(tmp_path):
    module = "Calls(lwft.MultiheadAttention(32, 4, batch_first=True), lambda attend, x: attend(x, x, x)[0])"
    assert_averages_gradients(module, 32, tmp_path / "store")
