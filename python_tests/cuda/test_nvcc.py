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


def test_low_rank_products_are_of_tensor_core_instructions(tmp_path):
    kernels = entries("lowrank/lowrank_cuda.cu", tmp_path)
    assert len(kernels) == 2 * 14 + 2  # down and up: 2 dtypes, 4 ranks, of float32 factors 3; packing, adding up
    for kernel in kernels:
        assert ".local" not in kernel, "an array is indexed by a value known only at run time"
        if "down_kernel" not in kernel and "up_kernel" not in kernel:
            continue
        assert "mma.sync.aligned.m16n8k16" in kernel
        assert "cp.async.cg.shared.global" in kernel
        if "up_kernel" in kernel:  # the result is written, and what it is added to is read, in rows of 16 bytes
            assert "st.global.v4" in kernel
            assert "ld.global.v4" in kernel
            assert "st.global.b16" not in kernel
            assert "st.global.u16" not in kernel


def test_low_rank_gradients_are_of_tensor_core_instructions(tmp_path):
    kernels = entries("lowrank/lowrank_backward_cuda.cu", tmp_path)
    assert len(kernels) == 2 * 14 + 1  # of x and of dy; adding up
    for kernel in kernels:
        assert ".local" not in kernel, "an array is indexed by a value known only at run time"
        if "gradients_kernel" not in kernel:
            continue
        assert "mma.sync.aligned.m16n8k16" in kernel
        assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in kernel
        assert "cp.async.cg.shared.global" in kernel
        of_x = "ELb1E" in kernel.splitlines()[0]
        assert ("st.global.v4" in kernel) == of_x  # dx
