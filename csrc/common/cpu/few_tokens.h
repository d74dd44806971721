// Gradients of a weight from a few tokens: sums of so few products that what takes time is writing the weight's gradient.
// So it is written once, where it lies and along its rows.
#pragma once
#include "common/cpu/row.h"
#include "common/cpu/tile.h"

namespace lwft::LWFT_ISA {

// (rows, n) at `from` to element `offset` of `base` on.
template <class T>
inline void store_rows(DType dtype, int64_t rows, int64_t n, const T* from, int64_t stride, void* base, int64_t offset,
                       int64_t to_stride) {
  visit_storage(dtype, [&](auto storage) {
    auto* const to = static_cast<decltype(storage)*>(base) + offset;
    for (int64_t i = 0; i < rows; ++i) {
      for_columns<T>(
          n, [&](auto at, int) LWFT_INLINE { store_at<T>(to + i * to_stride, at, load_at<T>(from + i * stride, at)); });
    }
  });
}

// to (n, m), contiguous, = A^T B; A (tokens, n), B (tokens, m), read in whole vectors.
template <class T>
inline void tall_gradient(int64_t tokens, int64_t n, int64_t m, const Tile<T>& a, const Tile<T>& b, DType dtype,
                          void* base, int64_t offset) {
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t stride = padded<T>(m);
  if (dtype == dtype_of<T>() && stride == m) {
    return gemm_rows(n, m, tokens, a.data, 1, a.row_stride, b.data, b.row_stride, static_cast<T*>(base) + offset, m,
                     Mode::overwrite);
  }
  Scratch scratch;
  T* const rows = scratch.take<T>(kRowsAtOnce * stride);
  for (int64_t i = 0; i < n; i += kRowsAtOnce) {
    const int64_t count = minimum(kRowsAtOnce, n - i);
    gemm_rows(count, m, tokens, a.data + i, 1, a.row_stride, b.data, b.row_stride, rows, stride, Mode::overwrite);
    store_rows(dtype, count, m, rows, stride, base, offset + i * m, m);
  }
}

// to (m, n), rows `to_stride` apart, = A^T B; A (tokens, m), B (tokens, n) of any dtype. Where B fits the first cache a few
// rows at a time, each from one end to the other.
template <class T>
inline void wide_gradient(int64_t tokens, int64_t m, int64_t n, const Tile<T>& a, DType b_dtype, const void* b,
                          int64_t b_stride, DType dtype, void* base, int64_t offset, int64_t to_stride) {
  constexpr int64_t kCacheBytes = 24 * 1024, kRowsOfCombine = 4;
  const bool fits = tokens * n * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
  const int64_t at_once = fits ? kRowsOfCombine : m;
  const bool in_place = dtype == dtype_of<T>();
  Scratch scratch;
  T* const turned = scratch.take<T>(at_once * tokens);
  T* const rows = scratch.take<T>(in_place ? 0 : at_once * n);
  for (int64_t k = 0; k < m; k += at_once) {
    const int64_t count = minimum(at_once, m - k), at = offset + k * to_stride;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t token = 0; token < tokens; ++token) turned[i * tokens + token] = a.row(token)[k + i];
    }
    T* const to = in_place ? static_cast<T*>(base) + at : rows;
    combine_rows(count, n, tokens, turned, tokens, b_dtype, b, b_stride, to, in_place ? to_stride : n, Mode::overwrite);
    if (!in_place) store_rows(dtype, count, n, rows, n, base, at, to_stride);
  }
}

// to (n) = scale * the sum of the rows of A (tokens, n).
template <class T>
inline void bias_gradient(int64_t tokens, int64_t n, const Tile<T>& a, T scale, DType dtype, void* base,
                          int64_t offset) {
  visit_storage(dtype, [&](auto storage) {
    auto* const to = static_cast<decltype(storage)*>(base) + offset;
    for_columns<T>(n, [&](auto at, int) LWFT_INLINE {
      Vec<T> sum = load_at<T>(a.row(0), at);
      for (int64_t i = 1; i < tokens; ++i) sum += load_at<T>(a.row(i), at);
      store_at<T>(to, at, sum * scale);
    });
  });
}

}  // namespace lwft::LWFT_ISA
