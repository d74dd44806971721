// What forward and backward of the adapter share on the CPU: how the tokens are cut into tiles, rows of a tile, the
// weights packed for the tile products.
#pragma once
#include "adapter/activation.h"
#include "adapter/adapter.h"
#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/operand.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {

// Up to so many tokens a weight is not worth packing: it is read once where it lies (dot_rows, combine_rows).
constexpr int64_t kFewTokens = 8;
// Then the work is cut into slices of a weight, of about so many elements each, for the threads.
constexpr int64_t kSliceElements = 64 * 1024;

// Columns of the (tokens, model_dim) branch at a time, out of the cache and into memory: whole panels, and whole
// blocks of 64 columns of the random stream.
constexpr int64_t kBlockColumns = 128;
static_assert(kBlockColumns % kPanelColumns<float> == 0 && kBlockColumns % kPanelColumns<double> == 0);
static_assert(kBlockColumns % kPhiloxColumns == 0);

// Row stride of a buffer of n columns: an odd number of vectors, or the rows of a tile would compete for the same few
// sets of the cache when n is a power of two.
template <class T>
constexpr int64_t buffer_stride(int64_t n) {
  return (ceil_div(n, kLanes<T>) | 1) * kLanes<T>;
}

// ---- cutting the tokens ----

// Tiles of about equal size: small enough that a tile of model_dim columns stays in the second-level cache, and an even
// number of them, of at least 16 if the tokens suffice, so that the threads finish together.
struct TokenTiles {
  int64_t tokens, rows, count;

  int64_t begin(int64_t tile) const { return tile * rows; }
  int64_t size(int64_t tile) const { return minimum(rows, tokens - tile * rows); }
};

template <class T>
TokenTiles token_tiles(int64_t tokens, int64_t model_dim) {
  constexpr int64_t kMostRows = 48, kLeastRows = 16, kWantedTiles = 16;
  constexpr int64_t kTileBytes = 384 * 1024;
  const int64_t row_bytes = model_dim * static_cast<int64_t>(sizeof(T));
  const int64_t most = maximum(kLeastRows, minimum(kMostRows, kTileBytes / row_bytes));
  const int64_t wanted = minimum(kWantedTiles, ceil_div(tokens, kLeastRows));
  const int64_t tiles = round_up(maximum(wanted, ceil_div(tokens, most)), 2);
  const int64_t rows = maximum<int64_t>(1, ceil_div(tokens, maximum<int64_t>(1, tiles)));
  return {tokens, rows, ceil_div(tokens, rows)};
}

// ---- parameters ----

// A row of n elements as T, padded with zeros to whole vectors; all `absent` where there is none.
template <class T>
const T* parameter_row(DType dtype, const void* data, int64_t n, T absent, Scratch& scratch) {
  T* row = scratch.take<T>(padded<T>(n));
  if (data != nullptr) {
    load_row(dtype, data, 0, n, row);
  } else {
    for (int64_t j = 0; j < n; ++j) row[j] = absent;
  }
  for (int64_t j = n; j < padded<T>(n); ++j) row[j] = T{0};
  return row;
}

// ---- weights ----

// A weight packed as the right-hand side of gemm, in tasks of equal size.
template <class E>
class PackedWeight {
 public:
  // The (k, n) matrix whose element (i, j) is data[i * row_stride + j * col_stride].
  PackedWeight(DType dtype, const void* data, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
               Scratch& scratch)
      : dtype_(dtype), data_(data), row_stride_(row_stride), col_stride_(col_stride), k_(k), n_(n) {
    if constexpr (!kIsPair<E>) {
      // One panel of whole vectors is a row-major matrix: a weight that is one already needs no copy.
      if (dtype == dtype_of<E>() && col_stride == 1 && row_stride == n && n == padded<E>(n) && n <= kPanelColumns<E>) {
        panels_ = static_cast<const E*>(data);
        return;
      }
    }
    panels_ = copy_ = scratch.take<E>(panel_size<E>(units<E>(k), n));
  }

  int64_t tasks() const { return copy_ == nullptr ? 0 : ceil_div(n_, kPanelColumns<E>) * ceil_div(k_, kDepth); }

  void pack(int64_t task) const {
    const int64_t depths = ceil_div(k_, kDepth);
    const int64_t j = task / depths * kPanelColumns<E>, l = task % depths * kDepth;
    const int64_t columns = minimum(kPanelColumns<E>, n_ - j);
    pack_operand(dtype_, element(dtype_, data_, l * row_stride_ + j * col_stride_), row_stride_, col_stride_,
                 minimum(kDepth, k_ - l), columns, copy_ + j * units<E>(k_) + l / kUnit<E> * padded<E>(columns));
  }

  // The panels of the columns from j on; j is a multiple of kPanelColumns<E>.
  const E* panels(int64_t j = 0) const { return panels_ + j * units<E>(k_); }

 private:
  static constexpr int64_t kDepth = 4096 / kPanelColumns<E>;

  DType dtype_;
  const void* data_;
  int64_t row_stride_, col_stride_, k_, n_;
  const E* panels_;
  E* copy_ = nullptr;
};

// Packs two weights in one go.
template <class E>
void pack(const PackedWeight<E>& first, const PackedWeight<E>& second) {
  parallel_for(first.tasks() + second.tasks(), [&](int64_t task) {
    if (task < first.tasks()) {
      first.pack(task);
    } else {
      second.pack(task - first.tasks());
    }
  });
}

// Runs Kernel<E>(p).run() with the E for p's dtypes.
template <template <class> class Kernel, class Parameters>
void run_by_dtype(const Parameters& p) {
  if (p.dtype == DType::f64) return Kernel<double>(p).run();
  if constexpr (kMultipliesBFloat16) {
    const bool all_bfloat16 = p.dtype == DType::bf16 && p.param_dtype == DType::bf16;
    if (all_bfloat16 && p.tokens > kFewTokens) return Kernel<BFloat16Pair>(p).run();
  }
  Kernel<float>(p).run();
}

// body(begin, end) for slices of [0, columns) that together with `depth` make about kSliceElements, whole blocks each.
template <class Body>
void for_column_slices(int64_t columns, int64_t depth, const Body& body) {
  const int64_t slice = round_up(ceil_div(kSliceElements, depth), kBlockColumns);
  parallel_for(ceil_div(columns, slice),
               [&](int64_t task) { body(task * slice, minimum((task + 1) * slice, columns)); });
}

// ---- rows ----

// sum over j < n of f(j), a vector of the columns j .. whose lanes past n are zero. Four sums at a time, since one
// addition has to wait for the one before it.
template <class T, class F>
inline T sum_columns(int64_t n, const F& f) {
  constexpr int64_t N = kLanes<T>;
  Vec<T> sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * N <= n; j += 4 * N) {
    sums[0] += f(j);
    sums[1] += f(j + N);
    sums[2] += f(j + 2 * N);
    sums[3] += f(j + 3 * N);
  }
  for (; j < n; j += N) sums[0] += f(j);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The mean and 1 / sqrt(variance + eps) of a row; from the deviations, since E[x^2] - mean^2 cancels for a large mean.
template <class T>
inline void row_statistics(const T* x, int64_t n, double eps, T& mean, T& rstd) {
  mean = sum_columns<T>(n, [&](int64_t j) { return load_columns(x, j, n); }) / static_cast<T>(n);
  const T squares = sum_columns<T>(n, [&](int64_t j) {
    Vec<T> deviation = load_columns(x, j, n) - mean;
    if (j + kLanes<T> > n) deviation = select(first_lanes<T>(n - j), deviation, Vec<T>{});
    return deviation * deviation;
  });
  rstd = T{1} / static_cast<T>(__builtin_sqrt(static_cast<double>(squares / static_cast<T>(n)) + eps));
}

}  // namespace lwft::LWFT_ISA
