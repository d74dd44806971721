"""AdapterHub's adapters through `accelerate`: numbers, the tuple, every guard, and what the library does with them.

`adapters` 1.3 wants transformers 4.57, so these tests run in an environment of their own.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import assert_accurate, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

adapters = pytest.importorskip(
    "adapters", reason="adapters 1.3 goes with transformers 4.57: run this file in the environment that has both"
)
transformers = pytest.importorskip("transformers")

from adapters import BnConfig, LoRAConfig, composition  # noqa: E402
from adapters.methods import lora  # noqa: E402
from adapters.methods.modeling import Adapter, ParallelAdapter  # noqa: E402

import lwft_kernels  # noqa: E402
from lwft_kernels import dropout  # noqa: E402
from lwft_kernels.integrations import adapters as room  # noqa: E402
from lwft_kernels.integrations import drift  # noqa: E402

pytestmark = pytest.mark.usefixtures("native")

D, M, BATCH, TOKENS = 40, 13, 2, 9


def bottleneck(cls=Adapter, **options):
    """An adapter with all of its parameters away from zero and one."""
    config = BnConfig(
        **{"mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu", **options}
    )
    torch.manual_seed(1)
    module = cls("test", D, M, config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


class Holder(nn.Module):
    """What `accelerate` is given: it looks at a model's modules."""

    def __init__(self, part):
        super().__init__()
        self.part = part


def accelerated(module):
    return lwft_kernels.accelerate(Holder(module))


def inputs(dtype=torch.float32, shape=(BATCH, TOKENS, D), same=False):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).to(dtype).double()
    residual = x if same else torch.randn(shape, generator=generator).to(dtype).double()
    return x, residual


def direction(out):
    """A fixed one to differentiate along, that bfloat16 knows too."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16().double()


def tuple_and_gradients(module, x, residual, *, read=(0, 1, 2), gating=False):
    """The tuple and the gradients of a function of those of its tensors that are `read`."""
    leaf = x.clone().requires_grad_()
    other = leaf if residual is x else residual.clone().requires_grad_()
    outs = module(leaf, other, output_gating=gating)
    wanted = {"x": leaf, **({} if other is leaf else {"residual": other}), **dict(module.named_parameters())}
    loss = sum(outs[i].double().mul(direction(outs[i])).sum() for i in (*read, *range(3, len(outs))))
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted.values(), gradients, strict=True)]
    return {**{f"out{i}": outs[i] for i in read}, **dict(zip(wanted, gradients, strict=True))}


def fast(op="adapter"):
    return lwft_kernels.stats().get(op, {"fast": 0})["fast"]


def reasons(op="adapters Adapter"):
    return lwft_kernels.stats().get(op, {"declined": {}})["declined"]


def check(module, dtype, *, same=False, read=(0, 1, 2), gating=False):
    if dtype == torch.bfloat16:
        read = (0,)  # as models do; the gradients of two results read are rounded before they are summed
    module = module.to(dtype)
    oracle_module = copy.deepcopy(module).double()
    x, residual = inputs(dtype, same=same)
    oracle = tuple_and_gradients(oracle_module, x, x if same else residual, read=read, gating=gating)
    x = x.to(dtype)
    residual = x if same else residual.to(dtype)
    theirs = tuple_and_gradients(module, x, residual, read=read, gating=gating)
    accelerated(module)
    ours = tuple_and_gradients(module, x, residual, read=read, gating=gating)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
    for results in (ours, theirs, oracle):
        if results.get("scaling", x).numel() == 1:
            del results["scaling"]  # one number, exact or not by luck: see below
    assert_accurate(ours, theirs, oracle)
    assert fast() >= 1 and not reasons()


@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
def test_the_gradient_of_one_learned_scale(cls):
    def gradients(module, dtype):
        found = []
        for seed in range(20):
            x = torch.randn(3, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
            found.append(tuple_and_gradients(module, x, x, read=(0,))["scaling"])
        return {"scaling": torch.cat(found)}

    module = bottleneck(cls, scaling="learned")
    oracle = gradients(copy.deepcopy(module).double(), torch.float64)
    theirs = gradients(module, torch.float32)
    accelerated(module)
    assert_accurate(gradients(module, torch.float32), theirs, oracle)


ACTIVATIONS = [
    "relu", "swish", "silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate",
    "tanh", "leakyrelu", "leaky_relu", "sigmoid", "linear",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cls, activation, dtype):
    check(bottleneck(cls, non_linearity=activation), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 4.0},
        {"scaling": "learned"},
        {"scaling": "channel"},
        {"ln_before": True},
        {"ln_after": True},
        {"ln_after": True, "adapter_residual_before_ln": True},
        {"adapter_residual_before_ln": True},
        {"use_gating": True},
        {"use_gating": True, "ln_before": True, "scaling": "learned"},
        {"use_gating": True, "scaling": "channel", "adapter_residual_before_ln": True},
    ],
    ids=str,
)
def test_configurations(cls, options, dtype):
    check(bottleneck(cls, **options), dtype, gating=options.get("use_gating", False))


@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
@pytest.mark.parametrize("options", [{}, {"scaling": "channel"}, {"ln_before": True, "ln_after": True}], ids=str)
def test_the_output_alone_and_the_input_as_residual(cls, options):
    check(bottleneck(cls, **options), torch.float32, same=True, read=(0,))


@pytest.mark.parametrize("options", [{}, {"scaling": "learned"}, {"use_gating": True}, {"ln_before": True}], ids=str)
@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
def test_autocast(cls, options):
    module = bottleneck(cls, **options)
    x, residual = inputs()
    oracle = {f"out{i}": value for i, value in enumerate(copy.deepcopy(module).double()(x, residual))}
    x, residual = x.float(), residual.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = module(x, residual)
        accelerated(module)
        ours = module(x, residual)
        ours = tuple(value + 0 for value in ours)
    assert [o.dtype for o in ours] == [t.dtype for t in theirs] and fast() == 1
    names = list(oracle)
    assert_accurate(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), oracle)


@pytest.mark.parametrize("cls", [Adapter, ParallelAdapter])
def test_dropout_is_the_packages_own_stream(cls):
    module = bottleneck(cls, dropout=0.4, scaling=2.0)
    x, residual = (value.float() for value in inputs())
    accelerated(module)
    torch.manual_seed(3)
    output, _, up = module(x, residual)
    torch.manual_seed(3)
    assert torch.equal(module(x, residual)[0], output)
    torch.manual_seed(3)
    seed = dropout.draw_seed(x.device)
    dropped = dropout.dropout((up + 0).reshape(-1, D), seed, 0.4).view(x.shape)
    expected = dropped + residual if cls is Adapter else dropped
    torch.testing.assert_close(output, expected)
    module.eval()
    assert torch.equal(module(x, residual)[0], module(x, residual)[0])


def test_dropout_has_the_mean_and_the_variance_of_theirs():
    module = bottleneck(dropout=0.3)
    x, residual = (value.float() for value in inputs(shape=(1, 3, D)))

    def moments():
        with torch.no_grad():
            runs = torch.stack([module(x, residual)[0] for _ in range(3000)])
        return runs.mean(0), runs.var(0)

    up = (module.eval()(x, residual)[2] + 0).detach()
    module.train()
    accelerated(module)
    mean, variance = moments()
    assert fast() == 3000
    expected = up.square() * 0.3 / 0.7
    standard_error = (expected / 3000).sqrt()
    assert ((mean - residual - up).abs() <= 5 * standard_error + 1e-5).all()
    assert relative_error(variance, expected) < 0.1


def test_down_and_up_are_computed_by_the_library_when_somebody_reads_them():
    module = bottleneck()
    x, residual = (value.float() for value in inputs())
    _, down, up = module(x, residual)
    accelerated(module)
    calls = []
    forward = nn.Sequential.forward
    module.adapter_down.forward = lambda x: forward(module.adapter_down, x)  # a forward of its own is declined
    module(x, residual)
    assert reasons()
    del module.adapter_down.forward
    _, our_down, our_up = module(x, residual)
    assert isinstance(our_down, torch.Tensor) and isinstance(our_up, torch.Tensor) and not calls
    assert our_up.shape == up.shape and our_up.requires_grad and our_up.grad_fn is not None
    assert torch.equal(our_down, down) and torch.equal(our_up[1:], up[1:]) and torch.equal(torch.cat([our_up]), up)
    assert torch.equal(copy.deepcopy(our_up.detach()), up)


def test_what_is_read_too_late_raises():
    module = bottleneck()
    x, residual = (value.float() for value in inputs())
    accelerated(module)
    _, _, up = module(x, residual)
    with torch.no_grad():
        module.adapter_up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to before"):
        up.sum()


def test_code_that_passes_by_python_is_told():
    module = bottleneck()
    x, residual = (value.float() for value in inputs())
    accelerated(module)
    _, _, up = module(x, residual)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="cannot be used here"):
        Twice.apply(up)


def odd_activation(module):
    module.adapter_down[-1].f = nn.Mish()


def hooked_down(module):
    module.adapter_down.register_forward_hook(lambda m, i, out: 2 * out)


def hooked_activation(module):
    module.adapter_down[-1].f.register_forward_hook(lambda m, i, out: 2 * out)


def hooked_gradient(module):
    module.register_full_backward_hook(lambda m, grad_in, grad_out: None)


def odd_dropout(module):
    module.dropout = nn.AlphaDropout(0.0)


def other_linear(module):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.adapter_up.__class__ = Doubled


def stochastic_depth(module):
    module.DropPath = nn.Dropout(0.0)


@pytest.mark.parametrize(
    "change,words",
    [
        (odd_activation, "no activation Mish"),
        (hooked_down, "layers have hooks"),
        (hooked_activation, "no activation"),
        (hooked_gradient, "hooks on its gradient"),
        (odd_dropout, "AlphaDropout"),
        (other_linear, "not plain linear"),
        (stochastic_depth, "stochastic depth"),
    ],
)
def test_what_it_declines_is_the_library_to_the_bit(change, words):
    module = bottleneck()
    x, residual = (value.float() for value in inputs())
    x.requires_grad_()
    accelerated(module)
    assert type(module) is room.FusedAdapter
    change(module)
    ours = module(x, residual)
    module.__class__ = Adapter
    for our, their in zip(ours, module(x, residual), strict=True):
        assert torch.equal(our, their)
    assert any(words in reason for reason in reasons()), reasons()


@pytest.mark.parametrize(
    "options,words",
    [
        ({"phm_layer": True, "phm_dim": 1, "shared_phm_rule": False}, "PHM"),
        ({"non_linearity": "quick_gelu"}, "no activation QuickGELU"),
        ({"non_linearity": "relu6"}, "no activation ReLU6"),
    ],
)
def test_what_it_never_replaces_is_said(options, words):
    module = bottleneck(**options)
    (change,) = accelerated(module).changes
    assert type(module) is Adapter and change.now is None and words in change.reason


def test_transforms_go_to_the_library():
    module = bottleneck()
    x, residual = (value.float() for value in inputs())

    def loss(x):
        return module(x, residual)[0].square().sum()

    expected = torch.func.grad(loss)(x)
    accelerated(module)
    assert torch.equal(torch.func.grad(loss)(x), expected) and fast() == 0


def test_weights_of_another_dtype_raise_as_they_do_in_the_library():
    module, (x, residual) = bottleneck(), inputs(torch.bfloat16)
    accelerated(module)
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.bfloat16(), residual.bfloat16())
    assert reasons()


def test_torch_compile_without_a_graph_break():
    module = bottleneck(ln_before=True, scaling="channel")
    x, residual = (value.float() for value in inputs())
    accelerated(module)
    expected = [value + 0 for value in module(x, residual)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x, residual), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_draws_the_same_dropout():
    module = bottleneck(dropout=0.4)
    x, residual = (value.float() for value in inputs())
    accelerated(module)
    results = []
    for run in (module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        torch.manual_seed(7)
        out = run(x, residual)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    for direct, checkpointed in zip(*results, strict=True):
        assert torch.equal(direct, checkpointed)


# --- models -------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}


def bert(cls=transformers.BertModel, config=transformers.BertConfig, **options):
    return cls(config(**SMALL, max_position_embeddings=32, **options))


def make(family):
    torch.manual_seed(1)
    if family == "bert":
        model = bert()
    elif family == "roberta":
        model = bert(transformers.RobertaModel, transformers.RobertaConfig, pad_token_id=1)
    elif family == "distilbert":
        model = transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, vocab_size=50)
        )
    elif family == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0))
    elif family == "gpt2":
        model = transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
    elif family == "t5":
        model = transformers.T5Model(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=50)
        )
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
        config = transformers.BartConfig(d_model=32, vocab_size=50, max_position_embeddings=32, **heads, **sizes)
        model = transformers.BartModel(config)
    adapters.init(model)
    return model


FAMILIES = ["bert", "roberta", "distilbert", "llama", "gpt2", "t5", "bart"]


def batch(model):
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask} | (
        {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    )


def stir(model):
    for name, parameter in model.named_parameters():
        if ".adapters." in name or ".loras." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def model_outputs(model, given):
    out = model(**given)[0]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out.double().mul(direction(out)).sum(), list(named.values()), allow_unused=True)
    # a key's bias shifts all scores of a softmax alike: its gradient is rounding and nothing else
    found = {n: g for n, g in zip(named, gradients, strict=True) if g is not None and not n.endswith("key.bias")}
    return {"out": out} | found


def check_model(model, dtype=torch.float32, *, alike=True):
    model = stir(model).eval().to(dtype)
    given = batch(model)
    theirs = model_outputs(model, given)
    oracle = model_outputs(copy.deepcopy(model).double(), given)
    # attention is another room's; here it stays what it is
    changes = [change for change in room.plan(model) if change.now is not None]
    for change in changes:
        change.apply()
    assert_accurate(model_outputs(model, given), theirs, oracle)
    assert fast() + fast("lora_linear") + fast("lora_delta_") > 0
    for change in changes:
        change.revert()
    assert not any(type(m).__module__.startswith("lwft") for m in model.modules())
    again = model_outputs(model, given)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("config", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, config):
    model = make(family)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    check_model(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_in_bfloat16(family):
    model = make(family)
    model.add_adapter("a", config="double_seq_bn")
    model.train_adapter("a")
    check_model(model, torch.bfloat16)


@pytest.mark.parametrize(
    "setup",
    [
        composition.Fuse("a", "b"),
        composition.Stack("c", composition.Fuse("a", "b")),
        composition.Stack("a", "b"),
        composition.Parallel("a", "b"),
        composition.Stack("a", composition.Parallel("b", "c")),
        composition.Split("a", "b", splits=[4, 5]),
        composition.BatchSplit("a", "b", batch_sizes=[1, 3]),
        composition.Average("a", "b", weights=[0.3, 0.7]),
    ],
    ids=str,
)
def test_compositions(setup):
    model = make("bert")
    for name, config in (("a", "double_seq_bn"), ("b", "double_seq_bn"), ("c", "seq_bn")):
        model.add_adapter(name, config=config)
    if "Fuse" in str(setup):
        model.add_adapter_fusion(["a", "b"])
        model.train_adapter_fusion(setup)
    else:
        model.train_adapter(composition.Stack("a", "b", "c"))
        model.set_active_adapters(setup)
    check_model(model)


def test_gating_scores_and_fusion_attentions_are_theirs():
    model = make("bert")
    model.add_adapter("g", config=adapters.SeqBnConfig(use_gating=True, reduction_factor=4))
    model.set_active_adapters("g")
    stir(model).eval()
    given = batch(model)
    theirs = model(**given, output_adapter_gating_scores=True).adapter_gating_scores
    lwft_kernels.accelerate(model)
    ours = model(**given, output_adapter_gating_scores=True).adapter_gating_scores
    for layer, scores in theirs["g"].items():
        for place, value in scores.items():
            assert abs(ours["g"][layer][place] - value).max() < 1e-6
    assert fast() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family):
    model = make(family)
    model.add_adapter("l", config=LoRAConfig(r=3, alpha=5, intermediate_lora=True, output_lora=True))
    model.train_adapter("l")
    check_model(model)


def test_lora_and_a_bottleneck_at_once_and_in_bfloat16():
    model = make("bert")
    model.add_adapter("l", config="lora")
    model.add_adapter("a", config="seq_bn")
    model.train_adapter(composition.Stack("l", "a"))
    check_model(model, torch.bfloat16)


def lora_layer(**options):
    model = make("bert")
    model.add_adapter("l", config=LoRAConfig(**{"r": 3, "alpha": 5, **options}))
    model.train_adapter("l")
    return stir(model), model.encoder.layer[0].attention.self.query


def lora_reasons():
    return reasons("adapters LoRALinear")


def test_lora_dropout_is_the_packages_own_stream():
    model, layer = lora_layer(dropout=0.3)
    x = torch.randn(2, 3, 32)
    lwft_kernels.accelerate(model)
    assert type(layer) is room.FusedLoRALinear
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = dropout.dropout(x.view(-1, 32), dropout.draw_seed(x.device), 0.3).view(x.shape)
    a, b = layer.loras["l"].lora_A, layer.loras["l"].lora_B
    expected = nn.functional.linear(x, layer.weight, layer.bias) + dropped @ a.T @ b.T * (5 / 3)
    torch.testing.assert_close(out, expected)
    torch.manual_seed(3)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize(
    "options,prepare,words",
    [
        ({"use_gating": True}, None, "gated"),
        ({"composition_mode": "scale", "r": 1}, None, "IA3"),
        ({}, lambda model: model.encoder.layer[0].attention.self.query.loras["l"].register_forward_hook(
            lambda m, i, out: (out[0] * 2, out[1])), "hooks"),
        ({}, lambda model: (model.add_adapter("k", config="lora"),
                            stir(model).set_active_adapters(composition.Stack("l", "k"))), "several LoRAs"),
        ({}, lambda model: (model.add_adapter("k", config="lora"), stir(model).set_active_adapters(
            composition.BatchSplit("l", "k", batch_sizes=[2, 2]))), "BatchSplit"),
    ],
)  # fmt: skip
def test_lora_that_it_declines_is_the_library_to_the_bit(options, prepare, words):
    model, _ = lora_layer(**options)
    if prepare is not None:
        prepare(model)
    given = batch(model)
    model.eval()
    expected = model(**given)[0]
    changes = [change for change in room.plan(model) if change.now is not None]
    for change in changes:
        change.apply()
    assert torch.equal(model(**given)[0], expected) or "hooks" in words
    assert any(words in reason for reason in lora_reasons()), lora_reasons()


def test_merged_and_reset_and_switched_off():
    model, _ = lora_layer()
    model.eval()
    given = batch(model)
    with_lora = model(**given)[0]
    lwft_kernels.accelerate(model)
    model.merge_adapter("l")
    torch.testing.assert_close(model(**given)[0], with_lora, rtol=1e-4, atol=1e-5)
    model.reset_adapter()
    torch.testing.assert_close(model(**given)[0], with_lora, rtol=1e-4, atol=1e-5)
    model.set_active_adapters(None)
    assert (model(**given)[0] - with_lora).abs().max() > 1e-3


def test_gpt2s_merged_attention_matrices_are_left_with_a_reason():
    model = make("gpt2")
    model.add_adapter("l", config=LoRAConfig(r=3, intermediate_lora=True))
    report = lwft_kernels.explain(model)
    assert any("a LoRA of their own" in (change.reason or "") for change in report.changes)
    assert any(change.now == "lora_linear" for change in report.changes)


def test_report_undo_and_again():
    model = make("bert")
    model.add_adapter("a", config="seq_bn")
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    first = lwft_kernels.accelerate(model)
    assert [c.now for c in first.changes if c.was == "Adapter"] == ["adapter", "adapter"]
    second = lwft_kernels.accelerate(model)
    assert {c.reason for c in second.changes if "Adapter" in c.was} == {"replaced already"}
    assert list(model.state_dict()) == keys
    second.undo()
    assert any(type(m) is room.FusedAdapter for m in model.modules())
    first.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_adapters_of_other_classes_and_with_a_forward_of_their_own_are_left_alone():
    class Theirs(Adapter):
        pass

    module = bottleneck()
    module.__class__ = Theirs
    (change,) = accelerated(module).changes
    assert "not known" in change.reason and type(module) is Theirs
    module = bottleneck()
    module.forward = module.forward
    (change,) = accelerated(module).changes
    assert "somebody else" in change.reason and type(module) is Adapter


def test_saving_and_loading_and_copying(tmp_path):
    model = make("bert")
    model.add_adapter("a", config="seq_bn")
    model.set_active_adapters("a")
    stir(model).eval()
    given = batch(model)
    lwft_kernels.accelerate(model)
    expected = model(**given)[0]
    model.save_adapter(str(tmp_path), "a")
    assert torch.equal(copy.deepcopy(model)(**given)[0], expected)
    part = model.encoder.layer[0].output.adapters["a"]
    x = torch.randn(1, 2, 32)
    assert torch.equal(pickle.loads(pickle.dumps(part))(x, x)[0], part(x, x)[0])
    model.delete_adapter("a")
    model.load_adapter(str(tmp_path), load_as="a", set_active=True)
    lwft_kernels.accelerate(model)
    assert torch.equal(model.eval()(**given)[0], expected)


@pytest.mark.parametrize("original", list(room._REPLACEMENTS), ids=lambda c: c.__name__)
def test_drift_guard_knows_the_release_and_its_self_test_passes(original):
    upstream = room._upstream(original)
    assert drift.fingerprint(*upstream.functions) in upstream.known
    assert upstream.self_test() is None


@pytest.mark.parametrize(
    "original,change",
    [(Adapter, "scaling"), (ParallelAdapter, "scaling"), (lora.LoRALinearTorch, "lora")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_self_test_finds_a_difference(original, change, monkeypatch):
    monkeypatch.setattr(room, "_branch", lambda m, parts, x, r, p: x * 1.0)
    monkeypatch.setattr(room.LF, "lora_linear", lambda x, w, b, *a, **k: nn.functional.linear(x, w, b))
    assert room._upstream(original).self_test() is not None
