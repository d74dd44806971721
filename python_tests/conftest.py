"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

import lwft_kernels
from lwft_kernels import backend

# AdapterHub needs another transformers than the rest: the Makefile has an environment for it, and names there what must
# run. Where it is not, its tests are not there either, rather than skipped.
if find_spec("adapters") is None:
    collect_ignore = ["integrations/test_adapters.py", "integrations/test_transformers4.py"]


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """The same random numbers whatever ran before, and counts of this test alone."""
    torch.manual_seed(0)
    lwft_kernels.reset_stats()


@pytest.fixture
def native() -> Iterator[None]:
    """The compiled kernels or a failure: a test of them must not pass on the reference."""
    assert backend.library_error is None, backend.library_error
    with lwft_kernels.use_backend("native"):
        yield
