#if defined(__aarch64__) && !defined(__clang__)
// gcc would load a whole column of A before the first product, and have no registers left for the sums.
#pragma GCC optimize("no-schedule-insns")
#endif

#include "common/cpu/tile.h"

#include "common/cpu/convert.h"
#include "common/cpu/transpose.h"
#if defined(__AMX_BF16__)
#include "common/cpu/tile_parts.h"
#endif

namespace lwft::LWFT_ISA {

// ---- the micro-kernel ----

namespace {

template <class T>
void clear_rows(int64_t m, int64_t columns, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] = T{0};
  }
}

// How many vectors of sums a tile of C keeps in registers, leaving room for a row of B and an element of A.
constexpr int kSums = kVectorRegisters == 32 ? 24 : 12;
// A narrow tile has more rows, so that it still has enough independent sums.
constexpr int tile_rows(int vectors) { return minimum(12, kSums / vectors); }
static_assert(tile_rows(kPanelVectors) == kTileRows<float>);

// How the tile multiplies elements of T: a vector of them, one of them in all lanes, and the sum.
template <class T>
struct Product {
  using Row = Vec<T>;
  static Row row(const T* b) { return load(b); }
  static Row element(const T* a) { return broadcast(*a); }
  static Vec<T> add(Row a, Row b, Vec<T> sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16Pair> {
  using Row = __m512bh;
  static Row row(const BFloat16Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Row element(const BFloat16Pair* a) { return (__m512bh)_mm512_set1_epi32(bit_cast<int32_t>(*a)); }
  static Vec<float> add(Row a, Row b, Vec<float> sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// C[Rows, Vectors] (+)= A[Rows, k] B[k, Vectors]; b_row is the row stride of B; with every k memory `ahead` is asked for, if
// there is any, and the address moved on by `pace`. Every loop over `sums` must be unrolled in full, or gcc
// leaves the array on the stack (measured: 38 instead of 110 GFLOP/s).
template <class T, int Rows, int Vectors>
void tile(int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, SumOf<T>* c, int64_t ldc,
          Mode mode, const char* ahead, int64_t pace) {
  constexpr int N = kLanes<T>;
  using P = Product<T>;
  using Sum = Vec<SumOf<T>>;
  Sum sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sums[i][j] = Sum{};
  }
  // Two pointers into A: the multiples of a_row for twelve rows do not fit the registers for addresses.
  const T* a_low = Rows > 6 ? a + 6 * a_row : a;
  const bool fetches = ahead != nullptr;
  for (int64_t l = 0; l < k; ++l) {
    if (fetches) {
      prefetch_to_second_cache(ahead);
      ahead += pace;
    }
    typename P::Row row[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) row[j] = P::row(b + j * N);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const typename P::Row element = P::element(i < 6 ? a + i * a_row : a_low + (i - 6) * a_row);
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sums[i][j] = P::add(element, row[j], sums[i][j]);
    }
    a += a_col;
    a_low += a_col;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      SumOf<T>* to = c + i * ldc + j * N;
      store(to, mode == Mode::accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class T>
using TileFunction = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, SumOf<T>*, int64_t, Mode,
                              const char*, int64_t);

// tile<T, rows, Vectors> for rows = 1 .. tile_rows(Vectors), at [rows - 1].
template <class T, int Vectors, class Rows = std::make_integer_sequence<int, tile_rows(Vectors)>>
struct TileTable;
template <class T, int Vectors, int... Rows>
struct TileTable<T, Vectors, std::integer_sequence<int, Rows...>> {
  static constexpr TileFunction<T> functions[] = {tile<T, Rows + 1, Vectors>...};
};

// C (+)= A times one panel of `width` columns, by tiles of that width and of about equal height: 8 rows are
// 4 + 4, not 6 + 2.
template <class T, int Vectors = kPanelVectors>
void panel_product(int64_t width, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* panel,
                   int64_t b_row, SumOf<T>* c, int64_t ldc, Mode mode, Ahead& ahead) {
  if constexpr (Vectors > 1) {
    if (width < Vectors * kLanes<T>)
      return panel_product<T, Vectors - 1>(width, m, k, a, a_row, a_col, panel, b_row, c, ldc, mode, ahead);
  }
  for (int64_t chunks = ceil_div(m, tile_rows(Vectors)); chunks > 0; --chunks) {
    const int64_t rows = ceil_div(m, chunks);
    TileTable<T, Vectors>::functions[rows - 1](k, a, a_row, a_col, panel, b_row, c, ldc, mode, ahead.take(k),
                                               ahead.pace);
    m -= rows;
    a += rows * a_row;
    c += rows * ldc;
  }
}

}  // namespace

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* panels, SumOf<T>* c,
          int64_t ldc, Mode mode, Ahead ahead) {
  if (k == 0 && mode == Mode::overwrite) clear_rows(m, padded<T>(n), c, ldc);
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16Pair>) {
    if (m > kRowsForTiles && k > 0 && (a_row == 1 || a_col == 1)) {
      return gemm_on_tiles(m, n, k, a, a_row, a_col, panels, c, ldc, mode, ahead);
    }
  }
#endif
  if (ahead.bytes > 0) {
    const int vectors = static_cast<int>(minimum<int64_t>(ceil_div(n, kLanes<T>), kPanelVectors));
    ahead.spread(ceil_div(n, kPanelColumns<T>) * ceil_div(m, tile_rows(vectors)) * k, 1);
  }
  for (int64_t k0 = 0; k0 < k; k0 += kKBlock) {
    const Mode block_mode = k0 == 0 ? mode : Mode::accumulate;
    for (int64_t j = 0; j < n; j += kPanelColumns<T>) {
      const int64_t width = minimum(kPanelColumns<T>, padded<T>(n - j));
      panel_product(width, m, minimum(kKBlock, k - k0), a + k0 * a_col, a_row, a_col, panels + j * k + k0 * width,
                    width, c + j, ldc, block_mode, ahead);
    }
  }
}

#if defined(__AMX_BF16__)
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const FloatParts* panels,
          float* c, int64_t ldc, Mode mode) {
  gemm_with_rows(m, n, k, a, a_row, a_col, panels, 0, k, c, ldc, mode);
}

void gemm_split(int64_t m, int64_t n, int64_t k, const FloatParts* split, int64_t first, int64_t depth,
                const FloatParts* panels, float* c, int64_t ldc, Mode mode) {
  if (k == 0 && mode == Mode::overwrite) clear_rows(m, padded<FloatParts>(n), c, ldc);
  gemm_on_split_parts(m, n, k, split, first, depth, panels, c, ldc, mode);
}
#endif

template <class E>
void gemm_with_rows(int64_t m, int64_t n, int64_t k, const LeftOf<E>* a, int64_t a_row, int64_t a_col, const E* panels,
                    int64_t first, int64_t packed, SumOf<E>* c, int64_t ldc, Mode mode) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<E, FloatParts>) {
    if (k == 0 && mode == Mode::overwrite) clear_rows(m, padded<E>(n), c, ldc);
    return gemm_on_parts(m, n, k, a, a_row, a_col, panels, first, packed, c, ldc, mode);
  } else
#endif
  {
    for (int64_t j = 0; j < n; j += kPanelColumns<E>) {
      const int64_t width = minimum(kPanelColumns<E>, padded<E>(n - j));
      gemm(m, width, k, a, a_row, a_col, panels + j * packed + first * width, c + j, ldc, mode);
    }
  }
}

template <class T>
void gemm_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c,
               int64_t ldc, Mode mode) {
  if (k == 0 && mode == Mode::overwrite) clear_rows(m, padded<T>(n), c, ldc);
  Ahead nothing;
  for (int64_t k0 = 0; k0 < k; k0 += kKBlock) {
    const Mode block_mode = k0 == 0 ? mode : Mode::accumulate;
    for (int64_t j = 0; j < n; j += kPanelColumns<T>) {
      panel_product(minimum(kPanelColumns<T>, padded<T>(n - j)), m, minimum(kKBlock, k - k0), a + k0 * a_col, a_row,
                    a_col, b + k0 * ldb + j, ldb, c + j, ldc, block_mode, nothing);
    }
  }
}

// ---- packing ----

namespace {

// A panel of `columns` columns from rows that lie as they are.
template <class T, class Storage>
inline void pack_rows(const Storage* source, int64_t row_stride, int64_t k, int64_t columns, T* to) {
  constexpr int N = kLanes<T>;
  const int64_t width = padded<T>(columns), whole = columns / N * N;
  for (int64_t l = 0; l < k; ++l) {
    const Storage* from = source + l * row_stride;
    for (int64_t j = 0; j < whole; j += N) store(to + l * width + j, load_as<T>(from + j));
    if (whole < columns) store(to + l * width + whole, load_first_as<T>(from + whole, columns - whole));
  }
}

template <class T, class Storage>
inline void pack_typed(const Storage* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n, T* panels) {
  constexpr int N = kLanes<T>;
  for (int64_t first = 0; first < n; first += kPanelColumns<T>) {
    const int64_t panel_columns = minimum(kPanelColumns<T>, n - first), width = padded<T>(panel_columns);
    T* panel = panels + first * k;
    if (col_stride == 1) {
      pack_rows(source + first, row_stride, k, panel_columns, panel);
      continue;
    }
    for (int64_t j = 0; j < panel_columns; j += N) {
      const int64_t columns = minimum<int64_t>(N, panel_columns - j);
      const Storage* from = source + (first + j) * col_stride;
      if (row_stride == 1) {
        pack_transposed(from, col_stride, k, columns, panel + j, width);
        continue;
      }
      for (int64_t l = 0; l < k; ++l) {
        for (int64_t i = 0; i < N; ++i) {
          panel[l * width + j + i] = i < columns ? load_one<T>(from + l * row_stride + i * col_stride) : T{0};
        }
      }
    }
  }
}

}  // namespace

template <class T>
void pack_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                 T* panels) {
  visit_storage(dtype, [&](auto storage) {
    pack_typed(static_cast<const decltype(storage)*>(source), row_stride, col_stride, k, n, panels);
  });
}

namespace {

// A vector of bfloat16, widened to words; the first `count` elements of a row, zeros after them.
using Words = Vec<uint32_t>;

inline Words bfloat16_words(const BFloat16* from) {
  Lanes<uint16_t, kLanes<float>> row;
  __builtin_memcpy(&row, from, sizeof(row));
  return __builtin_convertvector(row, Words);
}
inline Words bfloat16_words(const float* from) {
  return __builtin_convertvector(narrow_bfloat16<kLanes<float>>(load(from)), Words);
}
template <class Storage>
inline Words bfloat16_words(const Storage* from, int64_t count) {
  Storage row[kLanes<float>] = {};
  __builtin_memcpy(row, from, static_cast<size_t>(count) * sizeof(Storage));
  return bfloat16_words(row);
}

inline void store_pairs(BFloat16Pair* to, Words first, Words second) {
  const Words words = first | (second << 16);
  __builtin_memcpy(to, &words, sizeof(words));
}

// A panel of `columns` columns from rows that lie as they are.
template <class Storage>
inline void pack_pair_rows(const Storage* source, int64_t row_stride, int64_t k, int64_t columns, BFloat16Pair* to) {
  constexpr int N = kLanes<float>;
  const int64_t width = padded<BFloat16Pair>(columns), whole = columns / N * N;
  for (int64_t l = 0; l < k; l += 2) {
    const Storage* first = source + l * row_stride;
    const Storage* second = first + row_stride;
    BFloat16Pair* row = to + l / 2 * width;
    const bool alone = l + 1 == k;
    for (int64_t j = 0; j < whole; j += N) {
      store_pairs(row + j, bfloat16_words(first + j), alone ? Words{} : bfloat16_words(second + j));
    }
    if (const int64_t rest = columns - whole; rest > 0) {
      const Words below = alone ? Words{} : bfloat16_words(second + whole, rest);
      store_pairs(row + whole, bfloat16_words(first + whole, rest), below);
    }
  }
}

template <class Storage>
inline void pack_pairs_typed(const Storage* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                             BFloat16Pair* panels) {
  constexpr int64_t N = kLanes<BFloat16Pair>, kWidth = kPanelColumns<BFloat16Pair>;
  for (int64_t start = 0; start < n; start += kWidth) {
    const int64_t panel_columns = minimum(kWidth, n - start), width = padded<BFloat16Pair>(panel_columns);
    BFloat16Pair* panel = panels + start * pairs(k);
    if (col_stride == 1) {
      pack_pair_rows(source + start, row_stride, k, panel_columns, panel);
      continue;
    }
    for (int64_t j = 0; j < panel_columns; j += N) {
      const int64_t columns = minimum(N, panel_columns - j);
      const Storage* from = source + (start + j) * col_stride;
      BFloat16Pair* to = panel + j;
      int64_t l = 0;
      if (row_stride == 1 && sizeof(Storage) == 2) {
        // Pairs lie together already, if not as words that are aligned: transpose them as words (which are only moved,
        // whatever number they are).
        pack_transposed_bytes<float, float>(from, col_stride * 2, k / 2, columns, reinterpret_cast<float*>(to), width);
        l = k / 2 * 2;
      }
      for (; l < k; l += 2) {
        for (int64_t i = 0; i < N; ++i) {
          const Storage* first = from + l * row_stride + i * col_stride;
          const uint32_t low = i < columns ? bfloat16_words(first, 1)[0] : 0;
          const uint32_t high = i < columns && l + 1 < k ? bfloat16_words(first + row_stride, 1)[0] : 0;
          to[l / 2 * width + i] = {static_cast<uint16_t>(low), static_cast<uint16_t>(high)};
        }
      }
    }
  }
}

}  // namespace

void pack_pair_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                      BFloat16Pair* panels) {
  if (dtype == DType::bf16) {
    pack_pairs_typed(static_cast<const BFloat16*>(source), row_stride, col_stride, k, n, panels);
  } else {
    pack_pairs_typed(static_cast<const float*>(source), row_stride, col_stride, k, n, panels);
  }
}

// ---- products without packing ----

namespace {

// Neighbouring lanes of a, then those of b, added in pairs.
template <class V, int... I>
inline V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// to[i] = the sum over the lanes of v[i], in a quarter of the shuffles of four calls of sum().
template <class T>
inline void store_sums(const Vec<T> (&v)[4], T* to) {
  constexpr int N = kLanes<T>;
  using Index = std::make_integer_sequence<int, N>;
  const Vec<T> first = add_pairs(v[0], v[1], Index{}), second = add_pairs(v[2], v[3], Index{});
  if constexpr (N == 2) {
    store(to, first);
    store(to + 2, second);
  } else {
    Vec<T> all = add_pairs(first, second, Index{});  // N / 4 lanes for each of the four
    if constexpr (N >= 8) all = add_pairs(all, all, Index{});
    if constexpr (N >= 16) all = add_pairs(all, all, Index{});
    __builtin_memcpy(to, &all, 4 * sizeof(T));
  }
}

// C[i, j] (+)= sum_l A[i, l] B[j, l] for Rows rows of A, Columns (4 or 1) rows of B; k in blocks as in gemm.
template <class T, int Rows, int Columns, class Storage>
[[gnu::noinline]] void dot_block(int64_t k, const T* a, int64_t lda, const Storage* b, int64_t ldb, T* c, int64_t ldc,
                                 Mode mode) {
  constexpr int N = kLanes<T>;
  for (int64_t k0 = 0; k0 < k; k0 += kKBlock) {
    const int64_t end = minimum(k0 + kKBlock, k);
    Vec<T> sums[Rows][Columns];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sums[i][j] = Vec<T>{};
    }
    int64_t l = k0;
    for (; l + N <= end; l += N) {
      Vec<T> b_part[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) b_part[j] = load_as<T>(b + j * ldb + l);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> a_part = load(a + i * lda + l);
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sums[i][j] = fma(a_part, b_part[j], sums[i][j]);
      }
    }
    if (l < end) {
      Vec<T> b_part[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) b_part[j] = load_first_as<T>(b + j * ldb + l, end - l);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> a_part = load_first(a + i * lda + l, end - l);
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sums[i][j] = fma(a_part, b_part[j], sums[i][j]);
      }
    }
    const bool accumulate = mode == Mode::accumulate || k0 > 0;
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      T row[Columns];
      if constexpr (Columns == 4) {
        store_sums<T>(sums[i], row);
      } else {
        row[0] = sum(sums[i][0]);
      }
      for (int j = 0; j < Columns; ++j) {
        T& to = c[i * ldc + j];
        to = accumulate ? to + row[j] : row[j];
      }
    }
  }
}

// C[i, j] (+)= sum_l A[i, l] B[l, j] for k <= kKBlock, Rows rows and Vectors vectors of columns: 4, or 1 with
// the first `columns` lanes only. A single vector is summed in four chains, each a quarter of the additions: one alone would
// wait for every addition to end, and be the less exact the longer it is.
template <class T, int Rows, int Vectors, class Storage>
[[gnu::noinline]] void combine_block(int64_t k, int64_t columns, const T* a, int64_t lda, const Storage* b, int64_t ldb,
                                     T* c, int64_t ldc, Mode mode) {
  constexpr int N = kLanes<T>;
  constexpr int kChains = Vectors > 1 ? 1 : 4;
  const bool whole = Vectors > 1 || columns == N;
  Vec<T> sums[Rows][Vectors], more[kChains][Rows];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sums[i][j] = Vec<T>{};
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) more[chain][i] = Vec<T>{};
  }
  int64_t l = 0;
  if constexpr (kChains > 1) {
    for (; l + kChains <= k; l += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        const Storage* from = b + (l + chain) * ldb;
        const Vec<T> b_part = whole ? load_as<T>(from) : load_first_as<T>(from, columns);
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          Vec<T>& sum = chain == 0 ? sums[i][0] : more[chain][i];
          sum = fma(broadcast(a[i * lda + l + chain]), b_part, sum);
        }
      }
    }
  }
  for (; l < k; ++l) {
    Vec<T> b_part[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const Storage* from = b + l * ldb + j * N;
      b_part[j] = whole ? load_as<T>(from) : load_first_as<T>(from, columns);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> element = broadcast(a[i * lda + l]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sums[i][j] = fma(element, b_part[j], sums[i][j]);
    }
  }
  if constexpr (kChains > 1) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) sums[i][0] = (sums[i][0] + more[1][i]) + (more[2][i] + more[3][i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      T* to = c + i * ldc + j * N;
      const bool accumulate = mode == Mode::accumulate;
      if (whole) {
        store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
      } else {
        store_first(to, accumulate ? load_first(to, columns) + sums[i][j] : sums[i][j], columns);
      }
    }
  }
}

// call(rows, i) for groups of rows of A that together are 0 .. m-1: rows is a compile-time 4 (where there are
// registers for it), 2 or 1, i the first row of the group.
template <class Call>
inline void for_groups_of_rows(int64_t m, const Call& call) {
  int64_t i = 0;
  if constexpr (kVectorRegisters == 32) {
    for (; i + 4 <= m; i += 4) call(std::integral_constant<int, 4>{}, i);
  }
  for (; i + 2 <= m; i += 2) call(std::integral_constant<int, 2>{}, i);
  if (i < m) call(std::integral_constant<int, 1>{}, i);
}

}  // namespace

template <class T>
void dot_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, DType b_dtype, const void* b, int64_t ldb, T* c,
              int64_t ldc, Mode mode) {
  if (k == 0 && mode == Mode::overwrite) clear_rows(m, n, c, ldc);
  visit_storage(b_dtype, [&](auto storage) {
    for (int64_t j = 0; j < n;) {
      const int columns = j + 4 <= n ? 4 : 1;
      const auto* b_rows = static_cast<const decltype(storage)*>(b) + j * ldb;
      for_groups_of_rows(m, [&](auto rows, int64_t i) {
        if (columns == 4) {
          dot_block<T, rows, 4>(k, a + i * lda, lda, b_rows, ldb, c + i * ldc + j, ldc, mode);
        } else {
          dot_block<T, rows, 1>(k, a + i * lda, lda, b_rows, ldb, c + i * ldc + j, ldc, mode);
        }
      });
      j += columns;
    }
  });
}

template <class T>
void combine_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, DType b_dtype, const void* b, int64_t ldb,
                  T* c, int64_t ldc, Mode mode) {
  constexpr int64_t N = kLanes<T>;
  if (k == 0 && mode == Mode::overwrite) clear_rows(m, n, c, ldc);
  visit_storage(b_dtype, [&](auto storage) {
    for (int64_t k0 = 0; k0 < k; k0 += kKBlock) {
      const int64_t depth = minimum(kKBlock, k - k0);
      const Mode block_mode = k0 == 0 ? mode : Mode::accumulate;
      for (int64_t j = 0; j < n;) {
        const int64_t columns = j + 4 * N <= n ? 4 * N : minimum(N, n - j);
        const auto* b_block = static_cast<const decltype(storage)*>(b) + k0 * ldb + j;
        for_groups_of_rows(m, [&](auto rows, int64_t i) {
          const T* a_block = a + i * lda + k0;
          T* c_block = c + i * ldc + j;
          if (columns == 4 * N) {
            combine_block<T, rows, 4>(depth, columns, a_block, lda, b_block, ldb, c_block, ldc, block_mode);
          } else {
            combine_block<T, rows, 1>(depth, columns, a_block, lda, b_block, ldb, c_block, ldc, block_mode);
          }
        });
        j += columns;
      }
    }
  });
}

// ---- what the kernels link to ----

template void pack_panels<float>(DType, const void*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_panels<double>(DType, const void*, int64_t, int64_t, int64_t, int64_t, double*);
template void gemm<float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t,
                          Mode, Ahead);
template void gemm_rows<float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*,
                               int64_t, Mode);
template void gemm_rows<double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, const double*, int64_t,
                                double*, int64_t, Mode);
template void gemm<double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, const double*, double*, int64_t,
                           Mode, Ahead);
#if defined(__AVX512BF16__)
template void gemm<BFloat16Pair>(int64_t, int64_t, int64_t, const BFloat16Pair*, int64_t, int64_t, const BFloat16Pair*,
                                 float*, int64_t, Mode, Ahead);
#endif
template void gemm_with_rows<float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t,
                                    int64_t, float*, int64_t, Mode);
template void gemm_with_rows<double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, const double*, int64_t,
                                     int64_t, double*, int64_t, Mode);
#if defined(__AVX512BF16__)
template void gemm_with_rows<BFloat16Pair>(int64_t, int64_t, int64_t, const BFloat16Pair*, int64_t, int64_t,
                                           const BFloat16Pair*, int64_t, int64_t, float*, int64_t, Mode);
#endif
#if defined(__AMX_BF16__)
template void gemm_with_rows<FloatParts>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const FloatParts*,
                                         int64_t, int64_t, float*, int64_t, Mode);
#endif
template void dot_rows<float>(int64_t, int64_t, int64_t, const float*, int64_t, DType, const void*, int64_t, float*,
                              int64_t, Mode);
template void dot_rows<double>(int64_t, int64_t, int64_t, const double*, int64_t, DType, const void*, int64_t, double*,
                               int64_t, Mode);
template void combine_rows<float>(int64_t, int64_t, int64_t, const float*, int64_t, DType, const void*, int64_t, float*,
                                  int64_t, Mode);
template void combine_rows<double>(int64_t, int64_t, int64_t, const double*, int64_t, DType, const void*, int64_t,
                                   double*, int64_t, Mode);

}  // namespace lwft::LWFT_ISA
