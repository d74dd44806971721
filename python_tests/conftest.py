"""Fixtures of the whole suite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # `import oracle` from every room
sys.path.append(str(HERE.parent / "build"))  # where `make test` leaves lwft_harness

import lwft_kernels
from lwft_kernels import backend


@pytest.fixture(autouse=True)
def fresh_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers whatever ran before, and counts of this test alone."""
    torch.manual_seed(0)
    lwft_kernels.reset_stats()
    yield


@pytest.fixture
def native() -> Iterator[None]:
    """The compiled kernels or a failure: a test of them must not pass on the reference."""
    assert backend.library_error is None, backend.library_error
    with lwft_kernels.use_backend("native"):
        yield
