"""Every kernel, in every configuration that may be chosen, compiles, and well."""

from __future__ import annotations

import os

import pytest

from lwft_bench import kernels

# The target and the floor: ten seconds a room and card. LWFT_EVERY_CARD=1 for the others, as `lwft-bench kernels` does.
CARDS = ["sm_90", "sm_80", *(["sm_100", "gfx942"] if os.environ.get("LWFT_EVERY_CARD") == "1" else [])]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("room", kernels.ROOMS)
def test_every_kernel_compiles_well(room, card):
    records = list(kernels.compiled([room], [card]))
    assert records
    faults = [f"{r['call']}: {r['kernel']} {r['configuration']}: {fault}" for r in records for fault in r["faults"]]
    assert not faults, "\n".join(faults)
    if card == "sm_90" and room != "norm":  # the products of Hopper's own matrix units
        assert any("HGMMA" in record["matrix_instructions"] for record in records)
