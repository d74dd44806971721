"""No kernel reads or writes past the end of a tensor: every tensor ends at a page that may not be touched.

Under Triton's interpreter, which reads and writes through plain pointers. A kernel that goes too far ends the process.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded import guarded
from quantized_weights import FORMATS, make_weight
from torch import Tensor

from lwft_kernels import functional as LF
from lwft_kernels.lowrank import triton_op


@pytest.fixture
def walls(triton_device, monkeypatch):
    """What the ops allocate is guarded too."""
    if triton_device.type != "cpu":
        pytest.skip("for the interpreter's pointers; on a card compute-sanitizer looks")
    plain = Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        return guarded(plain(self, *shape, dtype=dtype, device=device))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def tensors(*shapes, dtype=torch.float32):
    return [guarded(torch.randn(shape).to(dtype)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_layer_norm(walls, dtype):
    x, u, weight, bias = tensors((3, 77), (3, 77), (77,), (77,), dtype=dtype)
    LF.add_layer_norm(x, u, weight, bias, dropout_p=0.1).sum().backward()


@pytest.mark.parametrize("queries,group", [(37, 2), (1, 1)])
@pytest.mark.parametrize("rule", [{}, {"causal": True, "dropout_p": 0.1}, {"window": 20, "softcap": 3.0}], ids=str)
def test_attention(walls, queries, group, rule):
    q, k, v, bias, prefix_k, prefix_v = tensors(
        (2, 2, queries, 24), (2, 2 // group, 75, 24), (2, 2 // group, 75, 24), (2, 1, queries, 75),
        (1, 2 // group, 5, 24), (1, 2 // group, 5, 24),
    )  # fmt: skip
    LF.attention(q, k, v, **rule).sum().backward()
    mask, lengths = guarded(torch.rand(1, 2, queries, 75) > 0.2), guarded(torch.tensor([75, 31]))
    for lines in (bias, bias[:, :, :1], bias[..., :1]):
        lines = guarded(lines).requires_grad_()
        LF.attention(
            q, k, v, bias=lines, mask=mask, lengths=lengths, prefix_k=prefix_k, prefix_v=prefix_v, **rule
        ).sum().backward()  # fmt: skip


@pytest.mark.parametrize("depth", [0, 1 << 30], ids=["cublas", "fused"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_low_rank_products(walls, monkeypatch, depth, adapter, stacked):
    monkeypatch.setattr(triton_op, "_CUBLAS_DEPTH", depth)
    x, weight, bias, base_out = tensors((35, 77), (139, 77), (139,), (35, 139), dtype=torch.bfloat16)
    stack = (2,) if stacked else ()
    a, b = tensors((*stack, 5, 77), (*stack, 139, 5), dtype=adapter)
    options = {"adapter_index": guarded(torch.arange(35) % 3 - 1)} if stacked else {}
    LF.lora_linear(x, weight, bias, a, b, dropout_p=0.1, **options).sum().backward()
    LF.lora_delta_(guarded(base_out), x, a, b, dropout_p=0.1, **options).sum().backward()
    if not stacked:
        bias = guarded(bias.to(adapter)).requires_grad_()
        LF.low_rank_linear(x, a, b, bias).sum().backward()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [3, 70])
def test_quantized_linear(walls, kind, tokens):
    weight = make_weight(kind, 67, 70)
    held = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    weight = type(weight)(**{n: guarded(v) if isinstance(v, Tensor) else v for n, v in held.items()})
    x, bias = tensors((tokens, 70), (67,))
    LF.quantized_linear(x, weight, bias).sum().backward()


@pytest.mark.parametrize("too_far", [0, 1])
def test_a_wall_ends_the_process(too_far):
    """The test of the test: one element more is not survived."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, here / "past_the_wall.py", str(too_far)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGSEGV if too_far else 0), done.stderr
