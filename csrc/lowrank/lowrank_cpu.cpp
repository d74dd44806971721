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
// partial sums to add up, the mask is drawn once, and the bits do not depend on who computes what: blocks are
// cut by shape alone, and how wide a slice is changes no sum.
//
// A few tokens of one adapter (a decode step, a vector) have paths of their own: there the factors and their gradients are
// all the memory there is, so they are read and written once, where they lie, and shared out among the threads.
//
// Scratch memory: A and B of the adapters that occur, as packed panels; backward instead B, and ds.
//
// Where all is bfloat16 and the machine multiplies pairs of it, the operands of the products are such pairs
// (common/cpu/operand.h): s and ds are rounded to bfloat16 on their way into the second product, as PyTorch rounds them.
#include "lowrank/lowrank.h"

#include "common/cpu/dropout_vec.h"
#include "common/cpu/few_tokens.h"
#include "common/cpu/operand.h"
#include "common/cpu/row.h"

namespace lwft::LWFT_ISA {
namespace {

// Tokens of a block: a multiple of kTileRows, and 48 x kColumns floats fit the first cache beside a panel.
template <class E>
constexpr int64_t kBlockRows = round_up(48, kTileRows<E>);
// Backward sums over the tokens of a block in registers, then adds that to the sums in memory: it takes more of them.
template <class E>
constexpr int64_t kLeastForwardRows = round_up(12, kTileRows<E>);
template <class E>
constexpr int64_t kLeastBackwardRows = round_up(24, kTileRows<E>);
// A short batch is cut into about so many blocks, a matrix into so many slices, for as many threads. Where there are fewer
// threads, so are forward's blocks and backward's slices, on which no sum depends: a small block reads both factors for
// few rows, and a narrow slice reads x in pieces so short that the memory fetches nothing ahead.
constexpr int64_t kBlocks = 32, kSlices = 16, kFewestSlices = 4, kBlocksPerThread = 4;
// Columns of a wide matrix that are written in one step: one block of the dropout stream, whole panels on
// every level. A slice is of one to four of them: narrower ones waste what the memory fetches ahead.
constexpr int64_t kColumns = kPhiloxColumns, kWidestSlice = 4 * kColumns;
static_assert(kColumns % kPanelColumns<float> == 0 && kColumns % kPanelColumns<double> == 0);
// Columns that are summed over in one step. A chain of so many additions is as accurate as the vendor's.
// (Pairs of bfloat16 are rounded before, so longer chains cost no accuracy.)
constexpr int64_t kDepth = 64, kDotDepth = kKBlock, kPairDepth = 256;
static_assert(kDepth % kColumns == 0 && kDotDepth % kDepth == 0);
// An adapter with so few tokens is read where it lies: it would be packed for one use.
template <class E>
constexpr int64_t kFewRows = kIsPair<E> ? 8 : 16;
// Where there is one adapter, up to so many tokens share out the factors, not the tokens, among the threads.
constexpr int64_t kFewTokens = 64;
// Reading a factor takes as much time as multiplying it, once it is in the cache, with so many.
constexpr int64_t kLeastWorkRows = 32;
// Multiply-adds below which a loop is not worth waking other threads for: some 40 us of one.
constexpr int64_t kSerialWork = 1 << 21;
// Columns that one task packs; an element is as much work as so many multiply-adds.
constexpr int64_t kPackColumns = 256, kPackWork = 16;

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

// `wished` blocks of at least so many rows.
template <class E>
Plan make_plan(int64_t tokens, int64_t adapters, const int64_t* adapter_index, int64_t wished, int64_t least_rows,
               Scratch& scratch) {
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

  const int64_t rows = round_up(ceil_div(tokens, wished), kTileRows<E>);
  const int64_t block_rows = maximum(least_rows, minimum(rows, kBlockRows<E>));
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
      const int64_t left = first[group + 1] - next, even = ceil_div(left, group_block[group + 1] - i);
      const int64_t rows = minimum(left, round_up(even, kTileRows<E>));
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

// Columns col0 .. col0 + n - 1 of a block's tokens as a left-hand side, after dropout: where they lie, or in scratch
// (rows * units(n) elements).
template <class E>
Tile<E> view_operand(const Plan& plan, const Block& block, DType dtype, const void* base, int64_t row_stride,
                     int64_t col0, int64_t n, const Dropout& dropout, E* scratch) {
  using T = SumOf<E>;
  if (!dropout.active() && plan.contiguous(block)) {
    const Tile<E> tile = operand_in_place<E>(dtype, base, plan.token(block, 0) * row_stride + col0, row_stride, n);
    if (tile.data != nullptr) return tile;
  }
  Scratch local;
  T* row = nullptr;
  if constexpr (kIsPair<E>) row = local.take<T>(n);
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t token = plan.token(block, i);
    if constexpr (!kIsPair<E>) row = scratch + i * n;
    load_row(dtype, base, token * row_stride + col0, n, row);
    if (dropout.active()) dropout_row(dropout, token, col0, n, row);
    store_operand(row, n, scratch + i * units<E>(n));
  }
  return {scratch, units<E>(n)};
}

// Asks for what is read next: a block walks through as many rows at once as no prefetcher of the machine keeps track of.
// Columns col0 .. col0 + n - 1 of a block's tokens.
void prefetch_columns(const Plan& plan, const Block& block, DType dtype, const void* base, int64_t row_stride,
                      int64_t col0, int64_t n) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = n * static_cast<int64_t>(element_size(dtype));
  for (int64_t i = 0; i < block.rows; ++i) {
    const char* row = static_cast<const char*>(element(dtype, base, plan.token(block, i) * row_stride + col0));
    for (int64_t j = 0; j < bytes; j += kLine) __builtin_prefetch(row + j);
  }
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
template <class E>
struct Deep {
  using T = SumOf<E>;
  static constexpr int64_t kPackDepth = kIsPair<E> ? kPairDepth : kDepth;
  static_assert(kPackColumns % kPackDepth == 0);

  Factor factor;
  E** packed;  // for each group; null where the factor is read as it lies, which pairs never are

  // A rank of half a vector or less: broadcasting the rows would leave the other lanes idle, so the sums run
  // over vectors of the wide side, and what is packed is the transpose by rows.
  bool by_dots() const { return !kIsPair<E> && 2 * factor.n <= kLanes<T>; }
  bool lies_right() const { return by_dots() && factor.row_stride == 1 && factor.dtype == dtype_of<T>(); }
  int64_t packed_size() const { return panel_size<E>(units<E>(factor.k), factor.n); }

  // Columns of the wide side that are summed over in one step.
  int64_t step(int64_t group) const {
    return by_dots() || (packed[group] == nullptr && factor.row_stride == 1) ? kDotDepth : kPackDepth;
  }

  // Rows begin .. end - 1 of the wide side; begin is a multiple of kPackDepth.
  void pack(int64_t group, int64_t begin, int64_t end) const {
    E* const to = packed[group];
    if constexpr (!kIsPair<E>) {
      if (by_dots()) {
        for (int64_t j = 0; j < factor.n; ++j) {
          load_row(factor.dtype, factor.element(group, begin, j), 0, end - begin, to + j * factor.k + begin,
                   factor.row_stride);
        }
        return;
      }
    }
    for (int64_t i = begin; i < end; i += kPackDepth) {
      pack_operand(factor.dtype, factor.element(group, i, 0), factor.row_stride, factor.col_stride,
                   minimum(kPackDepth, end - i), factor.n, to + units<E>(i) * padded<E>(factor.n));
    }
  }

  // middle (rows, rank) = view * factor; view(i, depth, scratch) is the block's columns i .. i + depth - 1,
  // if need be in scratch (rows * units(depth) elements).
  template <class View>
  void multiply(const Block& block, const View& view, T* middle, int64_t middle_stride) const {
    const int64_t group = block.group, depth_step = step(group);
    const E* const from = packed[group];
    Scratch local;
    E* const scratch = local.take<E>(block.rows * units<E>(depth_step));
    for (int64_t i = 0; i < factor.k; i += depth_step) {
      const int64_t depth = minimum(depth_step, factor.k - i);
      const Mode mode = i == 0 ? Mode::overwrite : Mode::accumulate;
      const Tile<E> tile = view(i, depth, scratch);
      if (from != nullptr && !by_dots()) {
        gemm(block.rows, factor.n, units<E>(depth), tile.data, tile.row_stride, 1,
             from + units<E>(i) * padded<E>(factor.n), middle, middle_stride, mode);
        continue;
      }
      if constexpr (!kIsPair<E>) {
        if (from != nullptr) {
          dot_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, dtype_of<T>(), from + i, factor.k, middle,
                   middle_stride, mode);
        } else if (factor.row_stride == 1) {
          dot_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, factor.dtype, factor.element(group, i, 0),
                   factor.col_stride, middle, middle_stride, mode);
        } else {
          combine_rows(block.rows, factor.n, depth, tile.data, tile.row_stride, factor.dtype,
                       factor.element(group, i, 0), factor.row_stride, middle, middle_stride, mode);
        }
      }
    }
  }
};

// The factor (rank, wide side) of the product that the middle goes into.
template <class E>
struct Wide {
  using T = SumOf<E>;

  Factor factor;
  // The wide side's bias as one more row, which a column of ones in the middle adds while the sums are still
  // in registers; null for none, and for pairs, which would round it.
  const T* bias;

  int64_t depth() const { return units<E>(factor.k) + (bias != nullptr ? 1 : 0); }
  int64_t packed_size(int64_t columns) const { return panel_size<E>(depth(), columns); }

  // Columns begin .. end - 1, begin a multiple of kColumns. Those from begin + c on, c likewise, are then at
  // panels + c * depth().
  void pack(int64_t group, int64_t begin, int64_t end, E* panels) const {
    const int64_t width = bias == nullptr ? end - begin : kPanelColumns<E>;
    for (int64_t j = begin; j < end; j += width) {
      const int64_t n = minimum(width, end - j);
      E* const panel = panels + (j - begin) * depth();
      pack_operand(factor.dtype, factor.element(group, 0, j), factor.row_stride, factor.col_stride, factor.k, n, panel);
      if constexpr (!kIsPair<E>) {
        if (bias == nullptr) continue;
        T* const last = panel + factor.k * padded<T>(n);
        for (int64_t c = 0; c < n; c += kLanes<T>) store(last + c, load_columns(bias, j + c, j + n));
      }
    }
  }
};

template <class T>
void scale_rows(int64_t rows, int64_t stride, T scale, T* values) {
  for (int64_t i = 0; i < rows * stride; i += kLanes<T>) store(values + i, load(values + i) * scale);
}

// ---- forward ----

template <class E>
class Forward {
  using T = SumOf<E>;

 public:
  explicit Forward(const LowRankForward& parameters)
      : p(parameters),
        plan(make_plan<E>(p.tokens, p.adapters, p.adapter_index, wished_blocks(), kLeastForwardRows<E>, scratch)),
        bias(bias_row()),
        down{{p.param_dtype, p.a, p.in_features, p.rank, 1, p.in_features}, scratch.take<E*>(plan.groups)},
        up{{p.param_dtype, p.b, p.rank, p.out_features, 1, p.rank}, kIsPair<E> ? nullptr : bias},
        up_packed(scratch.take<E*>(plan.groups)),
        middle_stride(kIsPair<E> ? units<E>(p.rank) : padded<E>(up.depth())),
        streams(!p.accumulate && p.out_row_stride == p.out_features &&
                may_stream<T>(p.out_dtype, p.out, p.tokens, p.out_features)) {}

  void run_all() {
    if constexpr (!kIsPair<E>) {
      if (p.adapter_index == nullptr && p.tokens <= kFewTokens) return run_few();
    }
    pack();
    const int64_t work = p.tokens * p.rank * (p.in_features + p.out_features);
    // Few blocks (a decode step): the columns of `out` are shared out too, so the middle has to wait in
    // memory.
    const int64_t splits = plan.count > 4 ? 1 : minimum(kSlices / plan.count, ceil_div(p.out_features, 512));
    if (splits == 1 || work < kSerialWork) {
      run(plan.count, work, [&](int64_t task) {
        Scratch local;
        E* const middle = local.take<E>(plan.blocks[task].rows * middle_stride);
        make_middle(plan.blocks[task], middle);
        write_out(plan.blocks[task], middle, 0, p.out_features);
      });
      return;
    }
    E* const middle = scratch.take<E>(p.tokens * middle_stride);
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
  // Matrix registers leave the last four rows and fewer of a block to the vectors, which round otherwise: there the cut is
  // by the shape alone.
  static int64_t wished_blocks() { return kIsPair<E> ? kBlocks : minimum(kBlocks, kBlocksPerThread * thread_count()); }

  bool has_adapter(const Block& block) const { return block.group < p.adapters; }

  void run_few() {
    constexpr int64_t kRankStep = 4;  // what dot_rows takes at once
    const Block block{0, 0, p.tokens};
    const int64_t work = maximum(p.tokens, kLeastWorkRows) * p.rank * (p.in_features + p.out_features);
    const Tile<E> x = view_operand(plan, block, p.x_dtype, p.x, p.x_row_stride, 0, p.in_features, p.dropout,
                                   scratch.take<E>(p.tokens * p.in_features));
    up_packed[block.group] = nullptr;
    E* const middle = scratch.take<E>(p.tokens * middle_stride);
    run(ceil_div(p.rank, kRankStep), work, [&](int64_t task) {
      const int64_t k = task * kRankStep;
      dot_rows(p.tokens, minimum(kRankStep, p.rank - k), p.in_features, x.data, x.row_stride, p.param_dtype,
               down.factor.element(block.group, 0, k), p.in_features, middle + k, middle_stride, Mode::overwrite);
    });
    finish_middle(block, middle, middle);
    const int64_t width = round_up(ceil_div(p.out_features, work >= kSerialWork ? thread_count() : 1), kColumns);
    run(ceil_div(p.out_features, width), work,
        [&](int64_t task) { write_out(block, middle, task * width, minimum((task + 1) * width, p.out_features)); });
  }

  const T* bias_row() {
    if (p.bias == nullptr || p.accumulate) return nullptr;
    return view_row(p.bias_dtype, p.bias, 0, p.out_features, scratch.take<T>(p.out_features));
  }

  void pack() {
    int64_t* const groups = scratch.take<int64_t>(p.adapters);
    int64_t count = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      down.packed[group] = up_packed[group] = nullptr;
      if (group == p.adapters || plan.tokens(group) <= kFewRows<E>) continue;
      if (!down.lies_right()) down.packed[group] = scratch.take<E>(down.packed_size());
      up_packed[group] = scratch.take<E>(up.packed_size(p.out_features));
      groups[count++] = group;
    }
    const int64_t down_tasks = down.lies_right() ? 0 : ceil_div(p.in_features, kPackColumns);
    const int64_t each = down_tasks + ceil_div(p.out_features, kPackColumns);
    run(count * each, kPackWork * count * p.rank * (p.in_features + p.out_features), [&](int64_t task) {
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

  // middle = scale * dropout(x) A^T as a left-hand side, and a column of ones for the bias; hidden is stored without the
  // scale.
  void make_middle(const Block& block, E* middle) const {
    Scratch local;
    const int64_t stride = padded<T>(kIsPair<E> ? p.rank : up.depth());
    T* sums = nullptr;
    if constexpr (kIsPair<E>) {
      sums = local.take<T>(block.rows * stride);
    } else {
      sums = middle;
    }
    if (has_adapter(block)) {
      const auto view = [&](int64_t i, int64_t depth, E* columns) {
        prefetch_columns(plan, block, p.x_dtype, p.x, p.x_row_stride, i + depth,
                         minimum(depth, p.in_features - i - depth));
        return view_operand(plan, block, p.x_dtype, p.x, p.x_row_stride, i, depth, p.dropout, columns);
      };
      down.multiply(block, view, sums, stride);
    }
    finish_middle(block, sums, middle);
  }

  void finish_middle(const Block& block, T* sums, E* middle) const {
    const int64_t stride = padded<T>(kIsPair<E> ? p.rank : up.depth());
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const row = sums + i * stride;
      if (p.hidden != nullptr) {
        T* const hidden = static_cast<T*>(p.hidden) + plan.token(block, i) * p.rank;
        const size_t bytes = static_cast<size_t>(p.rank) * sizeof(T);
        has_adapter(block) ? __builtin_memcpy(hidden, row, bytes) : __builtin_memset(hidden, 0, bytes);
      }
      if (!has_adapter(block)) continue;
      scale_rows(1, p.rank, static_cast<T>(p.scale), row);
      if (up.bias != nullptr) row[p.rank] = T{1};
      if constexpr (kIsPair<E>) store_operand(row, p.rank, middle + i * middle_stride);
    }
  }

  void write_out(const Block& block, const E* middle, int64_t begin, int64_t end) const {
    if (!has_adapter(block)) return write_base(block, begin, end);
    Scratch local;
    T* const tile = local.take<T>(block.rows * kColumns);
    E* const panels = local.take<E>(up.packed_size(kColumns));
    // Where out holds the sums as they are, they go straight there.
    const bool holds_sums = !kIsPair<E> && !streams && p.out_dtype == dtype_of<T>() && plan.contiguous(block);
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      const E* const from = up_packed[block.group];
      if (from == nullptr) up.pack(block.group, j, j + n, panels);
      const E* const b = from != nullptr ? from + j * up.depth() : panels;
      if (holds_sums && n % kLanes<T> == 0) {
        T* const out = static_cast<T*>(p.out) + plan.token(block, 0) * p.out_row_stride + j;
        gemm(block.rows, n, up.depth(), middle, middle_stride, 1, b, out, p.out_row_stride,
             p.accumulate ? Mode::accumulate : Mode::overwrite);
      } else {
        gemm(block.rows, n, up.depth(), middle, middle_stride, 1, b, tile, kColumns, Mode::overwrite);
        store_tile(block, tile, j, n);
      }
    }
    if (streams) finish_streaming();
  }

  // out (+)= tile, for columns j .. j + n - 1; and the bias where the product has not added it (Wide::bias).
  void store_tile(const Block& block, const T* tile, int64_t j, int64_t n) const {
    const T* const missing = kIsPair<E> && bias != nullptr ? bias + j : nullptr;
    visit_storage(p.out_dtype, [&](auto storage) {
      using Storage = decltype(storage);
      for (int64_t i = 0; i < block.rows; ++i) {
        Storage* const out = static_cast<Storage*>(p.out) + plan.token(block, i) * p.out_row_stride + j;
        const T* const row = tile + i * kColumns;
        for_columns<T>(n, [&](auto at, int) LWFT_INLINE {
          Vec<T> value = load_at<T>(row, at);
          if (missing != nullptr) value += load_at<T>(missing, at);
          if (p.accumulate) value += load_at<T>(out, at);
          write_at<T>(streams, out, at, value);
        });
      }
    });
  }

  // Rows without an adapter: out = bias, or stays what it was.
  void write_base(const Block& block, int64_t begin, int64_t end) const {
    if (p.accumulate) return;
    Scratch local;
    const T* row = bias != nullptr ? bias + begin : zeros<T>(end - begin, local);
    for (int64_t i = 0; i < block.rows; ++i) {
      store_row(p.out_dtype, row, end - begin, p.out, plan.token(block, i) * p.out_row_stride + begin);
    }
  }

  Scratch scratch;
  const LowRankForward& p;
  const Plan plan;
  const T* const bias;  // (out_features), or null
  const Deep<E> down;   // A^T (in_features, rank)
  const Wide<E> up;     // B^T (rank, out_features)
  E** const up_packed;
  const int64_t middle_stride;
  const bool streams;  // out is written past the caches
};

// ---- backward ----

template <class E>
class Backward {
  using T = SumOf<E>;

 public:
  explicit Backward(const LowRankBackward& parameters)
      : p(parameters),
        plan(make_plan<E>(p.tokens, p.adapters, p.adapter_index, kBlocks, kLeastBackwardRows<E>, scratch)),
        up{{p.param_dtype, p.b, p.out_features, p.rank, p.rank, 1}, scratch.take<E*>(plan.groups)},
        down{{p.param_dtype, p.a, p.rank, p.in_features, p.in_features, 1}, nullptr},
        middle_stride(padded<T>(p.rank)),
        streams(p.dx != nullptr && may_stream<T>(p.x_dtype, p.dx, p.tokens, p.in_features)) {}

  void run_all() {
    if constexpr (!kIsPair<E>) {
      if (p.adapter_index == nullptr && p.tokens > 0 && p.tokens <= kFewTokens) return run_few();
    }
    if (p.dx != nullptr || p.da != nullptr) make_middle();
    if (kIsPair<E> && p.db != nullptr) pack_hidden();
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
    const int64_t slices = maximum(kFewestSlices, minimum(2 * thread_count(), kSlices));
    return minimum(kWidestSlice, round_up(ceil_div(features, slices), kColumns));
  }
  const Block* first_block(int64_t group) const { return plan.blocks + plan.group_block[group]; }
  const Block* last_block(int64_t group) const { return plan.blocks + plan.group_block[group + 1]; }

  // ---- few tokens ----

  // Columns of grad_out for one task. Over them goes a sum, so they depend on the shape alone.
  int64_t few_columns() const {
    constexpr int64_t kTaskWork = kSerialWork / 8, kLeast = 2 * kColumns, kMost = 16 * kColumns;
    const int64_t columns = ceil_div(kTaskWork, maximum(p.tokens, kLeastWorkRows) * p.rank);
    return maximum(kLeast, minimum(kMost, round_up(columns, kColumns)));
  }

  // All of grad_out, then all of x, by columns.
  void run_few() {
    const int64_t rows = maximum(p.tokens, kLeastWorkRows);
    const Block block{0, 0, p.tokens};
    const Tile<T> dy = view_columns(plan, block, p.out_dtype, p.grad_out, p.grad_out_row_stride, 0, p.out_features,
                                    scratch.take<T>(p.tokens * p.out_features));
    T* const hidden = scratch.take<T>(p.tokens * middle_stride);  // with the scale, and whole vectors
    for (int64_t i = 0; i < p.tokens; ++i) {
      const T* const from = static_cast<const T*>(p.hidden) + i * p.rank;
      for (int64_t k = 0; k < p.rank; k += kLanes<T>) {
        store(hidden + i * middle_stride + k, load_columns(from, k, p.rank) * static_cast<T>(p.scale));
      }
    }
    // the sums of the middle: one for each task, so that they do not depend on who does it
    const bool wants_middle = p.dx != nullptr || p.da != nullptr;
    const int64_t columns_of_task = few_columns(), tasks = ceil_div(p.out_features, columns_of_task);
    const int64_t size = p.tokens * middle_stride;
    middle = scratch.take<T>(wants_middle ? tasks * size : 0);
    run(tasks, 2 * rows * p.rank * p.out_features, [&](int64_t task) {
      const int64_t begin = task * columns_of_task, n = minimum(columns_of_task, p.out_features - begin);
      const Tile<T> columns{dy.data + begin, dy.row_stride};
      if (wants_middle) few_middle(columns, begin, n, middle + task * size);
      if (p.db != nullptr) {
        tall_gradient<T>(p.tokens, n, p.rank, columns, {hidden, middle_stride}, p.param_dtype, p.db, begin * p.rank);
      }
      if (p.dbias != nullptr) bias_gradient(p.tokens, n, columns, T{1}, p.bias_dtype, p.dbias, begin);
    });
    if (!wants_middle) return;
    for (int64_t task = 1; task < tasks; ++task) {
      for (int64_t i = 0; i < size; i += kLanes<T>)
        store(middle + i, load(middle + i) + load(middle + task * size + i));
    }
    scale_rows(p.tokens, middle_stride, static_cast<T>(p.scale), middle);
    const int64_t most = p.tokens <= kFewRows<float> ? 16 * kColumns : kWidestSlice;
    const int64_t width = minimum(most, round_up(ceil_div(p.in_features, thread_count()), kColumns));
    run(ceil_div(p.in_features, width), 2 * rows * p.rank * p.in_features,
        [&](int64_t task) { few_columns_of_x(block, task * width, minimum(width, p.in_features - task * width)); });
  }

  // sums = dy B of the rows begin .. begin + n - 1 of B.
  void few_middle(const Tile<T>& dy, int64_t begin, int64_t n, T* sums) const {
    const int64_t step =
        p.rank < 4 * kLanes<T> ? kDotDepth : kDepth;  // combine_rows takes few columns in several chains
    for (int64_t i = 0; i < n; i += step) {
      combine_rows(p.tokens, p.rank, minimum(step, n - i), dy.data + i, dy.row_stride, p.param_dtype,
                   up.factor.element(0, begin + i, 0), p.rank, sums, middle_stride,
                   i == 0 ? Mode::overwrite : Mode::accumulate);
    }
  }

  // Columns begin .. begin + n - 1 of dA = middle^T (mask * x) and dx = mask * (middle A).
  void few_columns_of_x(const Block& block, int64_t begin, int64_t n) const {
    Scratch local;
    const int64_t stride = padded<T>(n);
    const void* x = element(p.x_dtype, p.x, begin);
    DType x_dtype = p.x_dtype;
    int64_t x_stride = p.x_row_stride;
    T* mask = nullptr;
    if (p.dropout.active()) {
      mask = local.take<T>(p.tokens * stride);
      T* const masked = local.take<T>(p.da != nullptr ? p.tokens * stride : 0);
      for (int64_t i = 0; i < p.tokens; ++i) {
        for (int64_t j = 0; j < n; j += kColumns) {
          dropout_multipliers(p.dropout, i, begin + j, minimum(kColumns, n - j), mask + i * stride + j);
        }
        if (p.da == nullptr) continue;
        load_row(p.x_dtype, p.x, i * p.x_row_stride + begin, n, masked + i * stride);
        multiply_row(n, mask + i * stride, masked + i * stride);
      }
      x = masked, x_dtype = dtype_of<T>(), x_stride = stride;
    }
    if (p.da != nullptr) {
      wide_gradient<T>(p.tokens, p.rank, n, {middle, middle_stride}, x_dtype, x, x_stride, p.param_dtype, p.da, begin,
                       p.in_features);
    }
    if (p.dx == nullptr) return;
    const bool in_place = mask == nullptr && p.x_dtype == dtype_of<T>();
    T* const dx = in_place ? static_cast<T*>(p.dx) + begin : local.take<T>(p.tokens * stride);
    const int64_t dx_stride = in_place ? p.in_features : stride;
    combine_rows(p.tokens, n, p.rank, middle, middle_stride, p.param_dtype, down.factor.element(block.group, 0, begin),
                 p.in_features, dx, dx_stride, Mode::overwrite);
    if (in_place) return;
    for (int64_t i = 0; mask != nullptr && i < p.tokens; ++i) multiply_row(n, mask + i * stride, dx + i * stride);
    store_rows(p.x_dtype, p.tokens, n, dx, stride, p.dx, begin, p.in_features);
  }

  // ---- many ----

  // middle = scale * dy B, in the order of the plan.
  void make_middle() {
    int64_t* const groups = scratch.take<int64_t>(p.adapters);
    int64_t count = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      up.packed[group] = nullptr;
      if (group == p.adapters || plan.tokens(group) <= kFewRows<E> || up.lies_right()) continue;
      up.packed[group] = scratch.take<E>(up.packed_size());
      groups[count++] = group;
    }
    const int64_t each = ceil_div(p.out_features, kPackColumns);
    run(count * each, kPackWork * count * p.rank * p.out_features, [&](int64_t task) {
      const int64_t begin = task % each * kPackColumns;
      up.pack(groups[task / each], begin, minimum(begin + kPackColumns, p.out_features));
    });
    if constexpr (kIsPair<E>) {
      middle_rows = scratch.take<E>(p.dx != nullptr ? p.tokens * units<E>(p.rank) : 0);
      middle_panels = scratch.take<E>(p.da != nullptr ? plan.count * block_panels() : 0);
    } else {
      middle = scratch.take<T>(p.tokens * middle_stride);
    }
    run(plan.group_block[p.adapters], p.tokens * p.rank * p.out_features, [&](int64_t task) {
      const Block& block = plan.blocks[task];
      Scratch local;
      T* rows = nullptr;
      if constexpr (kIsPair<E>) {
        rows = local.take<T>(block.rows * middle_stride);
      } else {
        rows = middle + block.first * middle_stride;
      }
      const auto view = [&](int64_t j, int64_t n, E* columns) {
        prefetch_columns(plan, block, p.out_dtype, p.grad_out, p.grad_out_row_stride, j + n,
                         minimum(n, p.out_features - j - n));
        return view_operand(plan, block, p.out_dtype, p.grad_out, p.grad_out_row_stride, j, n, Dropout{}, columns);
      };
      up.multiply(block, view, rows, middle_stride);
      scale_rows(block.rows, middle_stride, static_cast<T>(p.scale), rows);
      if constexpr (kIsPair<E>) {
        const int64_t stride = units<E>(p.rank);
        for (int64_t i = 0; p.dx != nullptr && i < block.rows; ++i) {
          store_operand(rows + i * middle_stride, p.rank, middle_rows + (block.first + i) * stride);
        }
        if (p.da != nullptr) {
          pack_operand(dtype_of<T>(), rows, middle_stride, 1, block.rows, p.rank,
                       middle_panels + task * block_panels());
        }
      }
    });
  }

  // For pairs: the rows of a block as panels of pairs of tokens.
  int64_t block_panels() const { return panel_size<E>(units<E>(kBlockRows<E>), p.rank); }
  void pack_hidden() {
    if constexpr (kIsPair<E>) {
      hidden_panels = scratch.take<E>(plan.count * block_panels());
      run(plan.count, kPackWork * p.tokens * p.rank, [&](int64_t task) {
        const Block& block = plan.blocks[task];
        pack_operand(dtype_of<T>(), static_cast<const T*>(p.hidden) + block.first * p.rank, p.rank, 1, block.rows,
                     p.rank, hidden_panels + task * block_panels());
      });
    }
  }

  // Columns begin .. end - 1 of dx and dA.
  void take_in_slice(int64_t begin, int64_t end) const {
    Scratch local;
    const int64_t stride = padded<T>(end - begin);
    T* const sums = p.da != nullptr ? local.take<T>(p.rank * stride) : nullptr;
    E* const panels = p.dx != nullptr ? local.take<E>(down.packed_size(end - begin)) : nullptr;
    for (int64_t group = 0; group < p.adapters; ++group) {
      const Block *const first = first_block(group), *const last = last_block(group);
      const bool packs = panels != nullptr && first < last && !reads_a_as_it_lies(group);
      if (packs) down.pack(group, begin, end, panels);
      for (const Block* block = first; block < last; ++block) {
        const Mode mode = block == first ? Mode::overwrite : Mode::accumulate;
        for (int64_t j = begin; j < end; j += kColumns) {
          const int64_t at_j = j - begin;
          const bool more = j + kColumns < end;
          if (sums != nullptr && (more || block + 1 < last)) {
            prefetch_columns(plan, more ? *block : block[1], p.x_dtype, p.x, p.x_row_stride,
                             more ? j + kColumns : begin, kColumns);
          }
          take_x(*block, j, minimum(kColumns, end - j), sums != nullptr ? sums + at_j : nullptr, stride, mode,
                 packs ? panels + at_j * down.depth() : nullptr);
        }
      }
      if (sums == nullptr) continue;
      if (first == last) __builtin_memset(sums, 0, static_cast<size_t>(p.rank * stride) * sizeof(T));
      for (int64_t i = 0; i < p.rank; ++i) {
        store_row(p.param_dtype, sums + i * stride, end - begin, p.da, (group * p.rank + i) * p.in_features + begin);
      }
    }
    if (streams) finish_streaming();
    if (p.dx == nullptr || first_block(p.adapters) == last_block(p.adapters)) return;
    const T* const row = zeros<T>(end - begin, local);
    for (int64_t i = plan.group_first[p.adapters]; i < plan.group_first[p.adapters + 1]; ++i) {
      store_row(p.x_dtype, row, end - begin, p.dx, plan.order[i] * p.in_features + begin);
    }
  }

  // dx = mask * (middle A), dA (+)= middle^T (mask * x), for columns j .. j + n - 1 of x and a block of
  // tokens.
  void take_x(const Block& block, int64_t j, int64_t n, T* sums, int64_t sums_stride, Mode mode,
              const E* a_panels) const {
    Scratch local;
    T* const tile = local.take<T>(block.rows * kColumns);
    T* mask = nullptr;
    if (p.dropout.active()) {
      mask = local.take<T>(block.rows * kColumns);
      for (int64_t i = 0; i < block.rows; ++i) {
        dropout_multipliers(p.dropout, plan.token(block, i), j, n, mask + i * kColumns);
      }
    }
    if (sums != nullptr) {
      if constexpr (kIsPair<E>) {
        E* const x_panels = local.take<E>(panel_size<E>(units<E>(block.rows), kColumns));
        if (mask == nullptr) {
          pack_operand(p.x_dtype, element(p.x_dtype, p.x, plan.token(block, 0) * p.x_row_stride + j), p.x_row_stride, 1,
                       block.rows, n, x_panels);
        } else {
          const Tile<T> x = masked_input(block, j, n, mask, tile);
          pack_operand(dtype_of<T>(), x.data, x.row_stride, 1, block.rows, n, x_panels);
        }
        add_products(block, middle_panels, n, x_panels, sums, sums_stride, mode);
      } else {
        const Tile<T> x = masked_input(block, j, n, mask, tile);
        gemm_rows(p.rank, n, block.rows, middle + block.first * middle_stride, 1, middle_stride, x.data, x.row_stride,
                  sums, sums_stride, mode);
      }
    }
    if (p.dx == nullptr) return;
    const bool as_it_is =
        !kIsPair<E> && !streams && mask == nullptr && p.x_dtype == dtype_of<T>() && n % kLanes<T> == 0;
    if (as_it_is && plan.contiguous(block)) {
      T* const dx = static_cast<T*>(p.dx) + plan.token(block, 0) * p.in_features + j;
      times_a(block, j, n, a_panels, dx, p.in_features);
      return;
    }
    times_a(block, j, n, a_panels, tile, kColumns);
    visit_storage(p.x_dtype, [&](auto storage) {
      using Storage = decltype(storage);
      for (int64_t i = 0; i < block.rows; ++i) {
        Storage* const dx = static_cast<Storage*>(p.dx) + plan.token(block, i) * p.in_features + j;
        const T* const row = tile + i * kColumns;
        const T* const factors = mask != nullptr ? mask + i * kColumns : nullptr;
        for_columns<T>(n, [&](auto at, int) LWFT_INLINE {
          Vec<T> value = load_at<T>(row, at);
          if (factors != nullptr) value *= load_at<T>(factors, at);
          write_at<T>(streams, dx, at, value);
        });
      }
    });
  }

  // One block uses A: packing it would cost as much as the product.
  bool reads_a_as_it_lies(int64_t group) const {
    return !kIsPair<E> && p.param_dtype == dtype_of<T>() && p.in_features % kLanes<T> == 0 &&
           last_block(group) - first_block(group) == 1;
  }

  // middle A, columns j .. j + n - 1 of it; a_panels is null where A is read as it lies
  void times_a(const Block& block, int64_t j, int64_t n, const E* a_panels, T* to, int64_t stride) const {
    if constexpr (!kIsPair<E>) {
      if (a_panels == nullptr) {
        const T* const a = static_cast<const T*>(down.factor.element(block.group, 0, j));
        return gemm_rows(block.rows, n, p.rank, middle + block.first * middle_stride, middle_stride, 1, a,
                         p.in_features, to, stride, Mode::overwrite);
      }
    }
    if constexpr (kIsPair<E>) {
      const int64_t depth = units<E>(p.rank);
      gemm(block.rows, n, depth, middle_rows + block.first * depth, depth, 1, a_panels, to, stride, Mode::overwrite);
    } else {
      gemm(block.rows, n, p.rank, middle + block.first * middle_stride, middle_stride, 1, a_panels, to, stride,
           Mode::overwrite);
    }
  }

  // For pairs: sums (rank, n) (+)= rows^T B over a block's tokens; rows (tokens, rank) as panels of each block.
  void add_products(const Block& block, const E* panels, int64_t n, const E* b, T* sums, int64_t sums_stride,
                    Mode mode) const {
    const E* const own = panels + (&block - plan.blocks) * block_panels();
    const int64_t depth = units<E>(block.rows);
    for (int64_t i = 0; i < p.rank; i += kPanelColumns<E>) {
      const int64_t count = minimum(kPanelColumns<E>, p.rank - i);
      gemm(count, n, depth, own + i * depth, 1, padded<E>(count), b, sums + i * sums_stride, sums_stride, mode);
    }
  }

  Tile<T> masked_input(const Block& block, int64_t j, int64_t n, const T* mask, T* tile) const {
    if (mask == nullptr) return view_rows(block, p.x_dtype, p.x, p.x_row_stride, j, n, tile);
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const row = tile + i * kColumns;
      load_row(p.x_dtype, p.x, plan.token(block, i) * p.x_row_stride + j, n, row);
      multiply_row(n, mask + i * kColumns, row);
    }
    return {tile, kColumns};
  }

  // Columns col0 .. col0 + n - 1 of a block's tokens as a B of gemm_rows: where they lie, or in scratch, of kColumns
  // elements a row.
  Tile<T> view_rows(const Block& block, DType dtype, const void* base, int64_t row_stride, int64_t col0, int64_t n,
                    T* rows) const {
    if (dtype == dtype_of<T>() && n % kLanes<T> == 0 && plan.contiguous(block)) {
      return {static_cast<const T*>(base) + plan.token(block, 0) * row_stride + col0, row_stride};
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      load_row(dtype, base, plan.token(block, i) * row_stride + col0, n, rows + i * kColumns);
    }
    return {rows, kColumns};
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
    T* columns = nullptr;
    E* panels = nullptr;
    if constexpr (kIsPair<E>) {
      panels = local.take<E>(panel_size<E>(units<E>(block.rows), kColumns));
    } else {
      columns = local.take<T>(block.rows * kColumns);
    }
    Tile<T> hidden{};
    if (db != nullptr && !kIsPair<E>) {
      T* const gathered = local.take<T>(block.rows * p.rank);
      hidden = view_columns(plan, block, dtype_of<T>(), p.hidden, p.rank, 0, p.rank, gathered);
    }
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      const bool more = j + kColumns < end;
      if (more || &block + 1 < plan.blocks + plan.count) {
        prefetch_columns(plan, more ? block : (&block)[1], p.out_dtype, p.grad_out, p.grad_out_row_stride,
                         more ? j + kColumns : begin, kColumns);
      }
      if constexpr (kIsPair<E>) {
        constexpr E kOnes = {0x3F80, 0x3F80};
        const int64_t depth = units<E>(block.rows);
        pack_operand(p.out_dtype, element(p.out_dtype, p.grad_out, block.first * p.grad_out_row_stride + j),
                     p.grad_out_row_stride, 1, block.rows, n, panels);
        if (db != nullptr) add_products(block, hidden_panels, n, panels, db + (j - begin), stride, mode);
        if (dbias != nullptr) gemm(1, n, depth, &kOnes, 0, 0, panels, dbias + (j - begin), stride, Mode::accumulate);
      } else {
        const Tile<T> dy = view_rows(block, p.out_dtype, p.grad_out, p.grad_out_row_stride, j, n, columns);
        if (db != nullptr) {
          gemm_rows(p.rank, n, block.rows, hidden.data, 1, hidden.row_stride, dy.data, dy.row_stride, db + (j - begin),
                    stride, mode);
        }
        if (dbias != nullptr) add_rows(block.rows, n, dy, dbias + (j - begin));
      }
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
    if (p.rank <= kPanelColumns<T> && padded<T>(p.rank) == p.rank) {  // one panel, which is dB as it lies
      return store_row(p.param_dtype, panels, n * p.rank, p.db, (group * p.out_features + begin) * p.rank);
    }
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
  const Deep<E> up;    // B (out_features, rank)
  const Wide<E> down;  // A (rank, in_features)
  const int64_t middle_stride;
  const bool streams;          // dx is written past the caches
  T* middle = nullptr;         // (tokens, rank) in the order of the plan; for pairs instead, as far as it is wanted,
  E* middle_rows = nullptr;    // as rows of pairs of its columns,
  E* middle_panels = nullptr;  // and of each block as panels of pairs of tokens; hidden likewise
  E* hidden_panels = nullptr;
};

// Runs Kernel<E>(p) with the E for p's dtypes. Tokens in an order of their own have no neighbours to be paired with.
template <template <class> class Kernel, class Parameters>
void run_by_dtype(const Parameters& p) {
  if (p.param_dtype == DType::f64) return Kernel<double>(p).run_all();
  if constexpr (kMultipliesBFloat16) {
    const bool all_bfloat16 = p.x_dtype == DType::bf16 && p.param_dtype == DType::bf16 && p.out_dtype == DType::bf16;
    if (all_bfloat16 && p.adapter_index == nullptr && p.tokens > kFewRows<BFloat16Pair>) {
      return Kernel<BFloat16Pair>(p).run_all();
    }
  }
  Kernel<float>(p).run_all();
}

void forward(const LowRankForward& p) {
  if (p.tokens > 0) run_by_dtype<Forward>(p);
}

void backward(const LowRankBackward& p) { run_by_dtype<Backward>(p); }

}  // namespace

extern const LowRankKernels lowrank_kernels;
const LowRankKernels lowrank_kernels = {forward,      backward,    base_product,  base_product_is_faster,
                                        packed_bytes, pack_weight, unpack_weight, packed_product};

}  // namespace lwft::LWFT_ISA
