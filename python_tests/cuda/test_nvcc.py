"""What nvcc makes of the CUDA kernels beside the committed table: no GPU needed, only the toolkit."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import cuda_objects
import pytest
from cuda_objects import Kernel

_WHY_NOT = cuda_objects.why_not()
needs_nvcc = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))

KERNEL = Kernel("a.cu", "kernel<float>", "sm_90", 128, 128, 1024, 0, 0, 0, 0, "HMMA LDSM")


@needs_nvcc
def test_no_kernel_is_worse_than_in_the_table():
    """No local memory, no sum by atomics; the instructions that are meant; every kernel known, none without a row.

    What changed for good reason: `python python_tests/cuda_objects.py --write`, and commit the table.
    """
    release, table = cuda_objects.read_table()
    if release != cuda_objects.nvcc_version():
        pytest.skip(f"the table is of nvcc {release}, this one is {cuda_objects.nvcc_version()}")
    found = cuda_objects.kernels()
    print(*cuda_objects.changes(found, table), sep="\n")
    complaints = cuda_objects.complaints(found, table)
    assert not complaints, "\n".join(complaints)


@needs_nvcc
def test_products_of_matrices_take_their_operands_from_shared_memory():
    """Wherever the tensor cores multiply, ldmatrix loads for them what asynchronous copies have brought."""
    products = [kernel for kernel in cuda_objects.kernels() if "HMMA" in kernel.instructions]
    assert products
    for kernel in products:
        assert {"LDSM", "LDGSTS"} <= set(kernel.instructions.split()), kernel


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, []),
        ({"registers": 127}, []),
        ({"registers": 129}, ["sm_90 takes 129 registers, 1 more than before: room for 3 blocks of 128 threads"]),
        ({"threads": 256, "registers": 128}, ["room for 2 blocks of 256"]),
        ({"stack": 8, "local": 2}, ["uses local memory: 8 bytes, 2 loads and stores"]),
        ({"float_atomics": 1}, ["by atomics"]),
        ({"narrow": 3}, ["an element of memory alone: 3 times"]),
        ({"static_shared": 2048}, ["1024 bytes of static shared memory more"]),
        ({"instructions": "LDSM STG.128"}, ["has lost its HMMA"]),
        ({"kernel": "other"}, ["other on sm_90 is not in the table", "kernel<float> on sm_90 is in the table only"]),
        ({"architecture": "sm_80"}, ["kernel<float> on sm_80 is not in the table"]),
    ],
    ids=str,
)
def test_what_is_worse_is_told(change, words):
    complaints = cuda_objects.complaints([replace(KERNEL, **change)], [KERNEL])
    assert len(complaints) == len(words)
    for complaint, expected in zip(complaints, words, strict=True):
        assert expected in complaint


def test_every_change_of_registers_is_told():
    assert cuda_objects.changes([replace(KERNEL, registers=120)], [KERNEL]) == [
        "a.cu: kernel<float> on sm_90: 128 -> 120 registers"
    ]


FAULTY = """
#include <cstdint>
namespace lwft::cuda { namespace {
template <class T> __global__ void __launch_bounds__(64) faulty(T* to, const int* at, const uint16_t* from) {
  T local[64];
  for (int i = 0; i < 64; ++i) local[at[i]] = from[i];
  for (int i = 0; i < 64; ++i) atomicAdd(to, local[at[64 + i]]);
}
template __global__ void faulty<float>(float*, const int*, const uint16_t*);
} }
"""


@needs_nvcc
def test_faults_are_seen_in_an_object(tmp_path: Path):
    source, made = tmp_path / "faulty.cu", tmp_path / "faulty.o"
    source.write_text(FAULTY)
    compiler = next(iter(cuda_objects.commands().values()))[0]
    subprocess.run([compiler, "-std=c++20", "-arch=sm_80", "-c", source, "-o", made], check=True)
    (kernel,) = cuda_objects.read("faulty.cu", made)
    assert (kernel.kernel, kernel.architecture, kernel.threads) == ("faulty<float>", "sm_80", 64)
    assert kernel.stack == 256 and kernel.local > 0 and kernel.float_atomics > 0 and kernel.narrow > 0
    assert kernel.registers > 0 and kernel.instructions == ""
