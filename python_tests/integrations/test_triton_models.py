"""Whole models on Triton's kernels: what `accelerate` puts into them, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_accurate
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import BATCH, BUILDERS, LENGTH, VOCABULARY

import lwft_kernels


def step(model, ids, mask):
    """Loss and the gradients of what trains."""
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **grads}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["query", "value", "dense"]),  # padding, residual and norm
        ("llama", ["q_proj", "o_proj", "down_proj"]),  # causal, grouped heads
        ("gemma2", ["q_proj"]),  # window, softcap
        ("t5", ["q", "v"]),  # a bias with a gradient
    ],
)
def test_a_step_of_lora(triton_device, family, targets):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    check(triton_device, family, get_peft_model(BUILDERS[family](), config), {"attention", "lora_linear"})


def test_a_step_of_prefix_tuning(triton_device):
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    check(triton_device, "llama", get_peft_model(BUILDERS["llama"](), config), {"attention"})


def check(device, family, model, ops):
    ids = torch.randint(2, VOCABULARY, (BATCH, LENGTH), device=device)
    mask = torch.ones_like(ids)
    if family != "gemma2":  # whose own attention gives NaN for a padded query whose window is all padding
        mask[1, LENGTH - 4 :] = 0
    model = model.to(device).eval()
    oracle = step(copy.deepcopy(model).double(), ids, mask)
    eager = step(copy.deepcopy(model), ids, mask)
    lwft_kernels.accelerate(model)
    lwft_kernels.reset_stats()
    ours = step(model, ids, mask)
    counts = lwft_kernels.stats()
    assert ops <= counts.keys(), counts
    assert all(count["fast"] and not count["declined"] for count in counts.values()), counts
    assert_accurate(ours, eager, oracle)
