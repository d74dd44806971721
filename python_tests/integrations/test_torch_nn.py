"""torch.nn's attention and transformer layers through `accelerate`: numbers, guards, and what else must not change."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ddp import assert_averages_gradients
from oracle import assert_accurate
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels.integrations import drift, torch_nn

pytestmark = pytest.mark.usefixtures("native")

E, H, B, S, L = 24, 4, 3, 5, 7
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def hidden(*shape):
    """A padding mask, True = hidden, with at least the first key visible."""
    return torch.arange(shape[-1]) >= torch.randint(1, shape[-1] + 1, (*shape[:-1], 1))


def scattered(*shape):
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


def later(size):
    return nn.Transformer.generate_square_subsequent_mask(size)


def shaken(module):
    """torch starts biases at zero and norms at one, which would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def attention(**options):
    return shaken(nn.MultiheadAttention(E, H, **{"batch_first": True, **options}))


def encoder_layer(**options):
    return shaken(nn.TransformerEncoderLayer(E, H, 32, **{"batch_first": True, "dropout": 0.0, **options}))


def decoder_layer(**options):
    return shaken(nn.TransformerDecoderLayer(E, H, 32, **{"batch_first": True, "dropout": 0.0, **options}))


def stack(layers=2, **options):
    return nn.TransformerEncoder(encoder_layer(**options), layers)


def attend(module, query, key, value, **masks):
    out, weights = module(query, key, value, need_weights=False, **masks)
    assert weights is None
    return out


def run(module, inputs, masks, call, dtype):
    """call(module, *inputs, **masks) in `dtype`, and the gradients of the parameters, inputs and float masks."""
    module = copy.deepcopy(module).to(dtype)
    # a tensor given three times stays one, as self-attention wants it
    leaves = {id(t): t.detach().to(dtype).requires_grad_() for t in inputs}
    masks = {n: m.to(dtype) if isinstance(m, torch.Tensor) and m.is_floating_point() else m for n, m in masks.items()}
    out = call(module, *(leaves[id(t)] for t in inputs), **masks)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = {**{f"input {i}": t for i, t in enumerate(leaves.values())}, **dict(module.named_parameters())}
    total = (out * direction.to(torch.bfloat16).to(out.dtype)).sum()
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return {"out": out, **dict(zip(wanted, gradients, strict=True))}


def assert_as_torch(module, inputs, masks, call, dtype):
    """Ours in `dtype` against torch's path in `dtype` and, from the same rounded numbers, in float64."""
    module = copy.deepcopy(module).to(dtype)
    rounded = {id(t): t.to(dtype) for t in inputs}
    inputs = [rounded[id(t)] for t in inputs]
    masks = {n: m.to(dtype) if isinstance(m, torch.Tensor) and m.is_floating_point() else m for n, m in masks.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        oracle = run(module, inputs, masks, call, torch.float64)
        theirs = run(module, inputs, masks, call, dtype)
    assert lwft_kernels.accelerate(module).replaced
    lwft_kernels.reset_stats()
    assert_accurate(run(module, inputs, masks, call, dtype), theirs, oracle)


def counts():
    """Calls by op: those that were fast, and the reasons of the others."""
    return {op: (counted["fast"], set(counted["declined"])) for op, counted in lwft_kernels.stats().items()}


# nn.MultiheadAttention


def cross_inputs(key_width=E, value_width=E):
    return torch.randn(B, S, E), torch.randn(B, L, key_width), torch.randn(B, L, value_width)


MASKS = {
    "none": dict,
    "bool padding": lambda: {"key_padding_mask": hidden(B, L)},
    "float padding": lambda: {"key_padding_mask": as_float(hidden(B, L))},
    "bool": lambda: {"attn_mask": scattered(S, L)},
    "float": lambda: {"attn_mask": torch.randn(S, L)},
    "bool 3-D": lambda: {"attn_mask": scattered(B * H, S, L)},
    "float 3-D": lambda: {"attn_mask": torch.randn(B * H, S, L)},
    "bool, bool padding": lambda: {"attn_mask": scattered(S, L), "key_padding_mask": hidden(B, L)},
    "float, bool padding": lambda: {"attn_mask": torch.randn(S, L), "key_padding_mask": hidden(B, L)},
    "float 3-D, float padding": lambda: {
        "attn_mask": torch.randn(B * H, S, L), "key_padding_mask": as_float(hidden(B, L))
    },
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_attention_in_every_mask_form(masks, dtype):
    assert_as_torch(attention(), cross_inputs(), masks(), attend, dtype)
    assert counts() == {"attention": (1, set())}


@DTYPES
@pytest.mark.parametrize("padded", [False, True])
def test_causal_self_attention(padded, dtype):
    x = torch.randn(B, S, E)
    masks = {"attn_mask": later(S), "is_causal": True}
    if padded:
        masks["key_padding_mask"] = as_float(hidden(B, S))
    assert_as_torch(attention(), (x, x, x), masks, attend, dtype)
    assert counts() == {"attention": (1, set())}


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"batch_first": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
        {"kdim": 10, "vdim": 11},
        {"kdim": 10, "bias": False, "add_bias_kv": True},
    ],
    ids=str,
)
def test_attention_in_every_constructor_form(options):
    module = attention(**options)
    inputs = cross_inputs(module.kdim, module.vdim)
    if not module.batch_first:
        inputs = tuple(t.transpose(0, 1) for t in inputs)
    masks = {"key_padding_mask": hidden(B, L), "attn_mask": scattered(S, L)}
    assert_as_torch(module, inputs, masks, attend, torch.float32)
    assert counts() == {"attention": (1, set())}


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_attention(batch_first):
    inputs = tuple(t[0] for t in cross_inputs())
    masks = {"key_padding_mask": hidden(L), "attn_mask": scattered(H, S, L)}
    assert_as_torch(attention(batch_first=batch_first), inputs, masks, attend, torch.float32)
    assert counts() == {"attention": (1, set())}


def test_an_empty_batch():
    module = attention()
    x = torch.randn(0, S, E)
    expected = attend(module, x, x, x)
    lwft_kernels.accelerate(module)
    assert torch.equal(attend(module, x, x, x), expected)


def test_self_attention_is_one_product():
    module, x = attention(), torch.randn(B, S, E)
    lwft_kernels.accelerate(module)
    products = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear:
                products.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    with Watch():
        attend(module, x, x, x)
    assert products == [(3 * E, E), (E, E)]


def test_a_learned_mask_has_its_gradient():
    module, x = attention(), torch.randn(B, S, E)
    bias = torch.randn(S, S, requires_grad=True)
    (expected,) = torch.autograd.grad(attend(module, x, x, x, attn_mask=bias).square().sum(), bias)
    lwft_kernels.accelerate(module)
    (found,) = torch.autograd.grad(attend(module, x, x, x, attn_mask=bias).square().sum(), bias)
    torch.testing.assert_close(found, expected)
    assert counts() == {"attention": (1, set())}


@pytest.mark.parametrize("forms", ["bool", "float"])
def test_rows_that_see_nothing(forms):
    module, x = attention(), torch.randn(B, S, E)
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1] = True
    mask = mask if forms == "bool" else as_float(mask)
    theirs = attend(module, x, x, x, key_padding_mask=mask)
    with_weights = module(x, x, x, key_padding_mask=mask)[0]
    lwft_kernels.accelerate(module)
    out = attend(module, x, x, x, key_padding_mask=mask)
    # torch says NaN with weights and none without; ours is the zero of no attention, then the output projection
    assert torch.equal(out[1], module.out_proj.bias.expand(S, E))
    torch.testing.assert_close(out, theirs)
    declined = module(x, x, x, key_padding_mask=mask)[0]
    assert torch.equal(declined.isnan(), with_weights.isnan()) and declined[1].isnan().all()


def test_dropout_of_attention():
    module, x = attention(dropout=0.3), torch.randn(B, S, E)
    lwft_kernels.accelerate(module)

    def seeded(seed):
        torch.manual_seed(seed)
        return attend(module, x, x, x)

    assert torch.equal(seeded(3), seeded(3)) and not torch.equal(seeded(3), seeded(4))
    assert_same_statistics(lambda: attend(module, x, x, x), module)


def assert_same_statistics(call, module, groups=40, draws=16):
    """Mean and variance over the seeds, of ours and then of torch's, differ by less than five standard errors.

    The errors are those found between groups of draws.
    """

    def statistics():
        values = torch.stack([call().detach().double().flatten() for _ in range(groups * draws)])
        values = values.unflatten(0, (groups, draws))
        return values.mean(1), values.var(1).sum(-1)

    mine = statistics()
    for part in module.modules():
        for theirs, (ours, _, _) in torch_nn._SWAPS.items():
            if type(part) is ours:
                part.__class__ = theirs
    for ours, theirs in zip(mine, statistics(), strict=True):
        error = ((ours.var(0) + theirs.var(0)) / groups).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error).all()


def test_attention_that_is_not_served_is_torchs():
    x, memory = torch.randn(B, S, E), torch.randn(B, L, E)
    later_and_extra = {"need_weights": False, "attn_mask": later(S), "is_causal": True}
    cases = [
        ({}, (x, x, x), {}, "need_weights"),
        ({}, (x, memory, memory), {"average_attn_weights": False}, "need_weights"),
        ({"add_bias_kv": True}, (x, x, x), later_and_extra, "is_causal hides"),
        ({"add_zero_attn": True}, (x, x, x), later_and_extra, "is_causal hides"),
    ]
    for options, inputs, arguments, words in cases:
        module = attention(**options)
        expected = module(*inputs, **arguments)
        lwft_kernels.accelerate(module)
        lwft_kernels.reset_stats()
        for mine, other in zip(module(*inputs, **arguments), expected, strict=True):
            assert (mine is None and other is None) or torch.equal(mine, other)
        ((op, (_, reasons)),) = counts().items()
        assert op == "nn.MultiheadAttention" and len(reasons) == 1 and words in reasons.pop()


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.zeros(S, S + 1, dtype=torch.bool)},
        {"attn_mask": torch.zeros(S, S, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.int64)},
    ],
    ids=str,
)
def test_what_torch_refuses_it_refuses_itself(arguments):
    module, x = attention(), torch.randn(B, S, E)
    errors = []
    for _ in range(2):
        with pytest.raises(Exception) as raised:
            attend(module, x, x, x, **arguments)
        errors.append((raised.type, str(raised.value)))
        lwft_kernels.accelerate(module)
    assert errors[0] == errors[1]


def test_subclasses_of_tensors_and_transforms_are_torchs():
    class Named(torch.Tensor):
        pass

    module, x = attention(), torch.randn(B, S, E)
    lwft_kernels.accelerate(module)
    assert isinstance(attend(module, *[x.as_subclass(Named)] * 3), Named)
    attend(module, x, x, x, attn_mask=torch.zeros(S, S).as_subclass(Named))

    def loss(x):
        return attend(module, x, x, x).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward AD"):  # torch's own refusal, not ours
            attend(module, dual, dual, dual)
    assert len(counts()["nn.MultiheadAttention"][1]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    module, x = stack(), torch.randn(B, S, E)
    oracle = copy.deepcopy(module).double()(x.double())
    with torch.autocast("cpu", dtype=dtype):
        theirs = module(x)
        lwft_kernels.accelerate(module)
        mine = module(x)
    assert mine.dtype == theirs.dtype
    assert_accurate({"out": mine}, {"out": theirs}, {"out": oracle})
    assert counts() == {"attention": (2, set()), "add_layer_norm": (4, set())}


# The layers


def encode(layer, x, **masks):
    return layer(x, **masks)


ENCODER_MASKS = {
    "none": dict,
    "bool padding": lambda: {"src_key_padding_mask": hidden(B, S)},
    "float padding": lambda: {"src_key_padding_mask": as_float(hidden(B, S))},
    "causal": lambda: {"src_mask": later(S), "is_causal": True},
    "bool 3-D, bool padding": lambda: {"src_mask": scattered(B * H, S, S), "src_key_padding_mask": hidden(B, S)},
    "causal, float padding": lambda: {
        "src_mask": later(S), "is_causal": True, "src_key_padding_mask": as_float(hidden(B, S))
    },
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("masks", ENCODER_MASKS.values(), ids=ENCODER_MASKS)
def test_encoder_layer_in_every_mask_form(masks, dtype):
    # a ReLU near zero is another in bfloat16, whoever computes it
    assert_as_torch(encoder_layer(activation="gelu"), [torch.randn(B, S, E)], masks(), encode, dtype)
    assert counts() == {"attention": (1, set()), "add_layer_norm": (2, set())}


def option_id(options: dict[str, Any]) -> str:
    """A function by its name: where it lies in memory differs from one test process to the next."""
    return ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "default"


OPTIONS = [
    {},
    {"activation": "gelu"},
    {"activation": torch.tanh},
    {"activation": nn.SiLU()},
    {"bias": False},
    {"batch_first": False},
    {"layer_norm_eps": 0.1},
    {"norm_first": True},
    {"norm_first": True, "batch_first": False, "bias": False, "activation": F.gelu},
]


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_encoder_layer_in_every_constructor_form(options):
    layer, x = encoder_layer(**options), torch.randn(B, S, E)
    masks = {"src_key_padding_mask": hidden(*(x.shape[:2] if layer.self_attn.batch_first else (S, B)))}
    assert_as_torch(layer, [x], masks, encode, torch.float32)
    norms = {} if layer.norm_first else {"add_layer_norm": (2, set())}
    assert counts() == {"attention": (1, set()), **norms}


def decode(layer, x, memory, **masks):
    return layer(x, memory, **masks)


DECODER_MASKS = {
    "none": dict,
    "all bool": lambda: {
        "tgt_mask": scattered(S, S), "memory_mask": scattered(S, L),
        "tgt_key_padding_mask": hidden(B, S), "memory_key_padding_mask": hidden(B, L),
    },
    "causal": lambda: {"tgt_mask": later(S), "tgt_is_causal": True},
    "causal, all float": lambda: {
        "tgt_mask": later(S), "tgt_is_causal": True, "memory_mask": torch.randn(B * H, S, L),
        "tgt_key_padding_mask": as_float(hidden(B, S)), "memory_key_padding_mask": as_float(hidden(B, L)),
    },
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("masks", DECODER_MASKS.values(), ids=DECODER_MASKS)
def test_decoder_layer_in_every_mask_form(masks, dtype):
    inputs = [torch.randn(B, S, E), torch.randn(B, L, E)]
    assert_as_torch(decoder_layer(activation="gelu"), inputs, masks(), decode, dtype)
    assert counts() == {"attention": (2, set()), "add_layer_norm": (3, set())}


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_decoder_layer_in_every_constructor_form(options):
    layer = decoder_layer(**options)
    inputs = [torch.randn(B, S, E), torch.randn(B, L, E)]
    if not layer.self_attn.batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    assert_as_torch(layer, inputs, {"memory_key_padding_mask": hidden(B, L)}, decode, torch.float32)
    norms = {} if layer.norm_first else {"add_layer_norm": (3, set())}
    assert counts() == {"attention": (2, set()), **norms}


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first):
    model = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=batch_first)
    inputs = [torch.randn(B, L, E), torch.randn(B, S, E)]
    if not batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    masks = {"src_key_padding_mask": as_float(hidden(B, L)), "tgt_mask": later(S)}
    assert_as_torch(model, inputs, masks, decode, torch.float32)
    assert counts() == {"attention": (2 + 4, set()), "add_layer_norm": (4 + 6, set())}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [S, 130, 260])
@pytest.mark.parametrize("gradients", ["no_grad", "inference_mode", "frozen", "wanted"])
def test_inference(gradients, tokens, padded):
    """Torch's own op for few tokens, ours for many, and for fewer beside a mask; a nested tensor is torch's."""
    model = stack(dropout=0.1).eval()
    x, mask = torch.randn(B, tokens, E), hidden(B, tokens) if padded else None
    oracle = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=mask)
    if gradients == "frozen":
        model.requires_grad_(False)
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(gradients, torch.enable_grad)
    theirs = {}
    with mode():
        theirs["out"] = model(x, src_key_padding_mask=mask)
        for layers in (model.layers, [model]):  # padding inside a stack comes as a nested tensor, to a layer as a mask
            alone = layers[0]
            expected = alone(x, src_key_padding_mask=mask)
            report = lwft_kernels.accelerate(model)
            lwft_kernels.reset_stats()
            found = alone(x, src_key_padding_mask=mask)
            torch.testing.assert_close(found, expected)
            nested = padded and alone is model
            fast = gradients == "wanted" or (tokens > (128 if padded else 256) and not nested)
            assert ("attention" in counts()) == fast
            if not fast:
                assert counts()["nn.TransformerEncoderLayer"][1]
            report.undo()
    assert oracle.shape == theirs["out"].shape


def test_inference_of_attention_alone():
    module = attention().eval()
    for tokens, masked, fast in ((S, False, 0), (S, True, 0), (130, False, 0), (130, True, 1), (260, False, 1)):
        x = torch.randn(B, tokens, E)
        masks = {"key_padding_mask": hidden(B, tokens)} if masked else {}
        with torch.no_grad():
            expected = attend(module, x, x, x, **masks)
            report = lwft_kernels.accelerate(module)
            lwft_kernels.reset_stats()
            torch.testing.assert_close(attend(module, x, x, x, **masks), expected)
        assert counts().get("attention", (0, set()))[0] == fast
        report.undo()


def test_nested_tensors_are_torchs():
    model = stack().eval()
    lwft_kernels.accelerate(model)
    with torch.no_grad():
        parts = [torch.randn(n, E) for n in (3, 5)]
        nested = torch.nested.nested_tensor(parts)
        out = model.layers[0](nested)
        assert out.is_nested
        for part, found in zip(parts, out.unbind(), strict=True):
            torch.testing.assert_close(found, model.layers[0](part[None])[0])


def test_dropout_of_layers():
    for module, inputs in (
        (encoder_layer(dropout=0.2), [torch.randn(B, S, E)]),
        (decoder_layer(dropout=0.2), [torch.randn(B, S, E), torch.randn(B, L, E)]),
    ):
        lwft_kernels.accelerate(module)

        def seeded(seed, module=module, inputs=inputs):
            torch.manual_seed(seed)
            return module(*inputs)

        assert torch.equal(seeded(3), seeded(3)) and not torch.equal(seeded(3), seeded(4))
        assert_same_statistics(lambda module=module, inputs=inputs: module(*inputs), module)


def test_hooks_on_the_parts_of_a_layer_fire_as_before():
    def called(layer):
        seen = []
        handles = [
            part.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, part in layer.named_modules()
        ]
        layer(torch.randn(B, S, E))
        for handle in handles:
            handle.remove()
        return seen

    layer = encoder_layer(dropout=0.1)
    expected = called(layer)
    assert {"self_attn", "linear1", "norm1", "dropout2"} < set(expected) and "self_attn.out_proj" not in expected
    lwft_kernels.accelerate(layer)
    lwft_kernels.reset_stats()
    assert called(layer) == expected
    assert counts()["residual and LayerNorm"] == (0, {"the norm or the dropout has hooks"})
    lwft_kernels.reset_stats()
    layer(torch.randn(B, S, E))
    assert counts() == {"attention": (1, set()), "add_layer_norm": (2, set())}


def test_global_hooks_see_every_module():
    layer, seen = encoder_layer(), []
    lwft_kernels.accelerate(layer)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        layer(torch.randn(B, S, E))
    assert layer.norm1 in seen and layer.norm2 in seen and layer.dropout1 in seen


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


@pytest.mark.parametrize(
    "name,part,words",
    [
        ("norm1", lambda: RootMeanSquare(E), "the norm is a RootMeanSquare"),
        ("dropout1", lambda: nn.FeatureAlphaDropout(0.0), "the dropout is a FeatureAlphaDropout"),
        ("norm1", lambda: nn.LayerNorm((S, E)), "several dimensions"),
        ("norm1", lambda: nn.LayerNorm(E).double(), None),
    ],
)
def test_parts_that_are_not_torchs_are_called(name, part, words):
    layer, x = encoder_layer(), torch.randn(B, S, E)
    lwft_kernels.accelerate(layer)
    setattr(layer, name, part())
    reference = copy.deepcopy(layer)
    reference.__class__ = nn.TransformerEncoderLayer
    if words is None:  # torch refuses a norm of float64 on float32, ours with its words
        with pytest.raises(RuntimeError) as theirs:
            reference(x)
        with pytest.raises(RuntimeError) as ours:
            layer(x)
        assert str(ours.value) == str(theirs.value)
        return
    torch.testing.assert_close(layer(x), reference(x))
    reasons = counts()["residual and LayerNorm"][1]
    assert len(reasons) == 1 and words in reasons.pop()


# What stays as it was


def test_the_objects_and_the_state_dict_stay():
    model = nn.Transformer(E, H, 1, 1, 32)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    report = lwft_kernels.accelerate(model)
    assert [change.module for change in report.replaced] == [
        "encoder.layers.0", "encoder.layers.0.self_attn",
        "decoder.layers.0", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    assert {name: id(module) for name, module in model.named_modules()} == {n: i for n, (i, _) in before.items()}
    assert list(model.state_dict()) == state and [id(p) for p in model.parameters()] == parameters
    fresh = nn.Transformer(E, H, 1, 1, 32)
    fresh.load_state_dict(model.state_dict())
    again = lwft_kernels.accelerate(model)
    assert not again.replaced and {change.reason for change in again.changes} == {"replaced already"}
    report.undo()
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


def test_copies_compute_the_same():
    model, x = stack().double(), torch.randn(B, S, E, dtype=torch.float64)
    lwft_kernels.accelerate(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        lwft_kernels.reset_stats()
        assert torch.equal(twin(x), expected)
        assert counts() == {"attention": (2, set()), "add_layer_norm": (4, set())}


def test_undo_leaves_what_somebody_else_has_done():
    layer = encoder_layer()
    report = lwft_kernels.accelerate(layer)
    parametrizations.weight_norm(layer.self_attn.out_proj)
    derived = type("Theirs", (type(layer),), {})
    layer.__class__ = derived
    report.undo()
    assert type(layer) is derived and type(layer.self_attn) is nn.MultiheadAttention


def test_the_report_knows_who_was_never_reached():
    model = nn.ModuleList([encoder_layer(), decoder_layer(), attention()])
    report = lwft_kernels.accelerate(model)
    names = [change.module for change in report.unreached()]
    assert names == ["0", "0.self_attn", "1", "1.self_attn", "1.multihead_attn", "2"]
    x = torch.randn(B, S, E)
    model[0](x)
    model[2](x, x, x)  # wants the weights: declined
    assert [change.module for change in report.unreached()] == names[2:]
    model[1](x, x)
    assert [change.module for change in report.unreached()] == ["2"]
    attend(model[2], x, x, x)
    assert not report.unreached()


class Relative(nn.MultiheadAttention):
    pass


class Layer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def test_others_are_left_alone_and_say_why():
    model = nn.ModuleDict({
        "subclass": Relative(E, H),
        "layer": Layer(E, H),
        "patched": nn.MultiheadAttention(E, H),
        "block": encoder_layer(),
        "ours": lwft_kernels.nn.MultiheadAttention(E, H),
        "pre": encoder_layer(norm_first=True),
    })  # fmt: skip
    model["patched"].forward = functools.partial(nn.MultiheadAttention.forward, model["patched"])
    model["block"]._sa_block = lambda x, *_, **__: x
    report = lwft_kernels.accelerate(model)
    reasons = {change.module: change.reason for change in report.changes}
    assert "subclass of nn.MultiheadAttention" in reasons["subclass"]
    assert "subclass of nn.TransformerEncoderLayer" in reasons["layer"]
    assert "somebody else has replaced its forward" in reasons["patched"]
    assert "somebody else has replaced its _sa_block" in reasons["block"]
    assert "lwft_kernels already" in reasons["ours"]
    assert "norm_first" in reasons["pre"]
    attentions = [name for name in reasons if name.endswith("self_attn")]
    assert len(attentions) == 3 and all(reasons[name] is None for name in attentions)
    assert [c.module for c in lwft_kernels.explain(model).changes] == [c.module for c in report.changes]


def test_compiles_without_a_graph_break():
    model, x = stack(), torch.randn(B, S, E)
    mask = hidden(B, S)
    lwft_kernels.accelerate(model)

    def loss(x):
        return model(x, src_key_padding_mask=mask).square().sum()

    expected = torch.autograd.grad(loss(x), list(model.parameters()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x), list(model.parameters()))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_compiles_for_every_length():
    model = stack(dropout=0.1)
    lwft_kernels.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 7, E), (4, 9, E)):
        x = torch.randn(shape)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(x), expected)


def test_exports_torchs_own_operations():
    model, x = stack(), torch.randn(B, S, E)
    lwft_kernels.accelerate(model)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "lwft" in str(node.target)]
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(reentrant):
    model, x = stack(dropout=0.3), torch.randn(B, S, E, requires_grad=True)
    lwft_kernels.accelerate(model)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_parameters_that_are_not_whole_are_torchs():
    class Shard(torch.Tensor):
        pass

    module, x = attention(), torch.randn(B, S, E)
    lwft_kernels.accelerate(module)
    module.in_proj_weight = nn.Parameter(module.in_proj_weight.detach().as_subclass(Shard))
    attend(module, x, x, x)
    assert counts()["nn.MultiheadAttention"][1] == {"the weights are sharded or of a tensor subclass"}


@pytest.fixture
def mesh(tmp_path):
    """One process on its own: its weights are DTensors all the same."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fully_sharded_layers_are_whole_when_they_are_called(mesh):
    model, x = stack().double(), torch.randn(B, S, E, dtype=torch.float64)
    reference = copy.deepcopy(model)
    lwft_kernels.accelerate(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    outs = [module(x) for module in (model, reference)]
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(*outs)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad)
    assert counts() == {"attention": (2, set()), "add_layer_norm": (4, set())}


def test_trains_under_ddp(tmp_path):
    model = "nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)"
    accelerated = f"(lambda model: [model, __import__('lwft_kernels').accelerate(model)][0])({model})"
    assert_averages_gradients(accelerated, 32, tmp_path / "store")


def test_distributed_tensors_are_torchs(mesh):
    model, x = stack(), torch.randn(B, S, E)
    expected = model(x)
    lwft_kernels.accelerate(model)
    distribute_module(model, mesh)
    lwft_kernels.reset_stats()
    out = model(distribute_tensor(x, mesh, [Replicate()]))
    torch.testing.assert_close(out.full_tensor(), expected)
    assert {fast for fast, _ in counts().values()} == {0}


# The drift guard


UPSTREAMS = [torch_nn._attention_upstream, torch_nn._encoder_upstream, torch_nn._decoder_upstream]


@pytest.mark.parametrize("upstream", UPSTREAMS, ids=lambda u: u.__name__)
def test_upstream_is_known_and_the_self_test_passes(upstream):
    if torch.__version__.startswith("2.13."):
        assert drift.fingerprint(*upstream().functions) in upstream().known
    assert upstream().self_test() is None


@pytest.mark.parametrize(
    "upstream,kind,broken",
    [
        (torch_nn._attention_upstream, nn.MultiheadAttention, lambda out: (out[0] * 1.001, out[1])),
        (torch_nn._encoder_upstream, nn.TransformerEncoderLayer, lambda out: out * 1.001),
        (torch_nn._decoder_upstream, nn.TransformerDecoderLayer, lambda out: out * 1.001),
    ],
    ids=["attention", "encoder", "decoder"],
)
def test_the_self_test_notices_another_upstream(upstream, kind, broken, monkeypatch):
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: broken(original(self, *args, **kwargs)))
    assert "differs" in upstream().self_test()


# With PEFT


def test_adapters_inside_a_layer_are_not_left_out():
    peft = pytest.importorskip("peft")
    x = torch.randn(B, S, E)
    for target in ("linear1", "self_attn"):
        config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
        model = peft.get_peft_model(stack(), config)
        expected = model.train()(x)  # there is no dropout: training is evaluation
        report = lwft_kernels.accelerate(model, lora=False)
        reasons = {c.module.rpartition("layers.0.")[2]: c.reason for c in report.changes}
        if target == "self_attn":
            assert "PEFT's MultiheadAttention around it" in reasons["self_attn.base_layer"]
        else:
            assert reasons["self_attn"] is None
        model.eval()
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                # torch's op for a whole layer would give what the base model gives
                torch.testing.assert_close(model(x), expected)
