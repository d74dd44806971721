// The product with the frozen weight in 16 bits. b is converted slice by slice of its columns into float panels, which
// stay in the second-level cache (up to a depth of about 1000; else in the third) while all rows of a task pass by.
//
// In float32 on matrix registers a panel is 1.5 times as large, and out is where the sums are: a block of b, kPartDepth x
// kPartColumns, stays in the second cache while all rows of a task pass by.
//
// Scratch memory of a thread: depth x kSliceColumns floats for b, kBlockRows x (kDepthStep + kSliceColumns) beside. In
// float32 6 x kPartDepth x kPartColumns bytes.
#include "common/cpu/operand.h"
#include "common/cpu/row.h"
#include "common/cpu/tile.h"
#include "lowrank/lowrank_base.h"

namespace lwft::LWFT_ISA {
namespace {

// Columns of b that a task converts: enough of them that converting a again for every slice costs little, a twentieth.
constexpr int64_t kSliceColumns = 128;
// Rows that a task takes through a slice: so many that converting the slice costs no more.
constexpr int64_t kTaskRows = 768;
constexpr int64_t kBlockRows = 8 * kTileRows<float>;
static_assert(kSliceColumns % kPanelColumns<float> == 0 && kTaskRows % kBlockRows == 0);
// Of a block of a, what is converted at a time.
constexpr int64_t kDepthStep = 2 * kKBlock;
// For fewer rows b is read where it lies.
constexpr int64_t kFewRows = 8;

// out's row += sums.
void add_row(const BaseProduct& p, int64_t row, int64_t column, const float* sums, int64_t n, float* buffer) {
  const int64_t offset = row * p.out_row_stride + column;
  load_row(p.dtype, p.out, offset, n, buffer);
  for_columns<float>(n, [&](auto at, int) LWFT_INLINE {
    store_at<float>(buffer, at, load_at<float>(buffer, at) + load_at<float>(sums, at));
  });
  store_row(p.dtype, buffer, n, p.out, offset);
}

void few_rows(const BaseProduct& p, int64_t column, int64_t n) {
  Scratch scratch;
  float* const a = scratch.take<float>(p.rows * p.depth);
  float* const sums = scratch.take<float>(p.rows * n);
  float* const buffer = scratch.take<float>(n);
  for (int64_t i = 0; i < p.rows; ++i) load_row(p.dtype, p.a, i * p.a_row_stride, p.depth, a + i * p.depth);
  if (p.b_row_stride == 1) {
    dot_rows(p.rows, n, p.depth, a, p.depth, p.dtype, element(p.dtype, p.b, column * p.b_col_stride), p.b_col_stride,
             sums, n, Mode::overwrite);
  } else {
    combine_rows(p.rows, n, p.depth, a, p.depth, p.dtype, element(p.dtype, p.b, column), p.b_row_stride, sums, n,
                 Mode::overwrite);
  }
  for (int64_t i = 0; i < p.rows; ++i) add_row(p, i, column, sums + i * n, n, buffer);
}

void many_rows(const BaseProduct& p, int64_t first_row, int64_t rows, int64_t column, int64_t n) {
  Scratch scratch;
  const int64_t width = padded<float>(n);
  float* const panels = scratch.take<float>(panel_size<float>(p.depth, n));
  for (int64_t l = 0; l < p.depth; l += kDepthStep) {
    pack_panels(p.dtype, element(p.dtype, p.b, l * p.b_row_stride + column * p.b_col_stride), p.b_row_stride,
                p.b_col_stride, minimum(kDepthStep, p.depth - l), n, panels + l * width);
  }
  float* const a = scratch.take<float>(kBlockRows * kDepthStep);
  float* const sums = scratch.take<float>(kBlockRows * width);
  float* const buffer = scratch.take<float>(n);
  for (int64_t i = first_row; i < first_row + rows; i += kBlockRows) {
    const int64_t block = minimum(kBlockRows, first_row + rows - i);
    for (int64_t l = 0; l < p.depth; l += kDepthStep) {
      const int64_t depth = minimum(kDepthStep, p.depth - l);
      for (int64_t k = 0; k < block; ++k) load_row(p.dtype, p.a, (i + k) * p.a_row_stride + l, depth, a + k * depth);
      gemm(block, n, depth, a, depth, 1, panels + l * width, sums, width, l == 0 ? Mode::overwrite : Mode::accumulate);
    }
    for (int64_t k = 0; k < block; ++k) add_row(p, i + k, column, sums + k * width, n, buffer);
  }
}

// ---- float32 ----

constexpr int64_t kPartDepth = 128, kPartColumns = 768;

// What a task takes: about so many columns for as many threads, or where there are not so many rows too. No sum depends on it.
struct Cut {
  int64_t columns, rows;
};
Cut cut_for_threads(const BaseProduct& p) {
  // Fewer of the rows of a, of which each task splits its own.
  constexpr int64_t kLeastColumns = 128, kLeastRows = 256;
  const int64_t threads = thread_count();
  const int64_t wished = round_up(ceil_div(p.columns, kPartColumns), threads);
  const int64_t slices = minimum(wished, ceil_div(p.columns, kLeastColumns));
  const int64_t chunks = minimum(ceil_div(threads, slices), ceil_div(p.rows, kLeastRows));
  return {round_up(ceil_div(p.columns, slices), kPanelColumns<float>),
          round_up(ceil_div(p.rows, chunks), kTileRows<FloatParts>)};
}

void add_product_of_parts([[maybe_unused]] const BaseProduct& p) {
  if constexpr (kSplitsFloat) {
    const Cut cut = cut_for_threads(p);
    const int64_t slices = ceil_div(p.columns, cut.columns), chunks = ceil_div(p.rows, cut.rows);
    parallel_for(slices * chunks, [&](int64_t task) {
      const int64_t column = task / chunks * cut.columns, n = minimum(cut.columns, p.columns - column);
      const int64_t row = task % chunks * cut.rows, rows = minimum(cut.rows, p.rows - row);
      Scratch scratch;
      FloatParts* const panels = scratch.take<FloatParts>(panel_size<FloatParts>(kPartDepth, n));
      for (int64_t l = 0; l < p.depth; l += kPartDepth) {
        const int64_t depth = minimum(kPartDepth, p.depth - l);
        pack_operand(p.dtype, element(p.dtype, p.b, l * p.b_row_stride + column * p.b_col_stride), p.b_row_stride,
                     p.b_col_stride, depth, n, panels);
        gemm(rows, n, depth, static_cast<const float*>(p.a) + row * p.a_row_stride + l, p.a_row_stride, 1, panels,
             static_cast<float*>(p.out) + row * p.out_row_stride + column, p.out_row_stride, Mode::accumulate);
      }
    });
  }
}

}  // namespace

// Packing b takes as long as some 30 rows, and longer where it is a large transpose, which is read from memory in short pieces; a
// small one is hardly worth two threads.
bool base_product_is_faster(const BaseProduct& p) {
  constexpr int64_t kLeastSide = 256, kSmall = 300 * 300, kLarge = 8 << 20;
  if (!kSplitsFloat || p.columns % kLanes<float> != 0 || minimum(p.depth, p.columns) < kLeastSide) return false;
  const int64_t size = p.depth * p.columns;
  return p.rows >= (size < kSmall || (size > kLarge && p.b_row_stride == 1) ? 128 : 64);
}

void base_product(const BaseProduct& p) {
  if (p.dtype == DType::f32) return add_product_of_parts(p);
  const int64_t slices = ceil_div(p.columns, kSliceColumns);
  const int64_t chunks = p.rows <= kFewRows ? 1 : ceil_div(p.rows, kTaskRows);
  parallel_for(slices * chunks, [&](int64_t task) {
    const int64_t column = task / chunks * kSliceColumns, n = minimum(kSliceColumns, p.columns - column);
    if (p.rows <= kFewRows) return few_rows(p, column, n);
    const int64_t first = task % chunks * kTaskRows;
    many_rows(p, first, minimum(kTaskRows, p.rows - first), column, n);
  });
}

}  // namespace lwft::LWFT_ISA
