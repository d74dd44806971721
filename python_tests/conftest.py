"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from environment import HAS_ADAPTERS

# Read when a Triton kernel is defined. Where there is a GPU the same tests run the kernels on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import lwft_kernels
from lwft_kernels import backend
from lwft_kernels.integrations import reached

# Where AdapterHub is not, its tests are not there either, rather than skipped; where it is, the Makefile names them.
if not HAS_ADAPTERS:
    collect_ignore = ["integrations/test_adapters.py", "integrations/test_transformers4.py"]


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """The same random numbers whatever ran before, and counts of this test alone."""
    torch.manual_seed(0)
    lwft_kernels.reset_stats()
    reached._classes.clear()  # which classes torch.compile has traced


@pytest.fixture(autouse=True)
def kernels_for_small_calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests take small shapes and mean the kernels; with `small_calls` such calls are left to PyTorch."""
    monkeypatch.setattr(backend, "leave_small_calls", "small_calls" in request.fixturenames)


@pytest.fixture
def small_calls() -> None:
    """Small calls are left to PyTorch's own operations, as they are for a user."""


@pytest.fixture
def native() -> Iterator[None]:
    """The compiled kernels or a failure: a test of them must not pass on the reference."""
    assert backend.library_error is None, backend.library_error
    with lwft_kernels.use_backend("native"):
        yield


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device whose tensors Triton's kernels take: a GPU, or the CPU under Triton's interpreter."""
    assert backend.triton_error is None, backend.triton_error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        from triton_interpreter import repair_bfloat16

        repair_bfloat16()
    monkeypatch.setenv("LWFT_AUTOTUNE", "0")
    with lwft_kernels.use_backend("triton"):
        yield device


@pytest.fixture
def without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate` leaves the sums and norms of transformers' blocks: a test of another room counts its own calls."""
    accelerate = sys.modules["lwft_kernels.integrations.accelerate"]
    rooms = [room for room in accelerate._ROOMS if room[0] != "transformers_blocks"]
    monkeypatch.setattr(accelerate, "_ROOMS", rooms)
