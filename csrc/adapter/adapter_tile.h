// What forward and backward of the adapter share on the CPU: how the tokens are cut into tiles, rows of a tile, the
// weights packed for the tile products.
#pragma once
#include "adapter/activation.h"
#include "adapter/adapter.h"
#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/operand.h"
#include "common/cpu/row.h"
#include "common/cpu/threads.h"
#include "common/cpu/transpose.h"

namespace lwft::LWFT_ISA {

// Up to so many tokens a weight is not worth packing: it is read once where it lies (dot_rows, combine_rows).
constexpr int64_t kFewTokens = 8;
// Then the work is cut into slices of a weight for the threads. With fewer products than this a slice is done before
// another thread has woken.
constexpr int64_t kSliceProducts = 64 * 1024;
// dot_rows takes four columns at once, combine_rows up to four vectors of them.
constexpr int64_t kDotColumns = 4;
template <class T>
constexpr int64_t kCombineColumns = 4 * kLanes<T>;

// Floats are multiplied in parts, where the machine can, from so many tokens and so wide a bottleneck on: each number of x
// is split for its products with the bottleneck, which have to be worth it.
constexpr int64_t kFewestTokensInParts = 64, kNarrowestInParts = 33;

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

// [0, total) in tiles of `rows`; the last may have a few more, see tiles_of.
struct Tiles {
  int64_t total, rows, count;

  int64_t begin(int64_t tile) const { return tile * rows; }
  int64_t size(int64_t tile) const { return tile + 1 < count ? rows : total - tile * rows; }
};

// Tiles begin at multiples of it: where a product takes 16 or 32 rows at once, 16 do. Rows in parts are kept for products
// over tokens, in groups of kPartRows.
template <class E>
constexpr int64_t kTileMultiple = std::is_same_v<E, FloatParts> ? kPartRows : 16;

// The matrix registers leave four rows and fewer to the vectors, which round otherwise (tile_amx.h). So that no result
// depends on the cut, no tile is so small unless all is.
inline Tiles tiles_of(int64_t total, int64_t rows) {
  constexpr int64_t kSmall = 4;
  return {total, rows, total > 0 ? maximum<int64_t>(1, ceil_div(total - kSmall, rows)) : 0};
}

// Tokens in tiles of about equal size, as many for each thread: small enough that a tile of model_dim columns stays in the
// second-level cache beside the weights, large enough that the weights are not fetched for a few rows only. Nothing is
// summed over a tile, so the number of threads, which this asks for, changes no result.
template <class E>
Tiles token_tiles(int64_t tokens, int64_t model_dim) {
  constexpr int64_t kMostRows = 128, kLeastMostRows = 64;
  constexpr int64_t kTileBytes = 384 * 1024;
  const int64_t row_bytes = model_dim * static_cast<int64_t>(sizeof(SumOf<E>));
  const int64_t most = maximum(kLeastMostRows, minimum(kMostRows, kTileBytes / row_bytes));
  const int64_t tiles = maximum<int64_t>(1, round_up(ceil_div(tokens, most), thread_count()));
  return tiles_of(tokens, round_up(maximum<int64_t>(1, ceil_div(tokens, tiles)), kTileMultiple<E>));
}

// ---- weights ----

// Whether the threads pack a weight together and then share it. Else each packs what it needs next, as it needs it: where
// a thread has a tile or two the pack stays in its own cache, and nobody waits or fetches what another has just written.
inline bool shares_packs(const Tiles& tiles) {
  constexpr int64_t kTilesPerThread = 2, kRowsWorthAPack = 32;
  return tiles.count > kTilesPerThread * thread_count() || tiles.rows < kRowsWorthAPack;
}

// By how many numbers along k a product may be cut, and accumulated, without a change of its bits.
template <class E>
constexpr int64_t kSumDepth = std::is_same_v<E, FloatParts> ? kChainDepth : kKBlock * kUnit<E>;

// Rows that are the left-hand side of several products: floats that are multiplied in parts are split once.
struct SplitTile {
  const FloatParts* data;
  int64_t depth;
};
template <class E>
auto left_of_several(const Tile<LeftOf<E>>& a, int64_t rows, int64_t k, Scratch& scratch) {
  if constexpr (std::is_same_v<E, FloatParts>) {
    FloatParts* const split = scratch.take<FloatParts>(split_size(rows, k));
    split_left(rows, k, a.data, a.row_stride, 1, split, 0, k);
    return SplitTile{split, k};
  } else {
    return a;
  }
}

// C (+)= the columns first .. first + k - 1 of A times panels.
template <class E>
void product(int64_t rows, int64_t n, int64_t k, const Tile<LeftOf<E>>& a, int64_t first, const E* panels, SumOf<E>* c,
             int64_t ldc, Mode mode) {
  gemm(rows, n, k, a.data + first, a.row_stride, 1, panels, c, ldc, mode);
}
inline void product(int64_t rows, int64_t n, int64_t k, const SplitTile& a, int64_t first, const FloatParts* panels,
                    float* c, int64_t ldc, Mode mode) {
  gemm_split(rows, n, k, a.data, first, a.depth, panels, c, ldc, mode);
}

// A weight as the right-hand side of gemm; if shared, packed in tasks of equal size.
template <class E>
class PackedWeight {
 public:
  // The (k, n) matrix whose element (i, j) is data[i * row_stride + j * col_stride].
  PackedWeight(DType dtype, const void* data, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n, bool shared,
               Scratch& scratch)
      : dtype_(dtype), data_(data), row_stride_(row_stride), col_stride_(col_stride), k_(k), n_(n) {
    if constexpr (kPanelsAreRows<E>) {
      // One panel of whole vectors is a row-major matrix: a weight that is one already needs no copy.
      if (dtype == dtype_of<E>() && col_stride == 1 && row_stride == n && n == padded<E>(n) && n <= kPanelColumns<E>) {
        panels_ = static_cast<const E*>(data);
        return;
      }
    }
    if (shared) panels_ = copy_ = scratch.take<E>(panel_size<E>(units<E>(k), n));
  }

  int64_t tasks() const { return copy_ == nullptr ? 0 : ceil_div(n_, kPanelColumns<E>) * ceil_div(k_, kDepth); }

  void pack(int64_t task) const {
    const int64_t depths = ceil_div(k_, kDepth);
    const int64_t j = task / depths * kPanelColumns<E>, l = task % depths * kDepth;
    const int64_t columns = minimum(kPanelColumns<E>, n_ - j);
    pack_operand(dtype_, element(dtype_, data_, l * row_stride_ + j * col_stride_), row_stride_, col_stride_,
                 minimum(kDepth, k_ - l), columns,
                 copy_ + j * depth() + panel_depth<E>(l / kUnit<E>) * padded<E>(columns));
  }

  // result = A times the columns j .. j + columns; j is a multiple of kPanelColumns<E>.
  template <class A>
  void multiply(int64_t rows, const A& a, int64_t j, int64_t columns, SumOf<E>* result, int64_t stride) const {
    if (panels_ != nullptr) {
      product(rows, columns, units<E>(k_), a, 0, panels_ + j * depth(), result, stride, Mode::overwrite);
      return;
    }
    // by the blocks in which gemm takes its sums, so the result is the same
    Scratch scratch;
    E* panels = scratch.take<E>(panel_size<E>(units<E>(kSumDepth<E>), kColumnsAtOnce));
    for (int64_t l = 0; l < k_; l += kSumDepth<E>) {
      const int64_t depth = minimum(kSumDepth<E>, k_ - l);
      for (int64_t i = 0; i < columns; i += kColumnsAtOnce) {
        const int64_t width = minimum(kColumnsAtOnce, columns - i);
        pack_operand(dtype_, element(dtype_, data_, l * row_stride_ + (j + i) * col_stride_), row_stride_, col_stride_,
                     depth, width, panels);
        product(rows, width, units<E>(depth), a, units<E>(l), panels, result + i, stride,
                l == 0 ? Mode::overwrite : Mode::accumulate);
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 4096 / kPanelColumns<E>;
  // Columns that are packed just before they are used: few, but where floats are split that is done once for all of them.
  static constexpr int64_t kColumnsAtOnce = std::is_same_v<E, FloatParts> ? 4 * kPanelColumns<E> : kPanelColumns<E>;

  // E in a column of the panels
  int64_t depth() const { return panel_depth<E>(units<E>(k_)); }

  DType dtype_;
  const void* data_;
  int64_t row_stride_, col_stride_, k_, n_;
  const E* panels_ = nullptr;
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

// Runs Kernel<E, X>(p).run(): what the products multiply (operand.h), and how activations are stored.
template <template <class, class> class Kernel, class Parameters>
void run_by_dtype(const Parameters& p) {
  if constexpr (kMultipliesBFloat16) {
    const bool all_bfloat16 = p.dtype == DType::bf16 && p.param_dtype == DType::bf16;
    if (all_bfloat16 && p.tokens > kFewTokens) return Kernel<BFloat16Pair, BFloat16>(p).run();
  }
  if constexpr (kSplitsFloat) {
    const bool pays = p.tokens >= kFewestTokensInParts && p.bottleneck >= kNarrowestInParts;
    if (pays && p.dtype != DType::f64) {
      switch (p.dtype) {
        case DType::bf16: return Kernel<FloatParts, BFloat16>(p).run();
        case DType::f16: return Kernel<FloatParts, Float16>(p).run();
        default: return Kernel<FloatParts, float>(p).run();
      }
    }
  }
  switch (p.dtype) {
    case DType::f64: return Kernel<double, double>(p).run();
    case DType::f32: return Kernel<float, float>(p).run();
    case DType::bf16: return Kernel<float, BFloat16>(p).run();
    case DType::f16: return Kernel<float, Float16>(p).run();
  }
}

// body(begin, end) for slices of the columns of a product with a weight where it lies, `depth` deep: one for each thread, if
// that is enough to do for it. Slices begin at multiples of `multiple`; every column is a sum of its own.
template <class Body>
void for_column_slices(int64_t tokens, int64_t columns, int64_t depth, int64_t multiple, const Body& body) {
  const int64_t least = ceil_div(kSliceProducts, maximum<int64_t>(1, tokens) * depth);
  const int64_t slice = round_up(maximum(least, ceil_div(columns, thread_count())), multiple);
  parallel_for(ceil_div(columns, slice),
               [&](int64_t task) { body(task * slice, minimum((task + 1) * slice, columns)); });
}

}  // namespace lwft::LWFT_ISA
