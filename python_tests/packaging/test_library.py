"""What _C.so asks of the machine: no Python, torch's stable ABI only, no instruction that was not chosen."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import lwft_kernels

LIBRARY = Path(lwft_kernels.__file__).with_name("_C.so")
LEVEL_OBJECTS = Path(__file__).parents[2] / "build" / "isa"  # <level>/<library>.o: cmake/cpu.cmake

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")

# Beside torch's stable ABI: the C and C++ run-time libraries, whose symbols carry a version, and what the
# linker itself puts in. std:: is there without a version where libtorch exports a copy of the template, too.
STABLE_ABI = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
RUN_TIME = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+|_ITM_\w+|__gmon_start__|_ZNK?[RO]?(St|Ss|S[abiod]).*")


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, name) of each symbol nm lists."""
    lines = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(letter, name) for letter, name in (line.split()[-2:] for line in lines if line.split())]


def test_no_python_in_the_library():
    names = [name for _, name in symbols(LIBRARY, "-D")]
    assert names
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


def test_only_the_stable_abi_is_asked_of_torch():
    wanted = [name for _, name in symbols(LIBRARY, "-D", "--undefined-only")]
    assert any(STABLE_ABI.fullmatch(name) for name in wanted)
    others = [name for name in wanted if not STABLE_ABI.fullmatch(name) and not RUN_TIME.fullmatch(name)]
    assert not others


def test_every_torch_library_is_found_by_name():
    """torch has loaded its libraries already; a path into one environment's torch would tie _C.so to it."""
    if shutil.which("readelf") is None:
        pytest.skip("needs binutils")
    dynamic = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if re.match(r"libpython|libtorch_python|libtorch_cuda|libcuda", name)]


def test_cuda_stream_is_found_where_torch_has_cuda():
    letters = {name: letter for letter, name in symbols(LIBRARY, "-D")}
    stream = letters.get("aoti_torch_get_current_cuda_stream")
    if stream is None:
        pytest.skip("built without CUDA")
    assert stream == "w"  # weak: a CPU build of torch does not have it
    assert bool(ctypes.CDLL(str(LIBRARY)).lwft_has_stream()) == (torch.version.cuda is not None)


@pytest.mark.skipif(not LEVEL_OBJECTS.is_dir(), reason="not run beside the build directory")
def test_a_level_shows_its_own_names_only():
    """Else the linker could give all levels one level's copy of a shared inline function, AVX-512 and all."""
    objects = sorted(LEVEL_OBJECTS.glob("*/*.o"))
    assert objects
    for path in objects:
        shown = [name for _, name in symbols(path, "--extern-only", "--defined-only")]
        assert shown, path
        level = path.parent.name
        own = f"_ZN4lwft{len(level)}{level}"  # as the compiler spells lwft::<level>
        assert not [name for name in shown if not name.startswith(own)], path


@pytest.mark.skipif(not (LEVEL_OBJECTS / "avx2").is_dir(), reason="not run beside an x86-64 build directory")
def test_the_baseline_has_no_wider_instructions():
    code = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", LEVEL_OBJECTS / "baseline" / "kernels.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "xmm" in code
    assert not re.findall(r"%[yz]mm\d+|\bvfmadd\w+", code)[:10]
