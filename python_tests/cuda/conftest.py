"""Fixtures of the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import lwft_harness
import pytest


@pytest.fixture(autouse=True)
def default_mode() -> Iterator[None]:
    yield
    lwft_harness.set_cuda_emulation("round_robin", False)
