"""AddLayerNorm: what it replaces, its state, and how it travels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from ddp import assert_averages_gradients

import lwft_kernels

pytestmark = pytest.mark.usefixtures("native")


def test_module_replaces_layer_norm():
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    module = lwft_kernels.nn.AddLayerNorm(16, dropout=0.5)
    module.load_state_dict(norm.state_dict())
    module.eval()
    x, u = torch.randn(3, 16), torch.randn(3, 16)
    torch.testing.assert_close(module(x, u), norm(x + u))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, u), module(x, u))


def test_trains_under_ddp(tmp_path):
    assert_averages_gradients("Calls(lwft.AddLayerNorm(32), lambda norm, x: norm(x, x.sin()))", 32, tmp_path / "store")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((-16,), "normalized_shape must be at least 1"),
        (((4, 4),), "one dimension"),
        ((16,), "dropout must be a probability"),
    ],
)
def test_constructor_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        lwft_kernels.nn.AddLayerNorm(*arguments, dropout=1.5)
