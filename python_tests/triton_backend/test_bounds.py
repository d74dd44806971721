"""No kernel reads or writes past the end of a tensor: every tensor ends at a page that may not be touched.

Under Triton's interpreter, which reads and writes through plain pointers. A kernel that goes too far ends the process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded import guarded
from torch import Tensor

from lwft_kernels import functional as LF


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


@pytest.mark.parametrize("too_far", [0, 1])
def test_a_wall_ends_the_process(too_far):
    """The test of the test: one element more is not survived."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, here / "past_the_wall.py", str(too_far)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGSEGV if too_far else 0), done.stderr
