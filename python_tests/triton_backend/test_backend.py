"""Who serves a call: the choice by hand, ops without a library, forward and backward of different backends."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import lwft_kernels
from lwft_kernels import backend, registration
from lwft_kernels import functional as LF
from lwft_kernels.adapter import autograd as adapter
from lwft_kernels.attention import autograd as attention
from lwft_kernels.lowrank import autograd as lowrank
from lwft_kernels.norm import autograd as norm

FAKES = {
    "adapter_forward": adapter._forward_fake,
    "adapter_backward": adapter._backward_fake,
    "attention_forward": attention._forward_fake,
    "attention_backward": attention._backward_fake,
    "add_layer_norm_forward": norm._forward_fake,
    "add_layer_norm_backward": norm._backward_fake,
    "low_rank_linear_forward": lowrank._low_rank_forward_fake,
    "low_rank_linear_backward": lowrank._low_rank_backward_fake,
    "lora_linear_forward": lowrank._lora_linear_forward_fake,
    "lora_linear_backward": lowrank._lora_linear_backward_fake,
    "lora_delta_forward": lowrank._lora_delta_forward_fake,
    "lora_delta_backward": lowrank._lora_delta_backward_fake,
    "lora_delta_forward_": lowrank._lora_delta_in_place_fake,
}


def test_every_op_has_triton_kernels_of_its_own_signature():
    """Without the library an op is defined from its fake, and Triton's functions are called with its arguments."""
    assert FAKES.keys() <= registration._triton_kernels.keys()
    for name, fake in FAKES.items():
        mutates = ("base_out",) if name.endswith("_") else ()
        inferred = torch._C.parse_schema(f"lwft::{name}" + torch.library.infer_schema(fake, mutates_args=mutates))
        compiled = getattr(torch.ops.lwft, name).default._schema
        assert [(a.name, str(a.type).replace("SymInt", "int")) for a in inferred.arguments] == [
            (a.name, str(a.type)) for a in compiled.arguments
        ]
        assert [str(r.type) for r in inferred.returns] == [str(r.type) for r in compiled.returns]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lwft::{name}", "CUDA")


@pytest.mark.parametrize("name", FAKES)
def test_the_functions_take_the_arguments_of_the_op(name):
    fake = FAKES[name]
    room = fake.__module__.split(".")[1]
    module = __import__(f"lwft_kernels.{room}.triton_op", fromlist=[name])
    assert list(inspect.signature(getattr(module, name)).parameters) == list(inspect.signature(fake).parameters)


def test_forward_and_backward_may_be_of_different_backends(triton_device):
    """What forward keeps is the same: a model may be moved, or the backend changed, between the two."""
    if triton_device.type != "cpu":
        pytest.skip("the compiled kernels run on the CPU")
    x, u = (torch.randn(5, 70, requires_grad=True) for _ in range(2))
    weight = torch.randn(70, requires_grad=True)
    found = {}
    for first in ("native", "triton"):
        for second in ("native", "triton"):
            torch.manual_seed(3)
            with lwft_kernels.use_backend(first):
                out = LF.add_layer_norm(x, u, weight, dropout_p=0.2)
            with lwft_kernels.use_backend(second):
                found[first, second] = torch.autograd.grad(out.square().sum(), (x, u, weight))
    for grads in found.values():
        for grad, expected in zip(grads, found["native", "native"], strict=True):
            torch.testing.assert_close(grad, expected)


def test_the_cpu_has_no_triton_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(3, 4)
    with (
        lwft_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' was asked for, but Triton's kernels do not run on the CPU"),
    ):
        LF.add_layer_norm(x, x)


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backend, "triton_error", "Triton is not installed: pip install 'triton>=3.6'")
    assert "pip install" in backend.why_not_triton(torch.device("cuda"))


@pytest.mark.parametrize("capability,served", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_implementation_of_a_gpu(monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert backend.implementation("attention", device) == ("triton" if served else "reference")
    assert (backend.why_not("attention", device) is None) == served
    assert served or "compute capability 8.0" in backend.why_not("attention", device)
    assert backend.implementation("attention", torch.device("cpu")) == "native"


def test_ops_and_reference_without_the_library():
    """As after an install that could not build: the ops are there, and on the CPU the reference serves."""
    code = """
import pathlib, torch
real = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "_C.so" and real(self)
import lwft_kernels
from lwft_kernels import functional as LF

x = torch.randn(4, 8, requires_grad=True)
LF.add_layer_norm(x, x).sum().backward()
LF.attention(*(torch.randn(1, 2, 3, 8) for _ in range(3)))
counts = lwft_kernels.stats()
assert counts["add_layer_norm"]["fast"] == 0 and "is not there" in str(counts), counts
assert torch._C._dispatch_has_kernel_for_dispatch_key("lwft::attention_forward", "CUDA")
x = torch.empty(2, 3, device="meta")
assert torch.ops.lwft.add_layer_norm_forward(x, x, None, None, None, 1e-5, 0.0)[0].shape == (2, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
