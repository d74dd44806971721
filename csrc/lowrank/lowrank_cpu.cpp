// The low-rank product on the CPU.
//
// Forward takes a block of tokens of one adapter through both thin products while their (rows, rank) middle
// stays in the cache:
//
//     s = dropout(x) A^T,   out = bias + scale * s B^T
//
// Backward first makes ds = scale * dy B, a (tokens, rank) matrix, block by block. Then it goes through x by
// slices of columns, and through dy likewise:
//
//     dx = mask * (ds A),   dA = ds^T dropout(x);        dB = scale * dy^T s,   dbias = sum of dy
//
// A slice owns its columns of dx, dA, dB and dbias and sums over all tokens in their order, so there are no
// partial sums to add up, the mask is drawn once, and the bits do not depend on who computes what: blocks and
// slices are cut by shape alone.
//
// Scratch memory: A and B of the adapters that occur, as packed panels; backward instead B, and ds.
#include "lowrank/lowrank.h"

#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/threads.h"
#include "common/cpu/tile.h"

namespace lwft::LWFT_ISA {
namespace {

// Tokens of a block: a multiple of kTileRows, and 48 x kColumns floats fit the first cache beside a panel.
constexpr int64_t kBlockRows = 48, kLeastBlockRows = 2 * kTileRows;
// A short batch is cut into about so many blocks, a matrix into so many slices, for as many threads.
constexpr int64_t kBlocks = 32, kSlices = 16;
// Columns of a wide matrix that are written in one step: one block of the dropout stream, whole panels on
// every level. A slice is of one to four of them: narrower ones waste what the memory fetches ahead.
constexpr int64_t kColumns = kPhiloxColumns, kWidestSlice = 4 * kColumns;
static_assert(kColumns % kPanelColumns<float> == 0 && kColumns % kPanelColumns<double> == 0);
// Columns that are summed over in one step. A chain of so many additions is as accurate as the vendor's.
constexpr int64_t kDepth = 64, kDotDepth = kKBlock;
static_assert(kDepth % kColumns == 0 && kDotDepth % kDepth == 0);
// An adapter with so few tokens is read where it lies: it would be packed for one use.
constexpr int64_t kFewRows = 8;
// Multiply-adds (or copied elements) below which a loop is not worth waking other threads for.
constexpr int64_t kSerialWork = 1 << 18;
// Columns that one task packs.
constexpr int64_t kPackColumns = 1024;

template <class Body>
void run(int64_t tasks, int64_t work, const Body& body) {
  if (work >= kSerialWork) return parallel_for(tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// ---- which tokens go together ----

// Tokens of one group: order[first .. first + rows), or first .. itself where there is no order.
struct Block {
  int64_t group, first, rows;
};

// A group is the tokens of one adapter; the last group is that of the tokens without.
struct Plan {
  int64_t groups;
  const int64_t* group_first;  // (groups + 1): where a group's tokens start in `order`
  const int64_t* group_block;  // (groups + 1): where its blocks start in `blocks`
  const int64_t* order;        // the tokens by group, rising within one; null: as they come
  const Block* blocks;
  int64_t count;

  int64_t tokens(int64_t group) const { return group_first[group + 1] - group_first[group]; }
  int64_t token(const Block& block, int64_t i) const {
    return order != nullptr ? order[block.first + i] : block.first + i;
  }
  bool contiguous(const Block& block) const { return token(block, block.rows - 1) - token(block, 0) == block.rows - 1; }
};

Plan make_plan(int64_t tokens, int64_t adapters, const int64_t* adapter_index, Scratch& scratch) {
  const int64_t groups = adapters + 1;
  int64_t* const first = scratch.take<int64_t>(groups + 1);
  int64_t* const group_block = scratch.take<int64_t>(groups + 1);
  int64_t* order = nullptr;
  if (adapter_index == nullptr) {
    for (int64_t group = 0; group <= groups; ++group) first[group] = group == 0 ? 0 : tokens;
  } else {
    const auto group_of = [&](int64_t token) { return adapter_index[token] < 0 ? adapters : adapter_index[token]; };
    order = scratch.take<int64_t>(tokens);
    int64_t* const next = scratch.take<int64_t>(groups);
    for (int64_t group = 0; group <= groups; ++group) first[group] = 0;
    for (int64_t token = 0; token < tokens; ++token) ++first[group_of(token) + 1];
    for (int64_t group = 0; group < groups; ++group) first[group + 1] += first[group];
    for (int64_t group = 0; group < groups; ++group) next[group] = first[group];
    for (int64_t token = 0; token < tokens; ++token) order[next[group_of(token)]++] = token;
  }

  const int64_t wished = round_up(ceil_div(tokens, kBlocks), kTileRows);
  const int64_t block_rows = maximum(kLeastBlockRows, minimum(wished, kBlockRows));
  group_block[0] = 0;
  for (int64_t group = 0; group < groups; ++group) {
    group_block[group + 1] = group_block[group] + ceil_div(first[group + 1] - first[group], block_rows);
  }
  const int64_t count = group_block[groups];
  Block* const blocks = scratch.take<Block>(count);
  for (int64_t group = 0; group < groups; ++group) {
    int64_t next = first[group];
    for (int64_t i = group_block[group]; i < group_block[group + 1]; ++i) {
      // of about equal size
      const int64_t rows = ceil_div(first[group + 1] - next, group_block[group + 1] - i);
      blocks[i] = {group, next, rows};
      next += rows;
    }
  }
  return {groups, first, group_block, order, blocks, count};
}

// Columns col0 .. col0 + n - 1 of a block's tokens: where they lie, or converted into scratch (rows * n
// elements).
template <class T>
Tile<T> view_columns(const Plan& plan, const Block& block, DType dtype, const void* base, int64_t row_stride,
                     int64_t col0, int64_t n, T* scratch) {
  if (plan.contiguous(block)) {
    const int64_t offset = plan.token(block, 0) * row_stride + col0;
    return view_tile(dtype, base, offset, row_stride, block.rows, n, scratch);
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    load_row(dtype, base, plan.token(block, i) * row_stride + col0, n, scratch + i * n);
  }
  return {scratch, n};
}

template <class T>
const T* zeros(int64_t n, Scratch& scratch) {
  T* const row = scratch.take<T>(n);
  __builtin_memset(row, 0, static_cast<size_t>(n) * sizeof(T));
  return row;
}

// ---- the two factors ----

// A (k, n) matrix per adapter: element (i, j) at i * row_stride + j * col_stride, one of the strides being 1.
struct Factor {
  DType dtype;
  const void* data;
  int64_t k, n, row_stride, col_stride;

  const void* element(int64_t adapter, int64_t i, int64_t j) const {
    return lwft::element(dtype, data, adapter * k * n + i * row_stride + j * col_stride);
  }
};

// The factor (wide side, rank) of the product that makes the middle.
template <class T>
struct Deep {
  Factor factor;
  T** packed;  // for each group; null where the factor is read as it lies

  // A rank of half a vector or less: broadcasting the rows would leave the other lanes idle, so the sums run
  // over vectors of the wide side, and what is packed is the transpose by rows.
  bool by_dots() const { return 2 * factor.n <= kLanes<T>; }
  bool lies_right() const { return by_dots() && factor.row_stride == 1 && factor.dtype == dtype_of<T>(); }
  int64_t packed_size() const { return panel_size<T>(factor.k, factor.n); }

  // Columns of the wide side that are summed over in one step.
  int64_t step(int64_t group) const {
    return by_dots() || (packed[group] == nullptr && factor.row_stride == 1) ? kDotDepth : kDepth;
  }

  // Rows begin .. end - 1 of the wide side; begin is a multiple of kDepth.
  void pack(int64_t group, int64_t begin, int64_t end) const {
    T* const to = packed[group];
    if (by_dots()) {
      for (int64_t j = 0; j < factor.n; ++j) {
        load_row(factor.dtype, factor.element(group, begin, j), 0, end - begin, to + j * factor.k + begin,
                 factor.row_stride);
      }
      return;
    }
    for (int64_t i = begin; i < end; i += kDepth) {
      pack_panels(factor.dtype, factor.element(group, i, 0), factor.row_stride, factor.col_stride,
                  minimum(kDepth, end - i), factor.n, to + i * padded<T>(factor.n));
    }
  }

  // middle (rows, rank) = view * factor; view(i, depth, scratch) is the block's columns i .. i + depth - 1,
  // if need be in scratch (rows * depth elements).
  template <class View>
  void multiply(const Block& block, const View& view, T* middle, int64_t middle_stride) const {
    const int64_t group = block.group, depth_step = step(group);
    const T* const from = packed[group];
    Scratch local;
    T* const scratch = local.take<T>(block.rows * depth_step);
    for (int64_t i = 0; i < factor.k; i += depth_step) {
      const int64_t depth = minimum(depth_step, factor.k - i);
      const Mode mode = i == 0 ? Mode::overwrite : Mode::accumulate;
      const Tile<T> tile = view(i, depth, scratch);
      if (from != nullptr && !by_dots()) {
        gemm(block.rows, factor.n, depth, tile.data, tile.row_stride, 1, from + i * padded<T>(factor.n), middle,
             middle_stride, mode);
      } else if (from != nullptr) {
        dot_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, dtype_of<T>(), from + i, factor.k, middle,
                 middle_stride, mode);
      } else if (factor.row_stride == 1) {
        dot_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, factor.dtype, factor.element(group, i, 0),
                 factor.col_stride, middle, middle_stride, mode);
      } else {
        combine_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, factor.dtype, factor.element(group, i, 0),
                     factor.row_stride, middle, middle_stride, mode);
      }
    }
  }
};

// The factor (rank, wide side) of the product that the middle goes into.
template <class T>
struct Wide {
  Factor factor;
  // The wide side's bias as one more row, which a column of ones in the middle adds while the sums are still
  // in registers; null for none.
  const T* bias;

  int64_t depth() const { return factor.k + (bias != nullptr ? 1 : 0); }
  int64_t packed_size(int64_t columns) const { return panel_size<T>(depth(), columns); }

  // Columns begin .. end - 1, begin a multiple of kColumns. Those from begin + c on, c likewise, are then at
  // panels + c * depth().
  void pack(int64_t group, int64_t begin, int64_t end, T* panels) const {
    const int64_t width = bias == nullptr ? end - begin : kPanelColumns<T>;
    for (int64_t j = begin; j < end; j += width) {
      const int64_t n = minimum(width, end - j);
      T* const panel = panels + (j - begin) * depth();
      pack_panels(factor.dtype, factor.element(group, 0, j), factor.row_stride, factor.col_stride, factor.k, n, panel);
      if (bias == nullptr) continue;
      T* const last = panel + factor.k * padded<T>(n);
      for (int64_t c = 0; c < n; c += kLanes<T>) store(last + c, load_columns(bias, j + c, j + n));
    }
  }
};

template <class T>
void scale_rows(int64_t rows, int64_t stride, T scale, T* values) {
  for (int64_t i = 0; i < rows * stride; i += kLanes<T>) store(values + i, load(values + i) * scale);
}

// ---- forward ----

template <class T>
class Forward {
 public:
  explicit Forward(const LowRankForward& parameters)
      : p(parameters),
        plan(make_plan(p.tokens, p.adapters, p.adapter_index, scratch)),
        down{{p.param_dtype, p.a, p.in_features, p.rank, 1, p.in_features}, scratch.take<T*>(plan.groups)},
        up{{p.param_dtype, p.b, p.rank, p.out_features, 1, p.rank}, bias_row()},
        up_packed(scratch.take<T*>(plan.groups)),
        middle_stride(padded<T>(up.depth())) {}

  void run_all() {
    pack();
    const int64_t work = p.tokens * p.rank * (p.in_features + p.out_features);
    // Few blocks (a decode step): the columns of `out` are shared out too, so the middle has to wait in
    // memory.
    const int64_t splits = plan.count > 4 ? 1 : minimum(kSlices / plan.count, ceil_div(p.out_features, 512));
    if (splits == 1 || work < kSerialWork) {
      run(plan.count, work, [&](int64_t task) {
        Scratch local;
        T* const middle = local.take<T>(plan.blocks[task].rows * middle_stride);
        make_middle(plan.blocks[task], middle);
        write_out(plan.blocks[task], middle, 0, p.out_features);
      });
      return;
    }
    T* const middle = scratch.take<T>(p.tokens * middle_stride);
    const int64_t width = round_up(ceil_div(p.out_features, splits), kColumns);
    const auto middle_of = [&](const Block& block) { return middle + block.first * middle_stride; };
    run(plan.count, work, [&](int64_t task) { make_middle(plan.blocks[task], middle_of(plan.blocks[task])); });
    run(plan.count * splits, work, [&](int64_t task) {
      const Block& block = plan.blocks[task / splits];
      const int64_t begin = task % splits * width;
      write_out(block, middle_of(block), begin, minimum(begin + width, p.out_features));
    });
  }

 private:
  bool has_adapter(const Block& block) const { return block.group < p.adapters; }

  const T* bias_row() {
    if (p.bias == nullptr || p.accumulate) return nullptr;
    return view_row(p.bias_dtype, p.bias, 0, p.out_features, scratch.take<T>(p.out_features));
  }

  void pack() {
    int64_t* const groups = scratch.take<int64_t>(p.adapters);
    int64_t count = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      down.packed[group] = up_packed[group] = nullptr;
      if (group == p.adapters || plan.tokens(group) <= kFewRows) continue;
      if (!down.lies_right()) down.packed[group] = scratch.take<T>(down.packed_size());
      up_packed[group] = scratch.take<T>(up.packed_size(p.out_features));
      groups[count++] = group;
    }
    const int64_t down_tasks = down.lies_right() ? 0 : ceil_div(p.in_features, kPackColumns);
    const int64_t each = down_tasks + ceil_div(p.out_features, kPackColumns);
    run(count * each, count * p.rank * (p.in_features + p.out_features), [&](int64_t task) {
      const int64_t group = groups[task / each], part = task % each;
      if (part < down_tasks) {
        const int64_t begin = part * kPackColumns;
        down.pack(group, begin, minimum(begin + kPackColumns, p.in_features));
      } else {
        const int64_t begin = (part - down_tasks) * kPackColumns;
        up.pack(group, begin, minimum(begin + kPackColumns, p.out_features), up_packed[group] + begin * up.depth());
      }
    });
  }

  // middle = scale * dropout(x) A^T, and a column of ones for the bias; hidden is stored without the scale.
  void make_middle(const Block& block, T* middle) const {
    if (has_adapter(block)) {
      const auto view = [&](int64_t i, int64_t depth, T* columns) { return input(block, i, depth, columns); };
      down.multiply(block, view, middle, middle_stride);
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const row = middle + i * middle_stride;
      T* const hidden = static_cast<T*>(p.hidden) + plan.token(block, i) * p.rank;
      if (has_adapter(block)) {
        __builtin_memcpy(hidden, row, static_cast<size_t>(p.rank) * sizeof(T));
        scale_rows(1, p.rank, static_cast<T>(p.scale), row);
        if (up.bias != nullptr) row[p.rank] = T{1};
      } else {
        __builtin_memset(hidden, 0, static_cast<size_t>(p.rank) * sizeof(T));
      }
    }
  }

  Tile<T> input(const Block& block, int64_t k0, int64_t depth, T* columns) const {
    if (!p.dropout.active()) {
      return view_columns(plan, block, p.x_dtype, p.x, p.x_row_stride, k0, depth, columns);
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t token = plan.token(block, i);
      load_row(p.x_dtype, p.x, token * p.x_row_stride + k0, depth, columns + i * depth);
      dropout_row(p.dropout, token, k0, depth, columns + i * depth);
    }
    return {columns, depth};
  }

  void write_out(const Block& block, const T* middle, int64_t begin, int64_t end) const {
    if (!has_adapter(block)) return write_base(block, begin, end);
    Scratch local;
    T* const tile = local.take<T>(block.rows * kColumns);
    T* const panels = local.take<T>(up.packed_size(kColumns));
    // Where out holds the sums as they are, they go straight there.
    const bool holds_sums = p.out_dtype == dtype_of<T>() && plan.contiguous(block);
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      const T* const from = up_packed[block.group];
      if (from == nullptr) up.pack(block.group, j, j + n, panels);
      const T* const b = from != nullptr ? from + j * up.depth() : panels;
      if (holds_sums && n % kLanes<T> == 0) {
        T* const out = static_cast<T*>(p.out) + plan.token(block, 0) * p.out_row_stride + j;
        gemm(block.rows, n, up.depth(), middle, middle_stride, 1, b, out, p.out_row_stride,
             p.accumulate ? Mode::accumulate : Mode::overwrite);
      } else {
        gemm(block.rows, n, up.depth(), middle, middle_stride, 1, b, tile, kColumns, Mode::overwrite);
        store_tile(block, tile, j, n);
      }
    }
  }

  // out (+)= tile, for columns j .. j + n - 1.
  void store_tile(const Block& block, const T* tile, int64_t j, int64_t n) const {
    visit_storage(p.out_dtype, [&](auto storage) {
      using Storage = decltype(storage);
      constexpr int64_t N = kLanes<T>;
      for (int64_t i = 0; i < block.rows; ++i) {
        Storage* const out = static_cast<Storage*>(p.out) + plan.token(block, i) * p.out_row_stride + j;
        const T* const row = tile + i * kColumns;
        int64_t c = 0;
        for (; c + N <= n; c += N) {
          store_as<T>(out + c, p.accumulate ? load_as<T>(out + c) + load(row + c) : load(row + c));
        }
        if (c == n) continue;
        const Vec<T> sum = load(row + c);
        store_first_as<T>(out + c, p.accumulate ? load_first_as<T>(out + c, n - c) + sum : sum, n - c);
      }
    });
  }

  // Rows without an adapter: out = bias, or stays what it was.
  void write_base(const Block& block, int64_t begin, int64_t end) const {
    if (p.accumulate) return;
    Scratch local;
    const T* row = up.bias != nullptr ? up.bias + begin : zeros<T>(end - begin, local);
    for (int64_t i = 0; i < block.rows; ++i) {
      store_row(p.out_dtype, row, end - begin, p.out, plan.token(block, i) * p.out_row_stride + begin);
    }
  }

  Scratch scratch;
  const LowRankForward& p;
  const Plan plan;
  const Deep<T> down;  // A^T (in_features, rank)
  const Wide<T> up;    // B^T (rank, out_features)
  T** const up_packed;
  const int64_t middle_stride;
};

// ---- backward ----

template <class T>
class Backward {
 public:
  explicit Backward(const LowRankBackward& parameters)
      : p(parameters),
        plan(make_plan(p.tokens, p.adapters, p.adapter_index, scratch)),
        up{{p.param_dtype, p.b, p.out_features, p.rank, p.rank, 1}, scratch.take<T*>(plan.groups)},
        down{{p.param_dtype, p.a, p.rank, p.in_features, p.in_features, 1}, nullptr},
        middle_stride(padded<T>(p.rank)) {}

  void run_all() {
    if (p.dx != nullptr || p.da != nullptr) make_middle();
    const int64_t in_width = slice_width(p.in_features), out_width = slice_width(p.out_features);
    const int64_t in_tasks = p.dx != nullptr || p.da != nullptr ? ceil_div(p.in_features, in_width) : 0;
    const int64_t out_tasks = p.db != nullptr || p.dbias != nullptr ? ceil_div(p.out_features, out_width) : 0;
    const int64_t tasks = in_tasks + out_tasks;
    run(tasks, 2 * p.tokens * p.rank * (p.in_features + p.out_features), [&](int64_t task) {
      // The two kinds, which cost differently, alternate: a thread is given neighbouring tasks.
      const int64_t in_before = task * in_tasks / tasks;
      if ((task + 1) * in_tasks / tasks > in_before) {
        const int64_t begin = in_before * in_width;
        take_in_slice(begin, minimum(begin + in_width, p.in_features));
      } else {
        const int64_t begin = (task - in_before) * out_width;
        take_out_slice(begin, minimum(begin + out_width, p.out_features));
      }
    });
  }

 private:
  static int64_t slice_width(int64_t features) {
    return minimum(kWidestSlice, round_up(ceil_div(features, kSlices), kColumns));
  }
  const Block* first_block(int64_t group) const { return plan.blocks + plan.group_block[group]; }
  const Block* last_block(int64_t group) const { return plan.blocks + plan.group_block[group + 1]; }

  // middle = scale * dy B, in the order of the plan.
  void make_middle() {
    int64_t* const groups = scratch.take<int64_t>(p.adapters);
    int64_t count = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      up.packed[group] = nullptr;
      if (group == p.adapters || plan.tokens(group) <= kFewRows || up.lies_right()) continue;
      up.packed[group] = scratch.take<T>(up.packed_size());
      groups[count++] = group;
    }
    const int64_t each = ceil_div(p.out_features, kPackColumns);
    run(count * each, count * p.rank * p.out_features, [&](int64_t task) {
      const int64_t begin = task % each * kPackColumns;
      up.pack(groups[task / each], begin, minimum(begin + kPackColumns, p.out_features));
    });
    middle = scratch.take<T>(p.tokens * middle_stride);
    run(plan.group_block[p.adapters], p.tokens * p.rank * p.out_features, [&](int64_t task) {
      const Block& block = plan.blocks[task];
      T* const rows = middle + block.first * middle_stride;
      up.multiply(
          block, [&](int64_t j, int64_t n, T* columns) { return view_grad_out(block, j, n, columns); }, rows,
          middle_stride);
      scale_rows(block.rows, middle_stride, static_cast<T>(p.scale), rows);
    });
  }

  Tile<T> view_grad_out(const Block& block, int64_t j, int64_t n, T* columns) const {
    return view_columns(plan, block, p.out_dtype, p.grad_out, p.grad_out_row_stride, j, n, columns);
  }

  // Columns begin .. end - 1 of dx and dA.
  void take_in_slice(int64_t begin, int64_t end) const {
    Scratch local;
    const int64_t stride = padded<T>(end - begin);
    T* const sums = p.da != nullptr ? local.take<T>(p.rank * stride) : nullptr;
    T* const panels = p.dx != nullptr ? local.take<T>(down.packed_size(end - begin)) : nullptr;
    for (int64_t group = 0; group < p.adapters; ++group) {
      const Block *const first = first_block(group), *const last = last_block(group);
      if (panels != nullptr && first < last) down.pack(group, begin, end, panels);
      for (const Block* block = first; block < last; ++block) {
        const Mode mode = block == first ? Mode::overwrite : Mode::accumulate;
        for (int64_t j = begin; j < end; j += kColumns) {
          const int64_t at_j = j - begin;
          take_x(*block, j, minimum(kColumns, end - j), sums != nullptr ? sums + at_j : nullptr, stride, mode,
                 panels != nullptr ? panels + at_j * down.depth() : nullptr);
        }
      }
      if (sums == nullptr) continue;
      if (first == last) __builtin_memset(sums, 0, static_cast<size_t>(p.rank * stride) * sizeof(T));
      for (int64_t i = 0; i < p.rank; ++i) {
        store_row(p.param_dtype, sums + i * stride, end - begin, p.da, (group * p.rank + i) * p.in_features + begin);
      }
    }
    if (p.dx == nullptr || first_block(p.adapters) == last_block(p.adapters)) return;
    const T* const row = zeros<T>(end - begin, local);
    for (int64_t i = plan.group_first[p.adapters]; i < plan.group_first[p.adapters + 1]; ++i) {
      store_row(p.x_dtype, row, end - begin, p.dx, plan.order[i] * p.in_features + begin);
    }
  }

  // dx = mask * (middle A), dA (+)= middle^T (mask * x), for columns j .. j + n - 1 of x and a block of
  // tokens.
  void take_x(const Block& block, int64_t j, int64_t n, T* sums, int64_t sums_stride, Mode mode,
              const T* a_panels) const {
    Scratch local;
    const T* const rows = middle + block.first * middle_stride;
    T* const tile = local.take<T>(block.rows * kColumns);
    T* mask = nullptr;
    if (p.dropout.active()) {
      mask = local.take<T>(block.rows * kColumns);
      for (int64_t i = 0; i < block.rows; ++i) {
        dropout_multipliers(p.dropout, plan.token(block, i), j, n, mask + i * kColumns);
      }
    }
    if (sums != nullptr) {
      T* const x_panels = local.take<T>(panel_size<T>(block.rows, kColumns));
      const Tile<T> x = masked_input(block, j, n, mask, tile);
      pack_panels(dtype_of<T>(), x.data, x.row_stride, 1, block.rows, n, x_panels);
      gemm(p.rank, n, block.rows, rows, 1, middle_stride, x_panels, sums, sums_stride, mode);
    }
    if (a_panels == nullptr) return;
    if (mask == nullptr && p.x_dtype == dtype_of<T>() && n % kLanes<T> == 0 && plan.contiguous(block)) {
      T* const dx = static_cast<T*>(p.dx) + plan.token(block, 0) * p.in_features + j;
      gemm(block.rows, n, p.rank, rows, middle_stride, 1, a_panels, dx, p.in_features, Mode::overwrite);
      return;
    }
    gemm(block.rows, n, p.rank, rows, middle_stride, 1, a_panels, tile, kColumns, Mode::overwrite);
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const row = tile + i * kColumns;
      if (mask != nullptr) multiply_row(n, mask + i * kColumns, row);
      store_row(p.x_dtype, row, n, p.dx, plan.token(block, i) * p.in_features + j);
    }
  }

  Tile<T> masked_input(const Block& block, int64_t j, int64_t n, const T* mask, T* tile) const {
    if (mask == nullptr) return view_columns(plan, block, p.x_dtype, p.x, p.x_row_stride, j, n, tile);
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const row = tile + i * kColumns;
      load_row(p.x_dtype, p.x, plan.token(block, i) * p.x_row_stride + j, n, row);
      multiply_row(n, mask + i * kColumns, row);
    }
    return {tile, kColumns};
  }

  // Rows of kColumns elements: past n they may be multiplied too.
  static void multiply_row(int64_t n, const T* factors, T* values) {
    for (int64_t c = 0; c < n; c += kLanes<T>) store(values + c, load(values + c) * load(factors + c));
  }

  // Rows begin .. end - 1 of dB and of dbias.
  void take_out_slice(int64_t begin, int64_t end) const {
    Scratch local;
    const int64_t stride = padded<T>(end - begin);
    T* const sums = p.db != nullptr ? local.take<T>(p.rank * stride) : nullptr;  // dB^T, without the scale
    T* const bias_sums = p.dbias != nullptr ? local.take<T>(stride) : nullptr;
    if (bias_sums != nullptr) __builtin_memset(bias_sums, 0, static_cast<size_t>(stride) * sizeof(T));
    for (int64_t group = 0; group < plan.groups; ++group) {
      const Block *const first = first_block(group), *const last = last_block(group);
      T* const db = group < p.adapters ? sums : nullptr;
      for (const Block* block = first; block < last; ++block) {
        const Mode mode = block == first ? Mode::overwrite : Mode::accumulate;
        take_grad_out(*block, begin, end, db, bias_sums, stride, mode);
      }
      if (db == nullptr) continue;
      if (first == last) __builtin_memset(db, 0, static_cast<size_t>(p.rank * stride) * sizeof(T));
      scale_rows(p.rank, stride, static_cast<T>(p.scale), db);
      store_db(group, begin, end, db, stride);
    }
    if (p.dbias != nullptr) store_row(p.bias_dtype, bias_sums, end - begin, p.dbias, begin);
  }

  // dB^T (+)= hidden^T dy and dbias += the sum of dy, for columns begin .. end - 1 of dy and a block of
  // tokens.
  void take_grad_out(const Block& block, int64_t begin, int64_t end, T* db, T* dbias, int64_t stride, Mode mode) const {
    Scratch local;
    T* const columns = local.take<T>(block.rows * kColumns);
    T* const panels = local.take<T>(panel_size<T>(block.rows, kColumns));
    Tile<T> hidden{};
    if (db != nullptr) {
      T* const gathered = local.take<T>(block.rows * p.rank);
      hidden = view_columns(plan, block, dtype_of<T>(), p.hidden, p.rank, 0, p.rank, gathered);
    }
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      const Tile<T> dy = view_grad_out(block, j, n, columns);
      if (db != nullptr) {
        pack_panels(dtype_of<T>(), dy.data, dy.row_stride, 1, block.rows, n, panels);
        gemm(p.rank, n, block.rows, hidden.data, 1, hidden.row_stride, panels, db + (j - begin), stride, mode);
      }
      if (dbias != nullptr) add_rows(block.rows, n, dy, dbias + (j - begin));
    }
  }

  static void add_rows(int64_t rows, int64_t n, Tile<T> values, T* sums) {
    constexpr int64_t kChains = 4;  // as many additions under way, and short chains are exact
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      Vec<T> chain[kChains] = {};
      int64_t i = 0;
      for (; i + kChains <= rows; i += kChains) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < kChains; ++k) chain[k] += load_columns(values.row(i + k), c, n);
      }
      for (; i < rows; ++i) chain[0] += load_columns(values.row(i), c, n);
      store(sums + c, load(sums + c) + ((chain[0] + chain[1]) + (chain[2] + chain[3])));
    }
  }

  // From the (rank, n) sums to the (n, rank) of dB: packing is transposing, in panels of so many columns.
  void store_db(int64_t group, int64_t begin, int64_t end, const T* sums, int64_t stride) const {
    Scratch local;
    const int64_t n = end - begin;
    T* const panels = local.take<T>(panel_size<T>(n, p.rank));
    pack_panels(dtype_of<T>(), sums, 1, stride, n, p.rank, panels);
    for (int64_t j = 0; j < p.rank; j += kPanelColumns<T>) {
      const int64_t width = minimum(kPanelColumns<T>, p.rank - j);
      for (int64_t c = 0; c < n; ++c) {
        store_row(p.param_dtype, panels + j * n + c * padded<T>(width), width, p.db,
                  (group * p.out_features + begin + c) * p.rank + j);
      }
    }
  }

  Scratch scratch;
  const LowRankBackward& p;
  const Plan plan;
  const Deep<T> up;    // B (out_features, rank)
  const Wide<T> down;  // A (rank, in_features)
  const int64_t middle_stride;
  T* middle = nullptr;
};

void forward(const LowRankForward& p) {
  if (p.tokens == 0) return;
  if (p.param_dtype == DType::f64) {
    Forward<double>(p).run_all();
  } else {
    Forward<float>(p).run_all();
  }
}

void backward(const LowRankBackward& p) {
  if (p.param_dtype == DType::f64) {
    Backward<double>(p).run_all();
  } else {
    Backward<float>(p).run_all();
  }
}

}  // namespace

extern const LowRankKernels lowrank_kernels;
const LowRankKernels lowrank_kernels = {forward, backward};

}  // namespace lwft::LWFT_ISA
