"""Accelerated models under DDP, FSDP2 and tensor parallelism, two processes each: distributed.py has the scenarios."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("distributed", Path(__file__).with_name("distributed.py"))
distributed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distributed)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return distributed.run_all(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in distributed.SCENARIOS])
def test_two_processes(outcomes, scenario):
    for rank, failure in enumerate(outcomes[scenario]):
        assert failure is None, f"process {rank}:\n{failure}"
