// The product with the frozen weight in 16 bits. b is converted slice by slice of its columns into float panels, which
// stay in the second-level cache (up to a depth of about 1000; else in the third) while all rows of a task pass by.
//
// Scratch memory of a thread: depth x kSliceColumns floats for b, kBlockRows x (kDepthStep + kSliceColumns) beside.
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

}  // namespace

void base_product(const BaseProduct& p) {
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
