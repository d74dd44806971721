"""What nvcc makes of the CUDA kernels: no GPU needed, only the toolkit. (Spilled registers already fail the build.)"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def entries(source, tmp_path):
    """Name and PTX of each kernel."""
    ptx = tmp_path / "kernels.ptx"
    command = [NVCC, "-std=c++20", f"-I{CSRC}", "-ptx", "-arch=compute_80", "-o", ptx, CSRC / source]
    subprocess.run(command, check=True)
    text = ptx.read_text()
    starts = [match.start() for match in re.finditer(r"^(\.visible |\.weak )?\.entry ", text, re.MULTILINE)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_add_layer_norm_reads_and_writes_whole_vectors(tmp_path):
    kernels = entries("norm/norm_cuda.cu", tmp_path)
    assert len(kernels) == 9  # 3 dtypes: forward, backward, the sum of partial sums
    for kernel in kernels:
        assert ".local" not in kernel, "an array is indexed by a value known only at run time"
        if "sum_partials" in kernel:
            continue
        assert kernel.count("ld.global.v4.u32") + kernel.count("ld.global.v4.f32") + kernel.count("ld.global.nc") > 0
        assert not re.findall(r"[ls][dt]\.global\.[bu](?:8|16)\b", kernel), "an element alone is read or written"


def test_adapter_backward_is_of_tensor_core_instructions(tmp_path):
    kernels = entries("adapter/adapter_backward_cuda.cu", tmp_path)
    assert len(kernels) == 8  # 2 dtypes: dx, the weights, the down bias, the sums
    for kernel in kernels:
        assert ".local" not in kernel, "an array is indexed by a value known only at run time"
        if "adapter_dx" in kernel or "adapter_weights" in kernel:
            assert "mma.sync.aligned.m16n8k16" in kernel
            assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in kernel
            assert "cp.async.cg.shared.global" in kernel


def test_adapter_forward_is_of_tensor_core_instructions(tmp_path):
    kernels = entries("adapter/adapter_cuda.cu", tmp_path)
    assert len(kernels) == 6  # 2 dtypes, 3 sizes of bottleneck
    for kernel in kernels:
        element, bottleneck = re.search(r"(BFloat16|7Float16)ELi(\d+)", kernel).groups()
        m, chunk = int(bottleneck), 64
        kind = "bf16.bf16" if element == "BFloat16" else "f16.f16"
        # both products, unrolled: 16 x 8 x 16 each, for the 16 rows of a warp
        assert kernel.count(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32") == 2 * (m // 8) * (chunk // 16)
        assert kernel.count("ldmatrix.sync.aligned.m8n8.x4.shared.b16") == chunk // 16 + 2 * (m // 16) * (chunk // 16)
        assert "cp.async.cg.shared.global" in kernel
        assert ".local" not in kernel, "an array is indexed by a value known only at run time"


def products_and_copies(kernel, dtype, products):
    """Whether a kernel consists of so many tensor core products of a dtype, and copies without registers in between."""
    kind = "bf16.bf16" if dtype == "BFloat16" else "f16.f16"
    assert kernel.count(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32") == kernel.count("mma.sync") == products
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in kernel
    assert "cp.async.cg.shared.global" in kernel
    assert ".local" not in kernel, "an array is indexed by a value known only at run time"


def test_attention_forward_is_of_tensor_core_instructions(tmp_path):
    kernels = entries("attention/attention_cuda.cu", tmp_path)
    assert len(kernels) == 6  # 2 dtypes, 3 head sizes
    for kernel in kernels:
        dtype, *sizes = re.search(r"(BFloat16|7Float16)ELi(\d+)ELi(\d+)ELi(\d+)", kernel).groups()
        head, row_tiles, keys = map(int, sizes)
        # S = Q K^T and P V for the rows of a warp, 16 x 8 x 16 each
        products_and_copies(kernel, dtype, 2 * row_tiles * (head // 16) * (keys // 8))


def test_attention_decode_is_of_tensor_core_instructions(tmp_path):
    kernels = entries("attention/attention_decode_cuda.cu", tmp_path)
    assert len(kernels) == 8  # 2 dtypes: 3 head sizes, the merge
    for kernel in kernels:
        if "attention_merge" in kernel:
            assert ".local" not in kernel
            continue
        dtype, head = re.search(r"(BFloat16|7Float16)ELi(\d+)", kernel).groups()
        products_and_copies(kernel, dtype, 2 * (int(head) // 16) * (16 // 8))


@pytest.mark.parametrize("part", ["dq", "dkv", "dbias"])
def test_attention_backward_is_of_tensor_core_instructions(part, tmp_path):
    kernels = entries(f"attention/attention_{part}_cuda.cu", tmp_path)
    assert len(kernels) == (8 if part == "dq" else 4)  # 2 dtypes, 2 head sizes; beside dq, the exact statistics
    for kernel in kernels:
        dtype, head = re.search(r"(BFloat16|7Float16)ELi(\d+)", kernel).groups()
        # 16 x 8 x 16 each, for the 16 rows of a warp: two turns of S = Q K^T and dP = dO V^T; then their sums
        scores = 2 * 2 * (64 if part == "dbias" else 32) // 8
        sums = 0 if part == "dbias" or "exact" in kernel.split("(")[0] else {"dq": 1, "dkv": 2}[part]
        products = scores + sums * (32 // 16) * (int(head) // 8)
        if sums:
            products_and_copies(kernel, dtype, products)
        else:  # nothing is multiplied by a tile as it lies
            assert kernel.count("mma.sync") == products
            assert ".local" not in kernel, "an array is indexed by a value known only at run time"


def test_attention_statistics_keep_nothing_in_local_memory(tmp_path):
    kernels = entries("attention/attention_backward_cuda.cu", tmp_path)
    assert len(kernels) == 5  # statistics of 2 dtypes, sums of 3
    assert all(".local" not in kernel for kernel in kernels)
