// gemm on FloatParts: products of floats on matrix registers (Intel AMX), for tile_cpu.cpp.
//
// A float32 is the sum of three bfloat16, high + middle + low, of 8 of its 24 bits each. Of the nine products of the parts of
// two numbers, six are summed,
//
//     x y = hh' + (hm' + mh') + (hl' + mm' + lh') + less than 2^-24 |x y|,
//
// which leaves an error like that of one rounding to float32 (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", ARITH 2019). The instruction adds 32 products at once
// to a sum, so sums are rounded less often than in gemm<float>, whose errors are twice as large (numbers of either sign, k from
// 64 to 11008; python_tests/common/test_tile.py).
//
// Six products at 3.5 TFLOP/s are 580 GFLOP/s of float32, on a core whose vectors do 200. So many it does on zeros; on random
// numbers, for which it takes more power, 375 to 500, and with the splitting 260 to 390.
//
// What is otherwise than in float32: numbers below 2^-110 lose their last bits, for the instruction reads numbers below 2^-126
// as zero, which parts of them are; and a product with infinity is NaN.
//
// Both operands lie in groups of 32 numbers along k, [group][part][16 pairs]: of each number the upper half of a word is a
// part as it is. A pair is numbers i and i + 16 of a group, for then it is made of two vectors by a shift and a mask.
//
//   B  A panel, [group][part][16 pairs][width], is a column of tiles as it lies.
//   A  A few rows at a time are split, for all columns of C: [16 rows][group][part] tiles, which stay in the first cache.
#pragma once
#include "common/cpu/tile_amx.h"

namespace lwft::LWFT_ISA {
namespace {

constexpr int kParts = 3;
// Rows of A, and numbers along k, that are split at once. (64 x 64 sums over 256: 310 GFLOP/s; of twice the rows or numbers,
// which do not fit the first cache, 240.)
constexpr int64_t kSplitRows = 2 * kTileSide, kSplitDepth = 4 * kPartRows;
constexpr int64_t kTileWords = kTileSide * kTileSide;
static_assert(kPartRows == 2 * kTileSide && kLanes<float> == kTileSide);

// The square whose element (i, j) is source[i * row_stride + j * col_stride], as rows; zeros past `rows` and `columns`.
template <class Storage>
[[gnu::noinline]] void load_square(const Storage* source, int64_t row_stride, int64_t col_stride, int64_t rows,
                                   int64_t columns, Vec<float> (&square)[kTileSide]) {
  constexpr int64_t N = kTileSide;
  // Lines of the memory, each contiguous.
  const auto lines = [&](int64_t stride, int64_t count, int64_t length) {
    if (count == N && length == N) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < N; ++i) square[i] = load_as<float>(source + i * stride);
      return;
    }
    for (int64_t i = 0; i < N; ++i) {
      square[i] = i < count ? load_first_as<float>(source + i * stride, length) : Vec<float>{};
    }
  };
  rows = minimum(N, rows);
  columns = minimum(N, columns);
  if (rows <= 0 || columns <= 0) {
    for (auto& row : square) row = Vec<float>{};
  } else if (col_stride == 1) {
    lines(row_stride, rows, columns);
  } else if (row_stride == 1) {
    lines(col_stride, columns, rows);
    transpose_steps<1>(square);
  } else {
    float row[N];
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        row[j] = i < rows && j < columns ? load_one<float>(source + i * row_stride + j * col_stride) : 0.0f;
      }
      square[i] = load(row);
    }
  }
}

// The parts of two vectors of numbers, as pairs, to `to` and kParts - 1 places `next` words apart after it.
inline void store_parts(Vec<float> first, Vec<float> second, int64_t next, FloatParts* to) {
  using Bits = Vec<uint32_t>;
  constexpr uint32_t kUpper = 0xFFFF0000u;
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    Bits upper = bit_cast<Bits>(first), lower = bit_cast<Bits>(second);
    if (part + 1 < kParts) {  // to the nearest; of the last part no bit is left over
      upper = (upper + 0x8000u) & kUpper;
      lower = (lower + 0x8000u) & kUpper;
      first -= bit_cast<Vec<float>>(upper);
      second -= bit_cast<Vec<float>>(lower);
    }
    const Bits pairs = (upper >> 16) | (lower & kUpper);
    __builtin_memcpy(to + part * next, &pairs, sizeof(pairs));
  }
}

template <class Storage>
inline void pack_parts(const Storage* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                       FloatParts* panels) {
  constexpr int64_t kWidth = kPanelColumns<FloatParts>;
  const auto width_of = [&](int64_t start) { return minimum(kWidth, padded<FloatParts>(n - start)); };
  // Rows that lie as they are, two at a time from end to end, which the prefetching of the machine keeps up with. (A weight of
  // 4096 x 4096: 0.25 ns a number, 0.45 panel by panel.)
  const int64_t rows = col_stride == 1 ? k / kPartRows * kPartRows : 0, columns = n / kTileSide * kTileSide;
  for (int64_t l = 0; l < rows; l += kPartRows) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      const Storage *const first = source + (l + i) * row_stride, *const second = first + kTileSide * row_stride;
      for (int64_t start = 0; start < columns; start += kWidth) {
        const int64_t width = width_of(start), end = minimum(width, columns - start);
        FloatParts* const to = panels + start * panel_depth<FloatParts>(k) + panel_depth<FloatParts>(l) * width;
        for (int64_t j = 0; j < end; j += kTileSide) {
          __builtin_prefetch(first + row_stride + start + j);
          __builtin_prefetch(second + row_stride + start + j);
          store_parts(load_as<float>(first + start + j), load_as<float>(second + start + j), kTileSide * width,
                      to + i * width + j);
        }
      }
    }
  }
  // The rest by squares, 16 columns from end to end.
  for (int64_t start = 0; start < n; start += kWidth) {
    const int64_t width = width_of(start);
    FloatParts* const panel = panels + start * panel_depth<FloatParts>(k);
    for (int64_t j = 0; j < width; j += kTileSide) {
      const Storage* const from = source + (start + j) * col_stride;
      for (int64_t l = start + j < columns ? rows : 0; l < k; l += kPartRows) {
        Vec<float> first[kTileSide], second[kTileSide];
        load_square(from + l * row_stride, row_stride, col_stride, k - l, n - start - j, first);
        load_square(from + (l + kTileSide) * row_stride, row_stride, col_stride, k - l - kTileSide, n - start - j,
                    second);
        FloatParts* const to = panel + panel_depth<FloatParts>(l) * width + j;
        for (int64_t i = 0; i < kTileSide; ++i) store_parts(first[i], second[i], kTileSide * width, to + i * width);
      }
    }
  }
}

// rows (at most kTileSide) of A and k of its columns, as tiles. What lies as it is is taken row by row, as in pack_parts.
[[gnu::noinline]] void split_rows(const float* a, int64_t a_row, int64_t a_col, int64_t rows, int64_t k,
                                  FloatParts* to) {
  constexpr int64_t kAhead = 4, kGroup = kParts * kTileWords;
  const int64_t whole = a_col == 1 ? k / kPartRows : 0;
  for (int64_t i = 0; i < rows && whole > 0; ++i) {
    const float* const row = a + i * a_row;
    for (int64_t group = 0; group < whole; ++group) {
      const float* const from = row + group * kPartRows;
      __builtin_prefetch(from + kAhead * a_row);
      __builtin_prefetch(from + kAhead * a_row + kTileSide);
      store_parts(load(from), load(from + kTileSide), kTileWords, to + group * kGroup + i * kTileSide);
    }
  }
  for (int64_t group = whole; group * kPartRows < k; ++group) {
    const int64_t l = group * kPartRows;
    Vec<float> first[kTileSide], second[kTileSide];
    load_square(a + l * a_col, a_row, a_col, rows, k - l, first);
    load_square(a + (l + kTileSide) * a_col, a_row, a_col, rows, k - l - kTileSide, second);
    for (int64_t i = 0; i < rows; ++i) {
      store_parts(first[i], second[i], kTileWords, to + group * kGroup + i * kTileSide);
    }
  }
}

// What becomes of a product: C itself; the end of the chain of sums that is C; or a sum of its own, which is added to C.
enum class Into { fresh, chain, sum };
static_assert(kChainDepth % kSplitDepth == 0);

// The products of parts in the order in which fewest tiles are read.
constexpr int kProducts = 6, kPartOfA[] = {0, 0, 1, 1, 2, 0}, kPartOfB[] = {2, 1, 1, 0, 0, 0};

// A block of C, Rows x Columns tiles and of these `rows` rows, from A and B over `groups` groups; the tiles of A's rows are
// next_rows apart.
template <int Rows, int Columns>
[[gnu::noinline]] void part_block(int64_t rows, int64_t groups, const FloatParts* a, int64_t next_rows,
                                  const FloatParts* b, int64_t width, float* c, int64_t ldc, Into into) {
  static_assert(Rows * Columns <= 4 && Rows <= 2);
  constexpr std::make_integer_sequence<int, Rows> kRows{};
  constexpr std::make_integer_sequence<int, Columns> kColumns{};
  const int64_t c_bytes = ldc * 4, a_bytes = kTileSide * 4, b_bytes = width * 4;
  unroll(kRows, [&](auto i) {
    unroll(kColumns, [&](auto j) {
      if (into == Into::chain) {
        load_tile<i * Columns + j>(c + i * kTileSide * ldc + j * kTileSide, c_bytes);
      } else {
        clear_tile<i * Columns + j>();
      }
    });
  });
  // One pointer for each row of A's tiles and each part of B's, or the compiler keeps thirty addresses.
  const FloatParts *a0 = a, *a1 = a + next_rows, *b0 = b, *b1 = b0 + kTileSide * width, *b2 = b1 + kTileSide * width;
  constexpr int kTileBytes = kTileWords * 4, kRowBytes = kTileSide * 4;
  for (int64_t group = 0; group < groups; ++group) {
    unroll(std::make_integer_sequence<int, kProducts>{}, [&](auto product) {
      constexpr int kA = kPartOfA[product], kB = kPartOfB[product], kLast = product > 0 ? product - 1 : 0;
      constexpr bool kNewA = product == 0 || kPartOfA[kLast] != kA, kNewB = product == 0 || kPartOfB[kLast] != kB;
      const FloatParts* const part_of_b = kB == 0 ? b0 : kB == 1 ? b1 : b2;
      if constexpr (Columns <= 2 && kNewB) {
        unroll(kColumns, [&](auto j) { load_tile<6 + j, j * kRowBytes>(part_of_b, b_bytes); });
      }
      unroll(kRows, [&](auto i) {
        if constexpr (kNewA) load_tile<4 + i, kA * kTileBytes>(i == 0 ? a0 : a1, a_bytes);
        unroll(kColumns, [&](auto j) {
          if constexpr (Columns > 2) load_tile<6 + j % 2, j * kRowBytes>(part_of_b, b_bytes);
          multiply_tiles<i * Columns + j, 4 + i, 6 + j % 2>();
        });
      });
    });
    a0 += kParts * kTileWords;
    a1 += kParts * kTileWords;
    b0 += kParts * kTileSide * width;
    b1 += kParts * kTileSide * width;
    b2 += kParts * kTileSide * width;
  }
  const auto store_block = [&](float* to, int64_t stride) {
    unroll(kRows, [&](auto i) {
      unroll(kColumns,
             [&](auto j) { store_tile<i * Columns + j>(to + i * kTileSide * stride + j * kTileSide, stride * 4); });
    });
  };
  if (into != Into::sum) return store_block(c, ldc);
  constexpr int64_t kWidth = Columns * kTileSide;
  alignas(64) float sums[Rows * kTileSide * kWidth];
  store_block(sums, kWidth);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kWidth; j += kTileSide) {
      store(c + i * ldc + j, load(c + i * ldc + j) + load(sums + i * kWidth + j));
    }
  }
}

// Where the tiles of some rows of A are: those of the next kTileSide rows next_rows on.
struct SplitRows {
  const FloatParts* data;
  int64_t next_rows;
};

// `rows` rows, of one or two tiles, times a panel, in the shapes that are set.
void part_panel(int64_t rows, int64_t groups, SplitRows a, const FloatParts* panel, int64_t width, float* c,
                int64_t ldc, Into into) {
  const int64_t column_tiles = width / kTileSide;
  const auto block = [&](auto row_tiles, auto columns, int64_t j) {
    part_block<row_tiles, columns>(rows, groups, a.data, a.next_rows, panel + j * kTileSide, width, c + j * kTileSide,
                                   ldc, into);
  };
  constexpr std::integral_constant<int, 1> kOne{};
  constexpr std::integral_constant<int, 2> kTwo{};
  constexpr std::integral_constant<int, 3> kThree{};
  constexpr std::integral_constant<int, 4> kFour{};
  if (rows > kTileSide) {
    int64_t j = 0;
    for (; j + 2 <= column_tiles; j += 2) block(kTwo, kTwo, j);
    if (j < column_tiles) block(kTwo, kOne, j);
    return;
  }
  switch (column_tiles) {
    case 1: return block(kOne, kOne, 0);
    case 2: return block(kOne, kTwo, 0);
    case 3: return block(kOne, kThree, 0);
    default: return block(kOne, kFour, 0);
  }
}

// C (+)= A B, B packed, of whose `packed` rows the product has those from `first` on. rows_of(i, l, rows, depth) splits so
// many rows of A from row i on, and columns from l on.
template <class RowsOf>
inline void add_products(int64_t m, int64_t n, int64_t k, const RowsOf& rows_of, const FloatParts* panels,
                         int64_t first, int64_t packed, float* c, int64_t ldc, Mode mode) {
  for (int64_t l = 0; l < k; l += kSplitDepth) {
    const int64_t depth = minimum(kSplitDepth, k - l), groups = ceil_div(depth, kPartRows);
    const Into into = mode == Mode::accumulate || l >= kChainDepth ? Into::sum : l > 0 ? Into::chain : Into::fresh;
    for (int64_t i = 0; i < m; i += kSplitRows) {
      const int64_t rows = minimum(kSplitRows, m - i), whole = rows / kTileSide * kTileSide;
      const SplitRows a = rows_of(i, l, rows, depth);
      for (const bool rest : {false, true}) {
        const int64_t r = rest ? whole : 0, count = rest ? rows - whole : whole;
        if (count == 0) continue;
        set_tile_shapes(minimum(kTileSide, count), kTileSide);
        for (int64_t j = 0; j < n; j += kPanelColumns<FloatParts>) {
          const int64_t width = minimum(kPanelColumns<FloatParts>, padded<FloatParts>(n - j));
          part_panel(count, groups, {a.data + r / kTileSide * a.next_rows, a.next_rows},
                     panels + j * panel_depth<FloatParts>(packed) + panel_depth<FloatParts>(first + l) * width, width,
                     c + (i + r) * ldc + j, ldc, into);
        }
      }
    }
  }
  if (shapes_set == kOutside) release_tiles();
}

void gemm_on_parts(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col,
                   const FloatParts* panels, int64_t first, int64_t packed, float* c, int64_t ldc, Mode mode) {
  alignas(64) FloatParts split[kSplitRows * panel_depth<FloatParts>(kSplitDepth)];
  const auto rows_of = [&](int64_t i, int64_t l, int64_t rows, int64_t depth) {
    const int64_t next_rows = split_size(kTileSide, depth);
    for (int64_t r = 0; r < rows; r += kTileSide) {
      split_rows(a + (i + r) * a_row + l * a_col, a_row, a_col, minimum(kTileSide, rows - r), depth,
                 split + r / kTileSide * next_rows);
    }
    return SplitRows{split, next_rows};
  };
  add_products(m, n, k, rows_of, panels, first, packed, c, ldc, mode);
}

void gemm_on_split_parts(int64_t m, int64_t n, int64_t k, const FloatParts* split, int64_t first, int64_t depth,
                         const FloatParts* panels, float* c, int64_t ldc, Mode mode) {
  const auto rows_of = [&](int64_t i, int64_t l, int64_t, int64_t) {
    return SplitRows{split + split_size(i, depth) + split_size(kTileSide, first + l), split_size(kTileSide, depth)};
  };
  add_products(m, n, k, rows_of, panels, 0, k, c, ldc, mode);
}

}  // namespace

void pack_part_panels(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                      FloatParts* panels) {
  visit_storage(dtype, [&](auto storage) {
    pack_parts(static_cast<const decltype(storage)*>(source), row_stride, col_stride, k, n, panels);
  });
}

void split_left(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, FloatParts* split, int64_t first,
                int64_t depth) {
  for (int64_t i = 0; i < m; i += kTileSide) {
    split_rows(a + i * a_row, a_row, a_col, minimum(kTileSide, m - i), k,
               split + split_size(i, depth) + split_size(kTileSide, first));
  }
}

}  // namespace lwft::LWFT_ISA
