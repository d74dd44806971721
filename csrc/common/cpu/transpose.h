// Transposing squares of vectors in registers.
#pragma once
#include "common/cpu/convert.h"

namespace lwft::LWFT_ISA {

// One step of transposing a square of vectors: in each pair of rows `Distance` apart, blocks of Distance
// lanes change places across the diagonal. Steps 1, 2, 4, ... lanes/2 together transpose the square.
template <int Distance, class V, int... I>
inline V upper_rows(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int N = kLanesOf<V>;
  return __builtin_shufflevector(a, b, ((I & Distance) ? N + I - Distance : I)...);
}
template <int Distance, class V, int... I>
inline V lower_rows(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int N = kLanesOf<V>;
  return __builtin_shufflevector(a, b, ((I & Distance) ? N + I : I + Distance)...);
}

template <int Distance, class V>
inline void transpose_steps(V* rows) {
  constexpr int N = kLanesOf<V>;
  if constexpr (Distance < N) {
    using Index = std::make_integer_sequence<int, N>;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & Distance) continue;
      const V a = rows[i], b = rows[i + Distance];
      rows[i] = upper_rows<Distance>(a, b, Index{});
      rows[i + Distance] = lower_rows<Distance>(a, b, Index{});
    }
    transpose_steps<2 * Distance>(rows);
  }
}

// `columns` columns (at most a vector of them), each contiguous, `col_bytes` apart, into the lanes of a panel of that width.
template <class T, class Storage>
inline void pack_transposed_bytes(const void* source, int64_t col_bytes, int64_t k, int64_t columns, T* to,
                                  int64_t width) {
  constexpr int N = kLanes<T>;
  for (int64_t l = 0; l < k; l += N) {
    const int64_t depth = minimum<int64_t>(N, k - l);
    Vec<T> square[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const auto* from = reinterpret_cast<const Storage*>(static_cast<const char*>(source) + i * col_bytes) + l;
      square[i] = i >= columns ? Vec<T>{} : depth == N ? load_as<T>(from) : load_first_as<T>(from, depth);
    }
    transpose_steps<1>(square);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i < depth) store(to + (l + i) * width, square[i]);
    }
  }
}

template <class T, class Storage>
inline void pack_transposed(const Storage* source, int64_t col_stride, int64_t k, int64_t columns, T* to,
                            int64_t width) {
  constexpr int64_t kBytes = sizeof(Storage);
  pack_transposed_bytes<T, Storage>(source, col_stride * kBytes, k, columns, to, width);
}

// to = (rows, columns) transposed; its rows are written in whole vectors.
template <class T>
inline void turn(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    pack_transposed<T>(from + i * from_stride, from_stride, columns, minimum<int64_t>(kLanes<T>, rows - i), to + i,
                       to_stride);
  }
}

}  // namespace lwft::LWFT_ISA
