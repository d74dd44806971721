"""PEFT's lora.Linear through `accelerate`: numbers, every guard, and what PEFT does with its modules afterwards."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lwft_kernels
from lwft_kernels import dropout
from lwft_kernels.integrations.peft import lora_layer

pytestmark = pytest.mark.usefixtures("native")

WIDTH = 24


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 20)
        self.second = nn.Linear(20, WIDTH, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def build(**options):
    torch.manual_seed(1)
    config = LoraConfig(**{"target_modules": ["first", "second"], "r": 4, "lora_alpha": 8, **options})
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the branch
            nn.init.normal_(parameter)
    return model


def outputs_and_gradients(model, x):
    x = x.detach().requires_grad_()
    out = model(x)
    wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(out.square().sum(), list(wanted.values()))
    return {"out": out, **dict(zip(wanted, gradients, strict=True))}


def fast():
    stats = lwft_kernels.stats()
    return sum(stats.get(op, {"fast": 0})["fast"] for op in ("lora_linear", "lora_delta_"))


def reasons():
    return lwft_kernels.stats().get("peft lora.Linear", {"declined": {}})["declined"]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 1}], ids=str)
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH), (0, WIDTH)], ids=str)
def test_outputs_and_gradients(options, shape):
    model, x = build(**options), torch.randn(shape)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    assert_accurate(outputs_and_gradients(model, x), theirs, oracle)
    assert fast() == 2 and not reasons()


def test_dropout_is_the_packages_own_stream():
    model, x = build(lora_dropout=0.3), torch.randn(6, WIDTH)
    layer = model.base_model.model.first
    lwft_kernels.accelerate(model)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = dropout.dropout(x, dropout.draw_seed(x.device), 0.3)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(out, layer.base_layer(x) + dropped @ a.T @ b.T * layer.scaling["default"])
    model.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_beside_16_bit_activations(base):
    model, x = build(), torch.randn(5, WIDTH).to(base)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer.to(base)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(model, x)
    assert ours["out"].dtype == base and fast() == 2
    assert_accurate(ours, theirs, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model, x = build(), torch.randn(5, WIDTH)
    oracle = {"out": copy.deepcopy(model).double()(x.double())}
    with torch.autocast("cpu", dtype=dtype):
        theirs = {"out": model(x)}
        lwft_kernels.accelerate(model)
        ours = {"out": model(x)}
    assert ours["out"].dtype == theirs["out"].dtype and fast() == 2
    assert_accurate(ours, theirs, oracle)


def trained_base(model):
    model.base_model.model.first.base_layer.requires_grad_(True)


def transposed_base(model):
    layer = model.base_model.model.first
    transposed = Conv1D(20, WIDTH).requires_grad_(False)
    transposed.weight.data.copy_(layer.base_layer.weight.T)
    layer.base_layer, layer.fan_in_fan_out = transposed, True


@pytest.mark.parametrize("change", [trained_base, transposed_base])
def test_a_base_that_is_computed_together_with_the_branch(change):
    model, x = build(), torch.randn(2, 5, WIDTH)
    change(model)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    assert_accurate(outputs_and_gradients(model, x), theirs, oracle)
    assert lwft_kernels.stats()["lora_linear"]["fast"] == 2 and not reasons()


def hooked_base(model):
    model.base_model.model.first.base_layer.register_forward_hook(lambda m, i, out: out + 1)


def other_base(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.base_model.model.first.base_layer.__class__ = Doubled


def hook_whose_result_backward_needs(model):
    model.base_model.model.first.base_layer.register_forward_hook(lambda m, i, out: torch.sigmoid(out))


def offloaded_base(model):
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=None)
    base = model.base_model.model.first.base_layer
    hook.weights_map = {name: value.detach().clone() for name, value in base.named_parameters()}
    add_hook_to_module(base, hook)
    assert base.weight.device.type == "meta"


@pytest.mark.parametrize("change", [hooked_base, hook_whose_result_backward_needs, other_base])
def test_a_base_that_must_be_called(change):
    model, x = build(), torch.randn(5, WIDTH)
    change(model)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    assert_accurate(outputs_and_gradients(model, x), theirs, oracle)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1


def test_an_offloaded_base():
    model, x = build(), torch.randn(5, WIDTH)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    theirs = outputs_and_gradients(model, x)
    offloaded_base(model)
    lwft_kernels.accelerate(model)
    assert_accurate(outputs_and_gradients(model, x), theirs, oracle)
    assert lwft_kernels.stats()["lora_delta_"]["fast"] == 1
    assert model.base_model.model.first.base_layer.weight.device.type == "meta"


def test_a_result_that_a_hook_has_kept_is_not_written_to():
    model, x, kept = build(), torch.randn(5, WIDTH), []
    model.base_model.model.first.base_layer.register_forward_hook(lambda m, i, out: kept.append(out))
    model(x)
    lwft_kernels.accelerate(model)
    model(x)
    assert torch.equal(kept[0], kept[1]) and lwft_kernels.stats()["lora_delta_"]["fast"] == 1


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def hooked_adapter(model):
    model.base_model.model.first.lora_A["default"].register_forward_hook(lambda m, i, out: 2 * out)


def odd_dropout(model):
    model.base_model.model.first.lora_dropout["default"] = nn.AlphaDropout(0.0)


def global_hook(model):
    model.hook = nn.modules.module.register_module_forward_hook(lambda *_: None)


def no_casting(model):
    model.base_model.model.first.cast_input_dtype_enabled = False


def no_adapter(model):
    model.base_model.model.first._active_adapter = []


@pytest.mark.parametrize(
    "options,change,words",
    [
        ({}, disabled, "disabled"),
        ({}, merged, "merged"),
        ({}, hooked_adapter, "hooks"),
        ({}, odd_dropout, "AlphaDropout"),
        ({}, global_hook, "hooks"),
        ({}, no_casting, "cast_input_dtype_enabled"),
        ({}, no_adapter, "no adapter"),
        ({"init_lora_weights": "mica"}, None, "MiCALinearVariant"),
    ],
)
def test_what_it_declines_is_peft_to_the_bit(options, change, words):
    model, x = build(**options), torch.randn(5, WIDTH)
    if change is not None:
        change(model)
    layer = model.eval().base_model.model.first
    expected = layer(x)
    lwft_kernels.accelerate(model)
    assert type(layer) is lora_layer.Linear
    try:
        assert torch.equal(layer(x), expected)
    finally:
        if change is global_hook:
            model.hook.remove()
    assert any(words in reason for reason in reasons()), reasons()
    assert fast() == 0


def test_adapters_of_two_dtypes_are_peft_to_the_bit():
    model, x = build().eval(), torch.randn(5, WIDTH)
    layer = model.base_model.model.first
    layer.lora_B["default"].to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        lwft_kernels.accelerate(model)
        assert torch.equal(layer(x), expected)
    assert reasons() == {"lora_A and lora_B differ in dtype": 1}


def test_transforms_go_to_peft():
    model, x = build().eval(), torch.randn(5, WIDTH)

    def loss(x):
        return model(x).square().sum()

    expected = torch.func.grad(loss)(x)
    lwft_kernels.accelerate(model)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-3)
    assert fast() == 0


def test_undo_leaves_what_others_have_put_there():
    model = build()
    report, layer = lwft_kernels.accelerate(model), model.base_model.model.first

    class Theirs(lora_layer.Linear):
        pass

    layer.__class__ = Theirs
    report.undo()
    assert type(layer) is Theirs and type(model.base_model.model.second) is lora.Linear


def test_gradient_checkpointing_draws_the_same_dropout():
    model, x = build(lora_dropout=0.4), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(7)
        out = run(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_what_peft_does_afterwards(tmp_path):
    model, x = build().eval(), torch.randn(5, WIDTH)
    keys = list(model.state_dict())
    base = model.base_model.model
    lwft_kernels.accelerate(model)
    expected = model(x)
    assert list(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(x), expected)

    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert type(loaded.base_model.model.first) is lora.Linear
    torch.testing.assert_close(loaded(x), expected)

    model.add_adapter("other", LoraConfig(target_modules=["first", "second"], r=3))
    model.set_adapter("other")
    model(x)
    model.set_adapter("default")
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    merged_model = model.merge_and_unload()
    assert type(merged_model.first) is nn.Linear
    torch.testing.assert_close(merged_model(x), expected)


def test_undo_and_report():
    model, x = build().eval(), torch.randn(5, WIDTH)
    expected = model(x)
    report = lwft_kernels.accelerate(model)
    layers = [model.base_model.model.first, model.base_model.model.second]
    assert [type(layer) for layer in layers] == [lora_layer.Linear, lora_layer.Linear]
    assert [c.module for c in report.replaced] == ["base_model.model.first", "base_model.model.second"]
    assert "lora.layer.Linear" in str(report) and "2 of 2 replaced" in str(report)
    report.undo()
    assert [type(layer) for layer in layers] == [lora.Linear, lora.Linear]
    assert torch.equal(model(x), expected)
    assert "nothing to replace" in str(lwft_kernels.accelerate(nn.Linear(2, 2)))


def test_what_others_patched_is_left_alone():
    model = build()
    layer = model.base_model.model.first
    layer.forward = lambda x: x
    report = lwft_kernels.accelerate(model)
    assert type(layer) is lora.Linear
    (declined,) = report.declined
    assert declined.reason == "somebody else has replaced its forward"
    again = lwft_kernels.accelerate(model)
    assert again.replaced == [] and again.declined[1].reason == "replaced already"


def test_embedding_lora_is_reported():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, WIDTH)

        def forward(self, ids):
            return self.words(ids)

    model = get_peft_model(Words(), LoraConfig(target_modules=["words"]))
    (declined,) = lwft_kernels.accelerate(model).declined
    assert "a lookup" in declined.reason and declined.was == "lora.layer.Embedding"


def test_compiles_without_a_graph_break():
    model, x = build(), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_the_reference_backend_is_followed_and_draws_the_same():
    model, x = build(lora_dropout=0.5), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    torch.manual_seed(2)
    expected = model(x)
    lwft_kernels.reset_stats()
    with lwft_kernels.use_backend("reference"):
        torch.manual_seed(2)
        torch.testing.assert_close(model(x), expected)
    assert fast() == 0 and not reasons()


def add_second(model, **options):
    model.add_adapter("other", LoraConfig(target_modules=["first", "second"], r=3, lora_alpha=5, **options))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter)
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_active_adapters(dtype):
    model, x = build().to(dtype), torch.randn(5, WIDTH).to(dtype)
    add_second(model)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(model, x)
    assert sum("other" in name for name in ours) == 4
    assert_accurate(ours, theirs, oracle)
    assert fast() == 4 and not reasons()


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_lora_bias(base, adapter, hooked):
    if base == torch.float32 and adapter == torch.bfloat16:
        adapter = torch.float32
    model = build(lora_bias=True, target_modules=["first"]).to(base)
    x = torch.randn(5, WIDTH).to(base)
    layer = model.base_model.model.first
    nn.init.normal_(layer.lora_B["default"].bias)
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter)
    if hooked:
        layer.base_layer.register_forward_hook(lambda m, i, out: out + 1)
    theirs = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    lwft_kernels.accelerate(model)
    ours = outputs_and_gradients(model, x)
    assert any(name.endswith("lora_B.default.bias") for name in ours)
    assert_accurate(ours, theirs, oracle)
    assert fast() == 1 and not reasons()


class Copies(TorchDispatchMode):
    """The dtypes and sizes of every tensor that is made in another dtype than it was."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.made.append((out.dtype, tuple(out.shape)))
        return out


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_float32_copy_of_16_bit_activations_is_made_or_kept(dtype, dropout_p):
    model, x = build(lora_dropout=dropout_p), torch.randn(50, WIDTH).to(dtype).requires_grad_()
    layer = model.base_model.model.first
    layer.base_layer.to(dtype)
    kept, sizes = [], []

    def pack(tensor):
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Copies() as copies:
            layer(x).sum().backward()
        sizes.append(((torch.float32, (50, WIDTH)) in [*kept, *copies.made], copies.made))
        lwft_kernels.accelerate(model)
    assert sizes[0][0] and not sizes[1][0], sizes
    assert sizes[1][1] == [] and fast() == 1


def test_calls_without_the_second_look_are_the_same():
    """What `_simple` serves, `lora_forward` serves the same, bit for bit, and nothing that it would decline."""
    model, x = build(lora_dropout=0.3), torch.randn(5, WIDTH)
    lwft_kernels.accelerate(model)
    layer = model.base_model.model.first
    results = []
    for call in (lora_layer._simple, lambda layer, x: lora_layer.lora_forward(layer, x, (), {})):
        torch.manual_seed(4)
        results.append(call(layer, x))
    assert torch.equal(*results)
    for break_it in (
        lambda m: setattr(m, "_disable_adapters", True),
        lambda m: m.merged_adapters.append("default"),
        lambda m: setattr(m, "_active_adapter", ["default", "other"]),
        lambda m: setattr(m, "_active_adapter", "missing"),
        lambda m: setattr(m, "cast_input_dtype_enabled", False),
        lambda m: m.lora_variant.update(default=object()),
        lambda m: m.scaling.update(default=torch.tensor(2.0)),
        lambda m: m.lora_A["default"].register_forward_hook(lambda *_: None),
        lambda m: m.lora_B["default"].register_forward_pre_hook(lambda *_: None),
        lambda m: m.base_layer.register_full_backward_hook(lambda *_: None),
        lambda m: m.lora_dropout["default"].register_full_backward_pre_hook(lambda *_: None),
        lambda m: setattr(m.base_layer, "forward", lambda x: x),
        lambda m: parametrizations.weight_norm(m.base_layer),
        lambda m: prune.identity(m.lora_A["default"], "weight"),
        lambda m: m.lora_B["default"].register_parameter("bias", nn.Parameter(torch.zeros(20))),
        lambda m: m.lora_dropout.update({"default": nn.Dropout(0.3, inplace=True)}),
        lambda m: setattr(m.base_layer, "weight", nn.Parameter(m.base_layer.weight.data.double(), False)),
        lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.empty(0), False)),  # as ZeRO-3 leaves it
    ):
        changed = copy.deepcopy(layer)
        assert lora_layer._simple(changed, x) is not None
        break_it(changed)
        assert lora_layer._simple(changed, x) is None, break_it
    for odd in (x.to_sparse(), x.double(), x[:, :-1], x.to("meta"), x.long(), torch.nn.Buffer(x).as_subclass(Odd)):
        assert lora_layer._simple(layer, odd) is None, odd


class Odd(torch.Tensor):
    pass
