"""csrc/common/cpu/dispatch.h: the best level is used, LWFT_CPU_ISA asks for a lower one."""

import os
import subprocess
import sys

import lwft_harness
import pytest

LEVELS = lwft_harness.levels()


def choose(wish: str | None) -> tuple[str, str]:
    """The level and the warning of a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "LWFT_CPU_ISA"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if wish is not None:
        environment["LWFT_CPU_ISA"] = wish
    code = "import lwft_harness as h; print(h.chosen_level()); print(h.level_warning())"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    level, warning = result.stdout.splitlines()
    return level, warning


def test_levels_rise_from_the_baseline() -> None:
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    assert LEVELS[0] == "baseline"
    assert [name for name in order if name in LEVELS] == LEVELS


@pytest.mark.parametrize("wish", [None, ""])
def test_the_best_is_the_default(wish: str | None) -> None:
    assert choose(wish) == (LEVELS[-1], "")


@pytest.mark.parametrize("wish", LEVELS)
def test_a_lower_level_can_be_asked_for(wish: str) -> None:
    assert choose(wish) == (wish, "")


def test_an_unknown_level_is_ignored_with_a_reason() -> None:
    level, warning = choose("avx1024")
    assert level == LEVELS[-1]
    assert warning.startswith("LWFT_CPU_ISA=avx1024 ignored: no such level in this build; using ")
