"""The test of the tests: faults planted in the CUDA kernels are found by csrc/tests/cuda_kernels_test.cpp.

Each is one edit of a kernel, of the kind that one makes: the kernel is compiled with it for the emulation and linked
with the objects of the address sanitizer's build, which `make test` has made before.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "address"
TEST = BUILD / "CMakeFiles" / "cuda_kernels_test.dir" / "csrc" / "tests" / "cuda_kernels_test.cpp.o"
LIBRARIES = [BUILD / f"lib{name}.a" for name in ("lwft_emulated_cuda", "lwft_cpu_kernels")]
# The kernel itself goes without the undefined-behaviour sanitizer, which triples the time of its compilation.
COMPILE = ["g++", "-std=c++20", "-O1", "-fsanitize=address", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", "-c"]
LINK = ["g++", "-fsanitize=address,undefined", "-pthread"]

pytestmark = pytest.mark.skipif(not TEST.exists(), reason="not run beside a sanitizer build with tests")

# what it is, the file, the text that is replaced (its first occurrence, which there must be), by what
FAULTS = [
    ("nothing", "norm/norm_cuda.cu", "", ""),
    ("a barrier is missing before shared sums are read", "norm/norm_cuda.cu",
     "shared[row * warps + warp] = value;\n    block_barrier();", "shared[row * warps + warp] = value;"),
    ("a barrier is missing before shared sums are written again", "norm/norm_cuda.cu",
     "block_barrier();  // the sums before have been read", ""),
    ("a row too many is stored", "norm/norm_cuda.cu", "const bool inside = row < p.tokens;",
     "const bool inside = row <= p.tokens;"),
    ("a partial sum is left out", "norm/norm_cuda.cu", "for (int64_t block = 0; block < blocks; ++block)",
     "for (int64_t block = 0; block + 1 < blocks; ++block)"),
    ("dropout draws for the wrong column", "norm/norm_cuda.cu", "const int column = lane.column + e;",
     "const int column = lane.column + (e ^ 1);"),
    ("the wrong wait count", "common/cuda/tile.cuh", "copy_wait<1>();", "copy_wait<2>();"),
    ("a stage is written while it is read", "common/cuda/tile.cuh",
     "block_barrier();  // the stage is free for the chunk after the next", ""),
    ("a chunk is read before all of it has landed", "common/cuda/tile.cuh",
     "block_barrier();  // everyone's part of this chunk has landed", ""),
    ("the wrong column of a fragment", "adapter/adapter_cuda.cu", "const int column = j * 8 + lane % 4 * 2;",
     "const int column = j * 8 + lane % 4;"),
    ("an element too far is stored", "adapter/adapter_cuda.cu", "if (row >= p.tokens) continue;\n      float value[2];",
     "float value[2];"),
    ("rows and sums of a transposed fragment change places", "adapter/adapter_backward_cuda.cu",
     "(k + lane % 8 + lane / 16 * 8) * kStride + warp * 16 + lane / 8 % 2 * 8",
     "(k + lane % 8 + lane / 8 % 2 * 8) * kStride + warp * 16 + lane / 16 * 8"),
    ("act(0) beyond the last token counts", "adapter/adapter_backward_cuda.cu",
     "const bool inside = first_row + r < p.tokens && c < p.bottleneck;", "const bool inside = c < p.bottleneck;"),
    ("x is used before all of it is normalised", "adapter/adapter_backward_cuda.cu",
     "block_barrier();  // all of nh is there", ""),
    ("a product begins while others still read the tiles in its place", "adapter/adapter_backward_cuda.cu",
     "block_barrier();  // the tiles' place is taken by the stages of the next product", ""),
    ("beta's part of the gradient is left out", "adapter/adapter_backward_cuda.cu", "g * gamma + dbd * beta",
     "g * gamma"),
    ("ranges of tokens are added but for the last", "adapter/adapter_backward_cuda.cu", "range < space.ranges;",
     "range < space.ranges - 1;"),
    ("the mask is not laid over the gradient", "adapter/adapter_backward_cuda.cu",
     "if (words.word[v] < dropout.threshold)", "if (words.word[0] < dropout.threshold)"),
    ("a key too many is seen", "attention/attention_cuda.cuh", "k >= seen.end", "k > seen.end"),
    ("the edge of a window is taken for its inside", "attention/attention_cuda.cuh", "first < full.begin ||", ""),
    ("a bias is read beyond the last key", "attention/attention_cuda.cuh",
     "if (k >= 0 && k < tile.end) x[j][2 * half + e] +=", "if (k >= 0) x[j][2 * half + e] +="),
    ("dropout draws for the wrong row", "attention/attention_cuda.cuh", "group.index(row + 8 * half);",
     "group.index(row + half);"),
    ("half of the draws are used twice", "attention/attention_forward_cuda.cuh", "kept[m] >> shift", "kept[m]"),
    ("tiles of keys are off the random stream's grid", "attention/attention_cuda.cuh", "? prefix % Keys : 0;",
     "? 0 : 0;"),
    ("what was summed before keeps its scale", "attention/attention_forward_cuda.cuh",
     "out[d][2 * half + 1] *= factor;", ""),
    ("halves of a fragment change places", "attention/attention_forward_cuda.cuh",
     "x[m][j + i / 2][i % 2 * 2], x[m][j + i / 2][i % 2 * 2 + 1]",
     "x[m][j + i % 2][i / 2 * 2], x[m][j + i % 2][i / 2 * 2 + 1]"),
    ("a row too many is stored by attention", "attention/attention_cuda.cu", "if (r >= group.rows) continue;",
     "if (r > group.rows) continue;"),
    ("tiles are left out between the parts", "attention/attention_decode_cuda.cu", "(tiles.count + parts - 1) / parts",
     "tiles.count / parts"),
    ("a barrier is missing before the warps' maxima are read", "attention/attention_decode_cuda.cu", "block_barrier();",
     ""),
    ("a warp's part of the sums is left out", "attention/attention_decode_cuda.cu",
     "for (int w = 1; w < KeyWarps; ++w) sum +=", "for (int w = 2; w < KeyWarps; ++w) sum +="),
    ("the parts are added with their own scale", "attention/attention_decode_cuda.cu",
     "exp2_fast((*partial.highest - shift_of(highest)) * unit)", "1.0f"),
    ("columns of the random stream are drawn once for all", "attention/attention_dq_cuda.cu",
     "number_of(i) != number_of(i - 1)", "false"),
    ("a row too many gets a gradient", "attention/attention_dq_cuda.cu", "return row < rows.group.rows ?",
     "return row <= rows.group.rows ?"),
    ("a key before the first gets a gradient", "attention/attention_dkv_cuda.cu", "return key >= 0 && key <",
     "return key <"),
    ("dropout keeps other keys than in forward", "attention/attention_dkv_cuda.cu", "kept(keep, r, key)",
     "kept(keep, r, key ^ 16)"),
    ("the first queries that see a key are left out", "attention/attention_dkv_cuda.cu",
     "first_row = first_query * group.group_size / kStep * kStep;",
     "first_row = (first_query * group.group_size / kStep + 1) * kStep;"),
    ("a tile of the bias gradient is read before all of it has landed", "attention/attention_dbias_cuda.cu",
     "block_barrier();  // everyone's part of the tiles has landed", ""),
    ("a part of a sum over blocks is left out", "attention/attention_backward_cuda.cu", "part < parts;",
     "part + 1 < parts;"),
    ("the gradient of lse is left out", "attention/attention_backward_cuda.cu", "total - grad_lse;", "total;"),
    ("rows draw for their neighbours", "attention/attention_backward_cuda.cuh", "first_row + i / kKeepBytes,",
     "first_row + i % kKeepBytes,"),
    ("the derivative of the softcap is left out", "attention/attention_backward_cuda.cuh", "dscore * slope}",
     "dscore}"),
    ("a row of another adapter is multiplied", "lowrank/lowrank_cuda.cu",
     "if (!stacked || own[half] == list[turn % adapters]) continue;", "if (true) continue;"),
    ("the middle is added up but for the last slice", "lowrank/lowrank_cuda.cu", "slice < p.slices &&",
     "slice < p.slices - 1 &&"),
    ("a factor's padding is not zero", "lowrank/lowrank_cuda.cu", "k < p.rank ? value_at(p.dtype, p.from, from) : 0.0f",
     "value_at(p.dtype, p.from, from)"),
    ("the bias is added for each adapter", "lowrank/lowrank_cuda.cu",
     "if (turn % adapters + 1 < adapters) return;", ""),
    ("sums go on from chunk to chunk", "lowrank/lowrank_cuda.cu", "y[j][i] = 0.0f;", ";"),
    ("the mask of the other half", "lowrank/lowrank_cuda.cu", "a[v][half + 2 * side] &= mask;",
     "a[v][side + 2 * half] &= mask;"),
    ("the tile is read while others mask it", "lowrank/lowrank_backward_cuda.cu",
     "block_barrier();  // other warps read these rows", ""),
    ("a bit of the mask too far", "lowrank/lowrank_backward_cuda.cu", "(mask >> 30 & 2u)", "(mask >> 31 & 1u)"),
    ("rows of no adapter are not written", "lowrank/lowrank_backward_cuda.cu", "(none && adapter == 0)", "false"),
    ("rows of another adapter are summed up", "lowrank/lowrank_backward_cuda.cu",
     "adapter_of(p.adapter_index, row, p.tokens) == adapter;", "row < p.tokens;"),
    ("an element too far of the sum of columns", "lowrank/lowrank_backward_cuda.cu",
     "&& 2 * thread_index() < columns_left", ""),
    ("partial sums of A lie as those of B", "lowrank/lowrank_backward_cuda.cu",
     "p.transposed ? (adapter * p.rank + k) * p.width + column : i", "i"),
    ("columns of four tiles change places", "lowrank/lowrank_cuda.cuh", "exchange(r[1], r[3], 2);", ""),
    ("a part of a float32 factor is left out", "lowrank/lowrank_cuda.cuh", "int part = P::kParts - 1; part >= 0;",
     "int part = P::kParts - 1; part >= 1;"),
]  # fmt: skip
# A header is compiled with kernels that include it.
HEADER_USERS = {
    "common/cuda/tile.cuh": "adapter/adapter_cuda.cu",
    "attention/attention_cuda.cuh": "attention/attention_cuda.cu",
    "attention/attention_forward_cuda.cuh": "attention/attention_cuda.cu",
    "attention/attention_backward_cuda.cuh": "attention/attention_dkv_cuda.cu",
    "lowrank/lowrank_cuda.cuh": "lowrank/lowrank_cuda.cu",
}
# Not found, and why: harmless where nothing is wrong otherwise.
HARMLESS = {"nothing", "act(0) beyond the last token counts"}


@pytest.mark.parametrize("fault,file,text,instead", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found(tmp_path, fault, file, text, instead):
    source = (ROOT / "csrc" / file).read_text()
    assert text in source, "the kernel has changed: plant the fault in the text that is there now"
    broken = tmp_path / file
    broken.parent.mkdir(parents=True)
    broken.write_text(source.replace(text, instead, 1))
    kernel = ROOT / "csrc" / HEADER_USERS[file] if broken.suffix == ".cuh" else broken
    compiled, program = tmp_path / "broken.o", tmp_path / "program"
    places = ["-I", tmp_path, "-I", ROOT / "csrc"]
    subprocess.run([*COMPILE, *places, "-x", "c++", kernel, "-o", compiled], check=True, capture_output=True)
    subprocess.run([*LINK, compiled, TEST, *LIBRARIES, "-o", program], check=True, capture_output=True)
    room = HEADER_USERS.get(file, file).partition("/")[0]
    done = subprocess.run([program, room], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode == 0) == (fault in HARMLESS), done.stdout + done.stderr
