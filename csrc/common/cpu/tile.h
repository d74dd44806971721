// Small matrix products out of cache: the one GEMM micro-kernel family of the package. T is float or double; what is further
// down does the same with pairs of bfloat16, and with floats that matrix registers multiply in three bfloat16 parts.
//
//     gemm:  C[m, n] (+)= A[m, k] B[k, n]
//
// How it works. A tile of C lives in registers: a few rows by 1..4 vectors. For every k one row of B (its
// vectors) is loaded and each row of A adds its broadcast element times it: 24 independent sums on a machine
// with 32 vector registers (6 rows x 4 vectors), 12 with 16 registers (6 x 2), which is enough to keep two
// multiply-add units busy.
//
//   B  is packed into panels as wide as the tile: [panel][k][width]. All panels are kPanelColumns<T> wide
//      but the last, which holds what is left, rounded up to whole vectors and filled with zeros. So every
//      load is a whole vector, B streams through the cache in order, and a rank of 16 does not pay for 64
//      columns.
//   A  is read by single elements, with any strides: it needs no packing, and its transpose is just other
//      strides.
//   C  is row-major with row stride ldc >= padded<T>(n): whole vectors are written, zeros in the padding. It
//      is a tile buffer of the caller, who adds bias or scale and converts as it is stored.
//
// The sum over k is taken in blocks of kKBlock with fresh registers, then added to C: one long chain of
// additions loses 2-4 times the accuracy at k = 4096. A given (m, n, k) is always summed in the same order.
//
// The products are compiled in tile_cpu.cpp, once per level, so that no kernel pays for compiling them again.
#pragma once
#include "common/cpu/vec.h"

namespace lwft::LWFT_ISA {

constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
template <class T>
constexpr int64_t kPanelColumns = kPanelVectors * kLanes<T>;
constexpr int64_t kKBlock = 256;

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int kSecondCache = 2;  // for __builtin_prefetch

// Rows that a product takes at once: a caller's block of rows is best a multiple of it (48, say).
template <class T>
constexpr int64_t kTileRows = 6;

enum class Mode { overwrite, accumulate };

// Memory that is read next, for a product to fetch into the second cache while it computes. What a product streams from
// memory, it would wait for: no prefetcher of the machine goes past the end of a page. The requests are spread evenly over
// the product, or they would stand in the way of its own. (64 rows by a weight of 4096 x 4096, on a Xeon: 120 GFLOP/s
// without, 150 with all requests at once, 171 so.)
struct Ahead {
  const char* next = nullptr;
  int64_t bytes = 0, pace = 0;

  Ahead() = default;
  Ahead(const void* data, int64_t size) : next(static_cast<const char*>(data)), bytes(size) {}

  // The share of one product out of `count`.
  Ahead share(int64_t index, int64_t count) const {
    const int64_t begin = bytes * index / count;
    return {next + begin, bytes * (index + 1) / count - begin};
  }
  // By how many bytes a step has to go on that so many steps see all of it; up to most_lines cache lines.
  void spread(int64_t steps, int64_t most_lines) {
    pace = minimum(ceil_div(bytes, maximum<int64_t>(steps, 1)), most_lines * kLine);
  }
  // Where `steps` steps begin; null when there is nothing left.
  const char* take(int64_t steps) {
    if (bytes <= 0) return nullptr;
    const char* const here = next;
    next += steps * pace;
    bytes -= steps * pace;
    return here;
  }
};
inline void prefetch_to_second_cache(const char* address) {
  constexpr int kRead = 0, kSecondCache = 2;
  __builtin_prefetch(address, kRead, kSecondCache);
}

// n rounded up to whole vectors: the least row stride of a C of n columns.
template <class T>
constexpr int64_t padded(int64_t n) {
  return round_up(n, kLanes<T>);
}

// How many T a column of panels of k rows takes. Of k rows that are part of more, k a multiple of kPartRows: how far on the
// next ones begin.
constexpr int64_t kPartRows = 32;
struct FloatParts;
template <class T>
constexpr int64_t panel_depth(int64_t k) {
  return std::is_same_v<T, FloatParts> ? ceil_div(k, kPartRows) * (kPartRows * 3 / 2) : k;
}

// How many T the panels of a (k, n) matrix take.
template <class T>
constexpr int64_t panel_size(int64_t k, int64_t n) {
  return panel_depth<T>(k) * padded<T>(n);
}

// Packs the (k, n) matrix whose element (i, j) is source[i * row_stride + j * col_stride], of any dtype. Fast
// where either stride is 1: col_stride for B as it lies, row_stride for a B given as its transpose (a weight
// (n, k)).
template <class T>
void pack_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                 T* panels);

// What sums of products of T are kept in.
template <class T>
struct SumType {
  using type = T;
};
template <class T>
using SumOf = typename SumType<T>::type;

// C[m, n] (+)= A B; A(i, l) = a[i * a_row + l * a_col], B packed by pack_panels, ldc >= padded<T>(n). The
// columns from j on, j a multiple of kPanelColumns<T>, are a product of their own: panels + j * k, c + j.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* panels, SumOf<T>* c,
          int64_t ldc, Mode mode, Ahead ahead = {});

// The same with a row-major B (k, n) where it lies, of row stride ldb: for one that is used by few rows of A only, where a
// copy into panels costs as much as the product. padded<T>(n) columns of B are read.
template <class T>
void gemm_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c,
               int64_t ldc, Mode mode);

// ---- bfloat16 times bfloat16 with sums in float, at twice the rate, on machines that multiply pairs of them

// Two neighbours along k; where k is odd the last `second` is zero.
struct BFloat16Pair {
  uint16_t first, second;
};
template <>
struct SumType<BFloat16Pair> {
  using type = float;
};

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif
#if defined(__AMX_BF16__)
template <>
constexpr int64_t kTileRows<BFloat16Pair> = 32;  // two tile registers: tile_amx.h
#endif

// All of the above holds for gemm<BFloat16Pair> with k, a_row, a_col and the panels counted in pairs; in matrix registers
// (tile_amx.h) the sum over k is one chain. It exists only where kMultipliesBFloat16. A row-major bfloat16 matrix of even
// row stride and even k is an A as it lies.

constexpr int64_t pairs(int64_t k) { return ceil_div(k, 2); }

// pack_panels of a bfloat16 or float32 (k, n) matrix, rounded to bfloat16: pairs(k) rows of pairs. Fast where
// col_stride is 1, or row_stride is 1 and the matrix is a bfloat16 one.
void pack_pair_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                      BFloat16Pair* panels);

// ---- float times float in matrix registers, up to twice as fast as in vectors (64 x 256 sums over 64: 370 GFLOP/s, 200)

// A word of panels in which every float stands as the three bfloat16 that add up to it (tile_parts.h). A is of floats, and
// split on its way into the product, so k, a_row and a_col count floats. The sums are as accurate as those of gemm<float>.
struct FloatParts {
  uint32_t word;
};
template <>
struct SumType<FloatParts> {
  using type = float;
};
#if defined(__AMX_BF16__)
constexpr bool kSplitsFloat = true;
template <>
constexpr int64_t kTileRows<FloatParts> = 32;
#else
constexpr bool kSplitsFloat = false;
#endif

// What the left-hand side of panels of E is made of.
template <class E>
struct LeftType {
  using type = E;
};
template <>
struct LeftType<FloatParts> {
  using type = float;
};
template <class E>
using LeftOf = typename LeftType<E>::type;

void pack_part_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                      FloatParts* panels);
// A with any strides, fast where one of them is 1. Columns from j on are at panels + j * panel_depth<FloatParts>(k).
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const FloatParts* panels,
          float* c, int64_t ldc, Mode mode);

// A chain of sums is as accurate as those of gemm<float> up to so many numbers; what is left are sums of their own, which are
// added to C. So a product that is cut along k at multiples of it, and accumulated, has the bits of the whole.
constexpr int64_t kChainDepth = 512;

// An A that several products share is split once. Of a split (m, depth) A, which takes split_size(m, depth) words, the first
// function fills the columns first .. first + k - 1 and the second multiplies by them; first is a multiple of kPartRows.
constexpr int64_t split_size(int64_t m, int64_t depth) { return round_up(m, 16) * panel_depth<FloatParts>(depth); }
void split_left(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, FloatParts* split, int64_t first,
                int64_t depth);
void gemm_split(int64_t m, int64_t n, int64_t k, const FloatParts* split, int64_t first, int64_t depth,
                const FloatParts* panels, float* c, int64_t ldc, Mode mode);

// The product with the rows first .. first + k - 1 of a packed B of `packed` rows; first is a multiple of kPartRows.
template <class E>
void gemm_with_rows(int64_t m, int64_t n, int64_t k, const LeftOf<E>* a, int64_t a_row, int64_t a_col, const E* panels,
                    int64_t first, int64_t packed, SumOf<E>* c, int64_t ldc, Mode mode);

// ---- few rows ----

// The two products without packing, for so few rows of A (m up to about 8) that B is not worth a copy: one
// token, one query. B has unit stride along its rows, any dtype, and is read from memory once for all of A.
//
//     dot_rows:      C[i, j] (+)= sum_l A[i, l] B[j, l]      B (n, k): scores of a query against keys
//     combine_rows:  C[i, j] (+)= sum_l A[i, l] B[l, j]      B (k, n): values weighted by probabilities
//
// A (m, k) and C (m, n) are row-major; of C exactly n columns are written.
template <class T>
void dot_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, DType b_dtype, const void* b, int64_t ldb, T* c,
              int64_t ldc, Mode mode);
template <class T>
void combine_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, DType b_dtype, const void* b, int64_t ldb,
                  T* c, int64_t ldc, Mode mode);

}  // namespace lwft::LWFT_ISA
