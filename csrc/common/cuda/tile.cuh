// Tiles of 16-bit elements in shared memory: how they come there, and how the tensor cores take them from there.
//
// In registers, of a 16 x 8 result tile (mma's C), lane l holds row l / 4 and columns 2 (l % 4), + 1 in [0], [1], and the
// same of row l / 4 + 8 in [2], [3]. Two neighbouring C tiles, rounded to 16 bits and packed in pairs, are a 16 x 16 A
// operand as it stands: {C0[0..1], C0[2..3], C1[0..1], C1[2..3]}. So a product's result feeds the next product without
// leaving the registers.
#pragma once
#include "common/cuda/row.cuh"

namespace lwft::cuda {

constexpr int kStages = 2;
constexpr int kPad = 8;  // 16 bytes more per row: the 8 rows of an ldmatrix then lie in different banks

template <class T>
LWFT_DEVICE const Vector8<T>& vector_at(const T* from) {
  return *reinterpret_cast<const Vector8<T>*>(from);
}

template <class T>
LWFT_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Starts the copy, by a block of `Threads`, of rows of 8-element vectors into a stage whose rows are `columns + kPad`
// apart; what lies outside the matrix becomes zero.
template <int Threads, class T>
LWFT_DEVICE void copy_rows(T* to, int rows, int columns, const T* from, int64_t row_stride, int64_t rows_left,
                           int64_t columns_left) {
  const int vectors = columns / 8;
  for (int i = thread_index(); i < rows * vectors; i += Threads) {
    const int r = i / vectors, c = i % vectors * 8;
    const bool valid = r < rows_left && c < columns_left;
    copy_async(to + r * (columns + kPad) + c, valid ? from + r * row_stride + c : from, valid);
  }
}

// A loop over chunks that are copied while the one before is used: load(chunk, stage) starts copies, use(chunk, stage)
// finds them landed, for every thread. `stages` is room for kStages of them; at least one chunk.
template <class T, class Load, class Use>
LWFT_DEVICE void for_chunks(int chunks, T* stages, int stage_elements, const Load& load, const Use& use) {
  load(0, stages);
  copy_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) {
      load(chunk + 1, stages + (chunk + 1) % kStages * stage_elements);
      copy_commit();
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    block_barrier();  // everyone's part of this chunk has landed
    use(chunk, stages + chunk % kStages * stage_elements);
    block_barrier();  // the stage is free for the chunk after the next
  }
}

// A operand of 16 rows, 16 of the sum, in shared memory with row stride `stride`.
template <class T>
LWFT_DEVICE void load_rows(uint32_t (&fragment)[4], const T* a, int stride) {
  const int lane = thread_index() % kWarpLanes;
  ldmatrix_x4(fragment, a + lane % 16 * stride + lane / 16 * 8);
}

// B operands of two mma tiles of 8 columns each, {[0], [1]} and {[2], [3]}: B (16 columns, 16 of the sum) in shared memory.
template <class T>
LWFT_DEVICE void load_pair(uint32_t (&fragment)[4], const T* b, int stride) {
  const int lane = thread_index() % kWarpLanes;
  ldmatrix_x4(fragment, b + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// The same with B^T (16 of the sum, 16 columns) in shared memory, transposed on the way.
template <class T>
LWFT_DEVICE void load_pair_transposed(uint32_t (&fragment)[4], const T* b, int stride) {
  const int lane = thread_index() % kWarpLanes;
  ldmatrix_x4_transposed(fragment, b + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8);
}

// acc[0], acc[1] += A B^T, B as load_pair takes it.
template <class T>
LWFT_DEVICE void multiply_pair(float (*acc)[4], const uint32_t (&a)[4], const T* b, int stride) {
  uint32_t fragment[4];
  load_pair(fragment, b, stride);
  mma<T>(acc[0], a, fragment[0], fragment[1]);
  mma<T>(acc[1], a, fragment[2], fragment[3]);
}

// acc[0], acc[1] += A B, B as load_pair_transposed takes it.
template <class T>
LWFT_DEVICE void multiply_pair_transposed(float (*acc)[4], const uint32_t (&a)[4], const T* b, int stride) {
  uint32_t fragment[4];
  load_pair_transposed(fragment, b, stride);
  mma<T>(acc[0], a, fragment[0], fragment[1]);
  mma<T>(acc[1], a, fragment[2], fragment[3]);
}

}  // namespace lwft::cuda
