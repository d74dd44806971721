// gemm<BFloat16Pair> on matrix registers (Intel AMX), for tile_cpu.cpp.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds to a 16 x 16 tile of C, in float, the product of a 16 x 16
// tile of pairs of A and a 16 x 16 tile of pairs of B: 8192 multiply-adds in 16 cycles (measured 3.5 TFLOP/s on a core that does
// 92 GFLOP/s by vdpbf16ps). The operands are those of tile.h:
//
//   B  A panel, [k][width] pairs, is a column of such tiles as it lies.
//   A  Rows of pairs are such tiles as they lie. An A given by its transpose (panels of it, a_row 1) is transposed here, 16 x 16
//      words at a time, once for all columns of C.
//   C  Four tiles of it are summed at once, 2 x 2, 1 x 4 or 4 x 1: the instruction takes 52 cycles to finish.
//
// The shapes of the registers are set for the whole of a pass: edges of m and k are passes of their own, with smaller shapes (45 ns
// each, measured), so nothing outside the operands is read and no row past m is written. Sums over all of k are one chain: the
// rounding of the operands to bfloat16 outweighs what that loses.
#pragma once
#include "common/cpu/product_scope.h"
#include "common/cpu/tile.h"
#include "common/cpu/transpose.h"

namespace lwft::LWFT_ISA {
namespace {

constexpr int64_t kTileSide = 16;  // rows of a tile, and 4-byte columns

// What LDTILECFG reads (Intel SDM, volume 1, section 18.2): the shape of each register. 0..3 are C, 4 and 5 A, 6 and 7 B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int64_t m, int64_t k) {
    for (int i = 0; i < 8; ++i) {
      column_bytes[i] = static_cast<uint16_t>(4 * (i == 4 || i == 5 ? k : kTileSide));
      rows[i] = static_cast<uint8_t>(i >= 6 ? k : m);
    }
  }
};

// The shapes that are set on this thread, as m * 32 + k; kNoShapes, or kOutside where no ProductScope vouches for them.
constexpr int64_t kOutside = -1, kNoShapes = 0;
thread_local int64_t shapes_set = kOutside;

inline void set_tile_shapes(int64_t m, int64_t k) {
  const int64_t wanted = m * 32 + k;
  if (shapes_set == wanted) return;
  const TileShapes shapes(m, k);
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  if (shapes_set != kOutside) shapes_set = wanted;
}
// Back to the initial state, in which a change of thread need not save the registers.
inline void release_tiles() { asm volatile("tilerelease" ::); }

// The compiler's own intrinsics want literal numbers of registers, which a template has not.
template <int Register>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int Register, int Offset = 0>  // in bytes
inline void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd %c3(%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Register), "i"(Offset) : "memory");
}
template <int Register>
inline void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Register) : "memory");
}
template <int Sum, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// Some rows of A by tiles: the tile of rows 16 i and pairs 16 l is at data + i * next_rows + l * next_pairs.
struct TiledRows {
  const BFloat16Pair* data;
  int64_t row_stride, next_rows, next_pairs;
};

// call(0), call(1), ... call(Count - 1), as compile-time constants.
template <class Call, int... I>
inline void unroll(std::integer_sequence<int, I...>, const Call& call) {
  (call(std::integral_constant<int, I>{}), ...);
}

// A block of C, Rows x Columns tiles, (+)= A B over `steps` tiles along k.
template <int Rows, int Columns>
void tile_block(int64_t steps, TiledRows a, const BFloat16Pair* b, int64_t b_row, float* c, int64_t ldc, Mode mode,
                Ahead& ahead) {
  static_assert(Rows * Columns <= 4 && (Rows <= 2 || Columns == 1));
  constexpr std::make_integer_sequence<int, Rows> kRows{};
  constexpr std::make_integer_sequence<int, Columns> kColumns{};
  const int64_t c_bytes = ldc * 4, a_bytes = a.row_stride * 4, b_bytes = b_row * 4;
  unroll(kRows, [&](auto i) {
    unroll(kColumns, [&](auto j) {
      if (mode == Mode::accumulate) {
        load_tile<i * Columns + j>(c + i * kTileSide * ldc + j * kTileSide, c_bytes);
      } else {
        clear_tile<i * Columns + j>();
      }
    });
  });
  for (int64_t l = 0; l < steps; ++l) {
    if (const char* const lines = ahead.take(1)) {
      for (int64_t i = 0; i < ahead.pace; i += kLine) prefetch_to_second_cache(lines + i);
    }
    if constexpr (Columns <= 2) {
      unroll(kColumns, [&](auto j) { load_tile<6 + j>(b + j * kTileSide, b_bytes); });
    }
    unroll(kRows, [&](auto i) {
      load_tile<4 + i % 2>(a.data + i * a.next_rows, a_bytes);
      unroll(kColumns, [&](auto j) {
        if constexpr (Columns > 2) load_tile<6 + j % 2>(b + j * kTileSide, b_bytes);
        multiply_tiles<i * Columns + j, 4 + i % 2, 6 + j % 2>();
      });
    });
    a.data += a.next_pairs;
    b += kTileSide * b_row;
  }
  unroll(kRows, [&](auto i) {
    unroll(kColumns, [&](auto j) { store_tile<i * Columns + j>(c + i * kTileSide * ldc + j * kTileSide, c_bytes); });
  });
}

// row_tiles x column_tiles tiles of C, column_tiles at most kPanelVectors, in the shapes that are set.
void tile_product(int64_t row_tiles, int64_t column_tiles, int64_t steps, TiledRows a, const BFloat16Pair* b,
                  int64_t b_row, float* c, int64_t ldc, Mode mode, Ahead& ahead) {
  const auto block = [&](auto rows, auto columns, int64_t j) {
    tile_block<rows, columns>(steps, a, b + j * kTileSide, b_row, c + j * kTileSide, ldc, mode, ahead);
  };
  constexpr std::integral_constant<int, 1> kOne{};
  constexpr std::integral_constant<int, 2> kTwo{};
  constexpr std::integral_constant<int, 3> kThree{};
  constexpr std::integral_constant<int, 4> kFour{};
  const int64_t at_once = column_tiles == 1 ? 4 : 2;
  while (row_tiles > 0) {
    const int64_t rows = minimum(at_once, row_tiles);
    if (rows == 1) {
      switch (column_tiles) {
        case 1: block(kOne, kOne, 0); break;
        case 2: block(kOne, kTwo, 0); break;
        case 3: block(kOne, kThree, 0); break;
        default: block(kOne, kFour, 0);
      }
    } else if (column_tiles == 1) {
      switch (rows) {
        case 2: block(kTwo, kOne, 0); break;
        case 3: block(kThree, kOne, 0); break;
        default: block(kFour, kOne, 0);
      }
    } else {
      block(kTwo, kTwo, 0);
      if (column_tiles == 3) block(kTwo, kOne, 2);
      if (column_tiles == 4) block(kTwo, kTwo, 2);
    }
    row_tiles -= rows;
    a.data += rows * a.next_rows;
    c += rows * kTileSide * ldc;
  }
}

// An A given by its transpose is taken in blocks of so many rows and pairs.
constexpr int64_t kTransposedRows = 64, kTransposedPairs = 128;

// Up to so many rows the vector instruction of tile_cpu.cpp is as fast.
constexpr int64_t kRowsForTiles = 4;

// gemm<BFloat16Pair> for m > kRowsForTiles, k > 0 and an A of which a_col or a_row is 1.
void gemm_on_tiles(int64_t m, int64_t n, int64_t k, const BFloat16Pair* a, int64_t a_row, int64_t a_col,
                   const BFloat16Pair* panels, float* c, int64_t ldc, Mode mode, Ahead ahead) {
  const bool transposed = a_col != 1;
  // about so many passes through the loop of tile_block, which take as long as a few lines
  if (ahead.bytes > 0) {
    const int64_t blocks = maximum<int64_t>(1, ceil_div(m, kTileSide) * ceil_div(n, kTileSide) / 4);
    ahead.spread(blocks * ceil_div(k, kTileSide), 64);
  }
  alignas(64) BFloat16Pair block[kTransposedRows * kTransposedPairs];
  const int64_t most_rows = transposed ? kTransposedRows : m, most_pairs = transposed ? kTransposedPairs : k;
  for (int64_t l0 = 0; l0 < k; l0 += most_pairs) {
    const int64_t pairs_here = minimum(most_pairs, k - l0);
    for (int64_t i0 = 0; i0 < m; i0 += most_rows) {
      const int64_t rows_here = minimum(most_rows, m - i0);
      TiledRows whole{a + i0 * a_row + l0, a_row, kTileSide * a_row, kTileSide};
      if (transposed) {
        whole = {block, kTileSide, kTileSide * kTileSide, kTransposedRows * kTileSide};
        for (int64_t l = 0; l < pairs_here; l += kTileSide) {
          // words, which are only moved, whatever number they are
          pack_transposed(reinterpret_cast<const float*>(a + i0 + (l0 + l) * a_col), a_col, rows_here,
                          minimum(kTileSide, pairs_here - l), reinterpret_cast<float*>(block + l * kTransposedRows),
                          kTileSide);
        }
      }
      // The tiles that are whole, and the rest: of rows, and of pairs.
      for (const bool rest_of_pairs : {false, true}) {
        const int64_t steps = rest_of_pairs ? pairs_here % kTileSide > 0 : pairs_here / kTileSide;
        const int64_t first_step = rest_of_pairs ? pairs_here / kTileSide : 0;
        if (steps == 0) continue;
        for (const bool rest_of_rows : {false, true}) {
          const int64_t row_tiles = rest_of_rows ? rows_here % kTileSide > 0 : rows_here / kTileSide;
          const int64_t first_row = rest_of_rows ? rows_here / kTileSide : 0;
          if (row_tiles == 0) continue;
          set_tile_shapes(rest_of_rows ? rows_here % kTileSide : kTileSide,
                          rest_of_pairs ? pairs_here % kTileSide : kTileSide);
          TiledRows from = whole;
          from.data += first_row * from.next_rows + first_step * from.next_pairs;
          for (int64_t j = 0; j < n; j += kPanelColumns<BFloat16Pair>) {
            const int64_t width = minimum(kPanelColumns<BFloat16Pair>, padded<BFloat16Pair>(n - j));
            tile_product(row_tiles, width / kTileSide, steps, from,
                         panels + j * k + (l0 + first_step * kTileSide) * width, width,
                         c + (i0 + first_row * kTileSide) * ldc + j, ldc, l0 + first_step > 0 ? Mode::accumulate : mode,
                         ahead);
          }
        }
      }
    }
  }
  if (shapes_set == kOutside) release_tiles();
}

}  // namespace

void begin_products() { shapes_set = kNoShapes; }
void end_products() {
  if (shapes_set != kNoShapes) release_tiles();
  shapes_set = kOutside;
}

}  // namespace lwft::LWFT_ISA
