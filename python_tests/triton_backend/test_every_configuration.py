"""Every kernel, in every configuration that may be chosen, compiles, and well."""

from __future__ import annotations

import pytest

from lwft_bench import kernels


# The cards that the kernels are made for; `lwft-bench kernels` knows more.
@pytest.mark.parametrize("card", ["sm_90", "sm_100", "sm_80", "gfx942"])
@pytest.mark.parametrize("room", kernels.ROOMS)
def test_every_kernel_compiles_well(room, card):
    records = list(kernels.compiled([room], [card]))
    assert records
    faults = [f"{r['call']}: {r['kernel']} {r['configuration']}: {fault}" for r in records for fault in r["faults"]]
    assert not faults, "\n".join(faults)
    if card == "sm_90" and room != "norm":  # the products of Hopper's own matrix units
        assert any("HGMMA" in record["matrix_instructions"] for record in records)
