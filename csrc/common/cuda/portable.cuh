// What a CUDA kernel of this package is written in: one source, two builds.
//
//   nvcc   device.cuh     the wrappers are inline PTX, launch() is <<<>>>
//   g++    emulation.h    a block is a set of fibers; a warp instruction waits for its 32 lanes and is then done for all
//                         of them, lane by lane as the PTX manual says; so kernels run in tests without a GPU
//
// The set of instructions is small on purpose, since each is a promise about the hardware that the emulation makes:
//
//   ldmatrix_x4            four 8x8 matrices of 16-bit elements from shared memory, one row address per lane
//   ldmatrix_x4_transposed the same, each matrix transposed on the way
//   mma                    C[16, 8] += A[16, 16] B[16, 8], bf16 or fp16 in, fp32 out
//   copy_async             16 bytes from global to shared memory, or zeros; copy_commit, copy_wait<N>
//   block_barrier          __syncthreads
//   shuffle_xor            a value of the lane whose number differs in the bits of a mask
//   anew                   the same value; what follows from it is computed again and not held in registers since before
//   exp2_fast              2^x, its last two bits uncertain, 0 below 2^-126
//   to_float, from_float   16-bit conversions, round to nearest even
//
// Not emulated: bank conflicts, the memory model between blocks, register pressure, the order of the tensor core's own
// additions. Whoever reads a result of the emulation has read that the algorithm is right, not that the card is fast.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lwft::cuda {

// 16-bit floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kWarpLanes = 32;

}  // namespace lwft::cuda

#ifdef __CUDACC__
#include "common/cuda/device.cuh"
#else
#include "common/cuda/emulation.h"
#endif
