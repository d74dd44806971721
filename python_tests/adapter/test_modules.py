"""BottleneckAdapter: the module around `adapter`, alone and under DistributedDataParallel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from ddp import assert_averages_gradients

import lwft_kernels
from lwft_kernels.nn import BottleneckAdapter

pytestmark = pytest.mark.usefixtures("native")


def random_adapter(*args, **options):
    module = BottleneckAdapter(*args, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def by_hand(module, x, residual):
    hidden = F.silu(module.down(module.norm(x)))
    return residual + module.scale * module.up(hidden)


def test_is_the_formula_with_its_children():
    module = random_adapter(20, 6, "swish", layer_norm=True, eps=1e-4, scale=0.3)
    x, residual = torch.randn(2, 7, 20), torch.randn(2, 7, 20)
    torch.testing.assert_close(module(x), by_hand(module, x, x))
    torch.testing.assert_close(module(x, residual), by_hand(module, x, residual))
    assert lwft_kernels.stats()["adapter"]["fast"] == 2


@pytest.mark.parametrize("layer_norm", [False, True])
def test_starts_as_the_identity(layer_norm):
    module = BottleneckAdapter(20, 6, layer_norm=layer_norm)
    x = torch.randn(5, 20)
    assert torch.equal(module(x), x)
    module(x).square().sum().backward()
    assert module.up.weight.grad.abs().sum() > 0  # and it can leave it
    torch.nn.init.ones_(module.up.weight)
    module.reset_parameters()
    assert torch.equal(module(x), x)


def test_without_residual():
    module = random_adapter(8, 3, "identity", residual=False, bias=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(module(x), x @ module.down.weight.T @ module.up.weight.T)
    with pytest.raises(ValueError, match="residual=False"):
        module(x, x)


def test_state_dict_keys():
    keys = ["down.weight", "down.bias", "up.weight", "up.bias"]
    assert sorted(BottleneckAdapter(8, 3).state_dict()) == sorted(keys)
    assert sorted(BottleneckAdapter(8, 3, bias=False).state_dict()) == ["down.weight", "up.weight"]
    with_norm = BottleneckAdapter(8, 3, layer_norm=True).state_dict()
    assert sorted(with_norm) == sorted([*keys, "norm.weight", "norm.bias"])


def test_copies_and_pickles():
    module = random_adapter(16, 4, "tanh", layer_norm=True, scale=2.0)
    x = torch.randn(3, 16)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    other = BottleneckAdapter(16, 4, "tanh", layer_norm=True, scale=2.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)


def test_dropout_only_in_training():
    module = random_adapter(64, 4, dropout=0.5)
    x = torch.randn(10, 64)
    assert ((module(x) - x) == 0).double().mean() > 0.3
    module.eval()
    assert torch.equal(module(x), module(x))
    assert ((module(x) - x) == 0).double().mean() < 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_moves_to_another_dtype(dtype):
    assert BottleneckAdapter(8, 3, dtype=dtype).up.weight.dtype == dtype
    module = random_adapter(8, 3, layer_norm=True).to(dtype)
    assert module(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_says_what_it_is():
    assert repr(BottleneckAdapter(8, 3, "swish", scale=0.5)).startswith(
        "BottleneckAdapter(\n  8, 3, activation=silu, scale=0.5, dropout=0.0, residual=True\n"
    )


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"model_dim": 0}, ValueError, "model_dim must be at least 1"),
        ({"bottleneck": 2.5}, TypeError, "bottleneck must be an int"),
        ({"activation": "softmax"}, ValueError, "activation must be one of"),
        ({"dropout": 2}, ValueError, "dropout must be a probability"),
        ({"scale": "large"}, TypeError, "scale must be a number"),
    ],
)
def test_constructor_errors(change, error, words):
    with pytest.raises(error, match=f"BottleneckAdapter: {words}"):
        BottleneckAdapter(**{"model_dim": 8, "bottleneck": 3, **change})


def test_trains_under_ddp(tmp_path):
    assert_averages_gradients('lwft.BottleneckAdapter(32, 8, "gelu", layer_norm=True)', 32, tmp_path / "store")
