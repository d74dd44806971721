// Passes over one row of a tensor, whatever its dtype: load, a few vector operations, store, without a buffer between.
//
//     for_columns<T>(n, [&](auto at, int k) { store_at<T>(out, at, load_at<T>(x, at) + load_at<T>(y, at)); });
//
// `at` is a whole vector of columns or, once at the end, the rest, whose absent lanes read zero and are not written.
// k counts 0..3: sums are kept in four parts, since one addition has to wait for the one before it.
#pragma once
#include "common/cpu/convert.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {

struct WholeColumns {
  int64_t j;
};
struct RestColumns {
  int64_t j, count;
};

template <class T, class Storage>
inline Vec<T> load_at(const Storage* row, WholeColumns at) {
  return load_as<T>(row + at.j);
}
template <class T, class Storage>
inline Vec<T> load_at(const Storage* row, RestColumns at) {
  return load_first_as<T>(row + at.j, at.count);
}
template <class T, class Storage>
inline void store_at(Storage* row, WholeColumns at, Vec<T> v) {
  store_as<T>(row + at.j, v);
}
template <class T, class Storage>
inline void store_at(Storage* row, RestColumns at, Vec<T> v) {
  store_first_as<T>(row + at.j, v, at.count);
}

// Whether a result of `rows` rows of n elements, one after the other, is best streamed (vec.h): whole aligned
// vectors, and too many for them to be in a cache still when someone reads them.
template <class T>
inline bool may_stream(DType dtype, const void* to, int64_t rows, int64_t n) {
  constexpr int64_t kLeastBytes = int64_t{4} << 20;
  const int64_t element_bytes = static_cast<int64_t>(element_size(dtype));
  const int64_t row_bytes = n * element_bytes, vector_bytes = kLanes<T> * element_bytes;
  return rows * row_bytes >= kLeastBytes && row_bytes % vector_bytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(vector_bytes) == 0;
}

// store_at, past the caches where `streams`: then it may_stream, and finish_streaming follows.
template <class T, class Storage>
inline void write_at(bool streams, Storage* row, WholeColumns at, Vec<T> v) {
  if (!streams) return store_at<T>(row, at, v);
  Lanes<uint8_t, kLanes<T>* static_cast<int>(sizeof(Storage))> bytes;
  store_as<T>(reinterpret_cast<Storage*>(&bytes), v);
  stream(row + at.j, bytes);
}
template <class T, class Storage>
inline void write_at(bool, Storage* row, RestColumns at, Vec<T> v) {
  store_at<T>(row, at, v);
}

// v, with zeros in the lanes past the end of the row.
template <class T>
inline Vec<T> only_columns(Vec<T> v, WholeColumns) {
  return v;
}
template <class T>
inline Vec<T> only_columns(Vec<T> v, RestColumns at) {
  return select(first_lanes<T>(at.count), v, Vec<T>{});
}

// What it is given must be inlined: its sums would live in memory otherwise. gcc does so without fail only where told.
#define LWFT_INLINE __attribute__((always_inline))

template <class T, class Body>
LWFT_INLINE inline void for_columns(int64_t n, const Body& body) {
  constexpr int64_t N = kLanes<T>;
  int64_t j = 0;
  for (; j + 4 * N <= n; j += 4 * N) {
    body(WholeColumns{j}, 0);
    body(WholeColumns{j + N}, 1);
    body(WholeColumns{j + 2 * N}, 2);
    body(WholeColumns{j + 3 * N}, 3);
  }
  for (; j + N <= n; j += N) body(WholeColumns{j}, 0);
  if (j < n) body(RestColumns{j, n - j}, 0);
}

template <class T>
struct RowSum {
  Vec<T> part[4] = {};

  T total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// 1 / sqrt(variance + eps) of a row with this mean; from the deviations, since E[x^2] - mean^2 cancels for a large mean.
template <class T>
inline T inverse_deviation(const T* row, int64_t n, T mean, double eps) {
  RowSum<T> squares;
  for_columns<T>(n, [&](auto at, int k) LWFT_INLINE {
    const Vec<T> deviation = only_columns<T>(load_at<T>(row, at) - mean, at);
    squares.part[k] = fma(deviation, deviation, squares.part[k]);
  });
  const double variance = static_cast<double>(squares.total() / static_cast<T>(n));
  return T{1} / static_cast<T>(__builtin_sqrt(variance + eps));
}

// A parameter of n elements as T: where it lies, converted into scratch, or `absent` where there is none.
template <class T>
inline const T* parameter_row(DType dtype, const void* data, int64_t n, T absent, Scratch& scratch) {
  if (data != nullptr && dtype == dtype_of<T>()) return static_cast<const T*>(data);
  T* row = scratch.take<T>(n);
  if (data != nullptr) {
    load_row(dtype, data, 0, n, row);
  } else {
    for (int64_t j = 0; j < n; ++j) row[j] = absent;
  }
  return row;
}

}  // namespace lwft::LWFT_ISA
