"""LowRankLinear and LoRALinear: what they replace, their state, and how they travel."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from ddp import assert_averages_gradients
from torch import nn

import lwft_kernels
from lwft_kernels.nn import LoRALinear, LowRankLinear

pytestmark = pytest.mark.usefixtures("native")


def lora_layer(bias=True, dtype=torch.float32, **options):
    """One whose branch does something."""
    layer = LoRALinear.from_linear(nn.Linear(24, 40, bias=bias, dtype=dtype), rank=4, lora_alpha=8, **options)
    nn.init.normal_(layer.lora_b)
    return layer.eval()


# ---- LowRankLinear ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)])
def test_from_linear_is_exact_at_full_rank(sizes, bias):
    linear = nn.Linear(*sizes, bias=bias)
    layer = LowRankLinear.from_linear(linear, 24)
    x = torch.randn(3, 5, sizes[0])
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)
    assert layer.training == linear.training and linear.weight.requires_grad
    assert sorted(layer.state_dict()) == (["bias"] if bias else []) + ["down_weight", "up_weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_from_linear_is_the_nearest_of_its_rank(dtype):
    linear = nn.Linear(30, 20, dtype=dtype).eval()
    layer = LowRankLinear.from_linear(linear, 5)
    assert layer.down_weight.dtype == dtype and not layer.training
    values = torch.linalg.svdvals(linear.weight.double())
    distance = (layer.up_weight.double() @ layer.down_weight.double() - linear.weight.double()).norm()
    assert distance / values[5:].norm() < (1 + 1e-9 if dtype == torch.float64 else 1.01)
    torch.testing.assert_close(layer.down_weight.norm(), layer.up_weight.norm())


def test_low_rank_linear_starts_as_nn_linear_does():
    layer, linear = LowRankLinear(300, 200, rank=16), nn.Linear(300, 200)
    product = layer.up_weight @ layer.down_weight
    assert 0.8 < product.std() / linear.weight.std() < 1.25
    assert 0.8 < layer.bias.std() / linear.bias.std() < 1.25


@pytest.mark.parametrize("rank,error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_ranks(rank, error):
    for make in (
        lambda: LowRankLinear(24, 40, rank),
        lambda: LoRALinear(24, 40, rank),
        lambda: LowRankLinear.from_linear(nn.Linear(24, 40), rank),
        lambda: LoRALinear.from_linear(nn.Linear(24, 40), rank),
    ):
        with pytest.raises(error, match="rank must be"):
            make()


def test_what_the_constructors_refuse():
    with pytest.raises(ValueError, match="rank must be at most 24"):
        LowRankLinear.from_linear(nn.Linear(24, 40), 25)
    for cls in (LowRankLinear, LoRALinear):
        with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv1d"):
            cls.from_linear(nn.Conv1d(3, 4, 1), 2)
        with pytest.raises(TypeError, match=r"must compute what nn\.Linear does, not be a LoRALinear"):
            cls.from_linear(LoRALinear(24, 40), 2)
    with pytest.raises(ValueError, match="lora_dropout must be a probability"):
        LoRALinear(24, 40, lora_dropout=1.5)
    with pytest.raises(ValueError, match="lora_alpha must be finite"):
        LoRALinear(24, 40, lora_alpha=float("nan"))


# ---- LoRALinear ----


def test_lora_linear_starts_as_the_linear_it_was():
    linear = nn.Linear(24, 40)
    layer = LoRALinear.from_linear(linear, rank=4, lora_alpha=8, lora_dropout=0.1)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert isinstance(layer, nn.Linear) and layer.scale == 2.0
    assert "rank=4, lora_alpha=8, lora_dropout=0.1" in repr(layer)


def test_lora_linear_computes_the_formula():
    layer = lora_layer()
    x = torch.randn(2, 5, 24)
    branch = 2.0 * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + branch)
    assert lwft_kernels.stats()["lora_linear"]["fast"] == 1


def test_dropout_in_training_only():
    layer = lora_layer(lora_dropout=0.5)
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_adapters_beside_16_bit_weights_are_float32():
    layer = LoRALinear(24, 40, rank=4, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(x).dtype == torch.bfloat16
    assert LoRALinear(24, 40, dtype=torch.float64).lora_a.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    layer = lora_layer(dtype=dtype)
    x = torch.randn(3, 24, dtype=dtype)
    before, weight, bits = layer(x), layer.weight, layer.weight.detach().clone()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    merged = (bits.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()).to(dtype)
    torch.testing.assert_close(layer.weight, merged)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(layer(x), before, atol=tolerance, rtol=tolerance)
    assert torch.equal(weight, bits), "a shared weight must not change"
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_a", "lora_b"]
    assert layer.state_dict().keys() == state.keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name

    layer.unmerge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(layer.weight, bits) and torch.equal(layer(x), before)


def test_merged_layers_travel_too():
    layer = lora_layer()
    x = torch.randn(3, 24)
    before = layer(x)
    layer.merge()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.merged
        torch.testing.assert_close(twin(x), before)
        twin.unmerge()
        assert torch.equal(twin(x), before) and torch.equal(twin.weight, layer.unmerged_weight)
    twin = copy.deepcopy(layer).double()
    twin.unmerge()
    assert twin.weight.dtype == torch.float64 and isinstance(twin.weight, nn.Parameter)
    assert not twin.weight.requires_grad
    twin = copy.deepcopy(layer)
    twin.load_state_dict(lora_layer().state_dict())
    assert not twin.merged


@pytest.mark.parametrize("make", [lora_layer, lambda: LowRankLinear(24, 40, 4)])
def test_copies_and_files(make):
    layer = make()
    x = torch.randn(3, 24)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), layer(x))


def test_loading_an_nn_linear_and_a_loralib_state():
    linear, layer = nn.Linear(24, 40), lora_layer()
    missing = layer.load_state_dict(linear.state_dict(), strict=False)
    assert missing.missing_keys == ["lora_a", "lora_b"] and not missing.unexpected_keys
    state = layer.state_dict()
    theirs = {name.replace("lora_a", "lora_A").replace("lora_b", "lora_B"): value for name, value in state.items()}
    twin = nn.Sequential(lora_layer())
    twin.load_state_dict({f"0.{name}": value for name, value in theirs.items()})
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), layer(x))


def test_a_step_of_training_lowers_the_loss():
    model = nn.Sequential(LoRALinear(24, 32, 4, lora_dropout=0.1), nn.ReLU(), LowRankLinear(32, 3, 2))
    frozen = model[0].weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    x, target = torch.randn(64, 24), torch.randint(0, 3, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and torch.equal(model[0].weight, frozen)


def test_trains_under_ddp(tmp_path):
    module = "nn.Sequential(lwft.LoRALinear(32, 24, 4), lwft.LowRankLinear(24, 32, 4))"
    assert_averages_gradients(module, 32, tmp_path / "store")
