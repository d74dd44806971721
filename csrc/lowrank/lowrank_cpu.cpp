// The low-rank product on the CPU. A task takes a block of tokens of one adapter through both thin products while
// their (rows, rank) middle stays in the cache:
//
//     forward    s  = dropout(x) A^T          out = bias + scale * s B^T
//     backward   ds = scale * dy B            dx  = mask * (ds A),   dA += ds^T dropout(x),   dB += scale * dy^T s
//
// Backward goes over dy once and over x once, and draws the dropout mask once. dA, dB and dbias are summed over the
// tokens in two steps: a task (a chunk of blocks) has partial sums of its own, which are added in the order of the
// chunks. Blocks and chunks are cut by shape alone, so the bits do not depend on the number of threads.
//
// Scratch memory, in elements of float (double for f64): the packed adapters that occur, as large as they are; in
// backward the partial sums, at most kPartials times rank * (in_features + out_features) plus once that for every
// adapter that occurs.
#include "lowrank/lowrank.h"

#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/threads.h"
#include "common/cpu/tile.h"

namespace lwft::LWFT_ISA {
namespace {

// Tokens of a block: a multiple of kTileRows, and 48 x kColumns floats fit the first cache beside a panel.
constexpr int64_t kBlockRows = 48, kLeastBlockRows = 2 * kTileRows;
// A short batch is cut into about so many blocks, for as many threads.
constexpr int64_t kBlocks = 32;
// Columns of a wide matrix that are written in one step: one block of the dropout stream, whole panels on every level.
constexpr int64_t kColumns = kPhiloxColumns;
static_assert(kColumns % kPanelColumns<float> == 0 && kColumns % kPanelColumns<double> == 0);
// Columns that are summed over in one step. A chain of so many additions is as accurate as the vendor's.
constexpr int64_t kDepth = 64, kDotDepth = kKBlock;
static_assert(kDepth % kColumns == 0 && kDotDepth % kDepth == 0);
// An adapter with so few tokens is read where it lies: it would be packed for one use.
constexpr int64_t kFewRows = 8;
// Partial sums of dA, dB and dbias.
constexpr int64_t kPartials = 32, kPartialBytes = int64_t{64} << 20;
// Multiply-adds (or copied elements) below which a loop is not worth waking other threads for.
constexpr int64_t kSerialWork = 1 << 18;
constexpr int64_t kPackColumns = 1024;

template <class Body>
void run(int64_t tasks, int64_t work, const Body& body) {
  if (work >= kSerialWork) return parallel_for(tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

const void* at(DType dtype, const void* base, int64_t offset) {
  return static_cast<const char*>(base) + offset * static_cast<int64_t>(element_size(dtype));
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
  bool contiguous(const Block& block) const {
    return token(block, block.rows - 1) - token(block, 0) == block.rows - 1;
  }
};

Plan make_plan(int64_t tokens, int64_t adapters, const int64_t* adapter_index, Scratch& scratch) {
  const int64_t groups = adapters + 1;
  int64_t* const first = scratch.take<int64_t>(groups + 1);
  int64_t* const group_block = scratch.take<int64_t>(groups + 1);
  int64_t* order = nullptr;
  if (adapter_index == nullptr) {
    for (int64_t group = 0; group <= groups; ++group) first[group] = group == 0 ? 0 : tokens;
  } else {
    const auto group_of = [&](int64_t token) {
      return adapter_index[token] < 0 ? adapters : adapter_index[token];
    };
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

// Columns col0 .. col0 + n - 1 of a block's tokens: where they lie, or converted into scratch (rows * n elements).
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

// ---- the two factors ----

// A (k, n) matrix per adapter, as an operand of a product: element (i, j) at i * row_stride + j * col_stride.
struct Factor {
  DType dtype;
  const void* data;
  int64_t k, n, row_stride, col_stride;

  const void* element(int64_t adapter, int64_t i, int64_t j) const {
    return at(dtype, data, adapter * k * n + i * row_stride + j * col_stride);
  }
};

// A rank of half a vector or less: sums over vectors of the wide side waste no lanes, sums over a broadcast would.
template <class T>
constexpr bool by_dots(int64_t rank) {
  return 2 * rank <= kLanes<T>;
}

// The factors of each group as a product wants them, `deep` (wide side, rank) and `wide` (rank, wide side); null where
// a factor is read as it lies. `deep` is packed in steps of kDepth, or is its transpose by rows where by_dots.
template <class T>
struct Packed {
  T** deep;
  T** wide;
};

template <class T>
void pack_deep(const Factor& deep, int64_t adapter, int64_t begin, int64_t end, T* to) {
  if (by_dots<T>(deep.n)) {
    for (int64_t j = 0; j < deep.n; ++j) {
      load_row(deep.dtype, deep.element(adapter, begin, j), 0, end - begin, to + j * deep.k + begin,
               deep.row_stride);
    }
    return;
  }
  for (int64_t i = begin; i < end; i += kDepth) {
    pack_panels(deep.dtype, deep.element(adapter, i, 0), deep.row_stride, deep.col_stride,
                minimum(kDepth, end - i), deep.n, to + i * padded<T>(deep.n));
  }
}

template <class T>
Packed<T> pack_factors(const Plan& plan, const Factor& deep, const Factor& wide, Scratch& scratch) {
  const int64_t adapters = plan.groups - 1;
  const bool deep_lies_right = by_dots<T>(deep.n) && deep.row_stride == 1 && deep.dtype == dtype_of<T>();
  Packed<T> packed{scratch.take<T*>(plan.groups), scratch.take<T*>(plan.groups)};
  int64_t* const used = scratch.take<int64_t>(adapters);
  int64_t count = 0;
  for (int64_t group = 0; group < plan.groups; ++group) {
    packed.deep[group] = packed.wide[group] = nullptr;
    if (group == adapters || plan.tokens(group) <= kFewRows) continue;
    if (!deep_lies_right) packed.deep[group] = scratch.take<T>(panel_size<T>(deep.k, deep.n));
    packed.wide[group] = scratch.take<T>(panel_size<T>(wide.k, wide.n));
    used[count++] = group;
  }
  const int64_t deep_tasks = deep_lies_right ? 0 : ceil_div(deep.k, kPackColumns);
  const int64_t each = deep_tasks + ceil_div(wide.n, kPackColumns);
  run(count * each, count * deep.n * (deep.k + wide.n), [&](int64_t task) {
    const int64_t group = used[task / each], part = task % each;
    if (part < deep_tasks) {
      const int64_t begin = part * kPackColumns;
      pack_deep(deep, group, begin, minimum(begin + kPackColumns, deep.k), packed.deep[group]);
    } else {
      const int64_t j = (part - deep_tasks) * kPackColumns;
      pack_panels(wide.dtype, wide.element(group, 0, j), wide.row_stride, wide.col_stride, wide.k,
                  minimum(kPackColumns, wide.n - j), packed.wide[group] + j * wide.k);
    }
  });
  return packed;
}

// How many columns of the wide side into_middle sums over at a time.
template <class T>
int64_t depth_step(const Factor& deep, const T* packed) {
  if (by_dots<T>(deep.n) || (packed == nullptr && deep.row_stride == 1)) return kDotDepth;
  return kDepth;
}

// middle (rows, rank) += view (rows, depth) deep[i .. i + depth, :], or = for i == 0.
template <class T>
void into_middle(const Factor& deep, const T* packed, int64_t adapter, int64_t rows, Tile<T> view, int64_t i,
                 int64_t depth, T* middle, int64_t middle_stride) {
  const Mode mode = i == 0 ? Mode::overwrite : Mode::accumulate;
  if (packed != nullptr && by_dots<T>(deep.n)) {
    dot_rows(rows, deep.n, depth, view.data, view.row_stride, dtype_of<T>(), packed + i, deep.k, middle,
             middle_stride, mode);
  } else if (packed != nullptr) {
    gemm(rows, deep.n, depth, view.data, view.row_stride, 1, packed + i * padded<T>(deep.n), middle,
         middle_stride, mode);
  } else if (deep.row_stride == 1) {
    dot_rows(rows, deep.n, depth, view.data, view.row_stride, deep.dtype, deep.element(adapter, i, 0),
             deep.col_stride, middle, middle_stride, mode);
  } else {
    combine_rows(rows, deep.n, depth, view.data, view.row_stride, deep.dtype, deep.element(adapter, i, 0),
                 deep.row_stride, middle, middle_stride, mode);
  }
}

// result (rows, n) (+)= middle (rows, rank) wide[:, j .. j + n], n <= kColumns. `scratch` is for rank * kColumns.
template <class T>
void out_of_middle(const Factor& wide, const T* packed, int64_t adapter, int64_t rows, const T* middle,
                   int64_t middle_stride, int64_t j, int64_t n, T* result, int64_t result_stride, Mode mode,
                   T* scratch) {
  const T* panels = scratch;
  if (packed != nullptr) {
    panels = packed + j * wide.k;
  } else {
    pack_panels(wide.dtype, wide.element(adapter, 0, j), wide.row_stride, wide.col_stride, wide.k, n,
                scratch);
  }
  gemm(rows, n, wide.k, middle, middle_stride, 1, panels, result, result_stride, mode);
}

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
        down{p.param_dtype, p.a, p.in_features, p.rank, 1, p.in_features},
        up{p.param_dtype, p.b, p.rank, p.out_features, 1, p.rank},
        packed(pack_factors<T>(plan, down, up, scratch)),
        middle_stride(padded<T>(p.rank)) {
    if (p.bias != nullptr && !p.accumulate) {
      bias = scratch.take<T>(p.out_features);
      load_row(p.bias_dtype, p.bias, 0, p.out_features, bias);
    }
  }

  void run_all() {
    const int64_t work = p.tokens * p.rank * (p.in_features + p.out_features);
    // Few blocks (a decode step): the columns of `out` are shared out too, so the middle has to wait in memory.
    const int64_t splits = plan.count > 4 ? 1 : minimum(16 / plan.count, ceil_div(p.out_features, 512));
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
    run(plan.count, work,
        [&](int64_t task) { make_middle(plan.blocks[task], middle_of(plan.blocks[task])); });
    run(plan.count * splits, work, [&](int64_t task) {
      const Block& block = plan.blocks[task / splits];
      const int64_t begin = task % splits * width;
      write_out(block, middle_of(block), begin, minimum(begin + width, p.out_features));
    });
  }

 private:
  bool has_adapter(const Block& block) const { return block.group < p.adapters; }

  // middle = scale * dropout(x) A^T; hidden is stored without the scale.
  void make_middle(const Block& block, T* middle) const {
    if (!has_adapter(block)) {
      __builtin_memset(middle, 0, static_cast<size_t>(block.rows * middle_stride) * sizeof(T));
    } else {
      Scratch local;
      const T* const deep = packed.deep[block.group];
      const int64_t step = depth_step(down, deep);
      T* const columns = local.take<T>(block.rows * step);
      for (int64_t k0 = 0; k0 < p.in_features; k0 += step) {
        const int64_t depth = minimum(step, p.in_features - k0);
        into_middle(down, deep, block.group, block.rows, input(block, k0, depth, columns), k0, depth, middle,
                    middle_stride);
      }
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      T* const hidden = static_cast<T*>(p.hidden) + plan.token(block, i) * p.rank;
      __builtin_memcpy(hidden, middle + i * middle_stride, static_cast<size_t>(p.rank) * sizeof(T));
    }
    scale_rows(block.rows, middle_stride, static_cast<T>(p.scale), middle);
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
    Scratch local;
    T* const tile = local.take<T>(block.rows * kColumns);
    T* const panels = local.take<T>(panel_size<T>(p.rank, kColumns));
    // Sums may go straight to out where it holds them as they are and nothing but them is added.
    const bool adds_only = p.out_dtype == dtype_of<T>() && has_adapter(block) &&
                           (p.accumulate || bias == nullptr) && plan.contiguous(block);
    T* const out = adds_only ? static_cast<T*>(p.out) + plan.token(block, 0) * p.out_row_stride : nullptr;
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      const bool straight = adds_only && n % kLanes<T> == 0;
      T* const result = straight ? out + j : tile;
      const int64_t result_stride = straight ? p.out_row_stride : kColumns;
      const Mode mode = straight && p.accumulate ? Mode::accumulate : Mode::overwrite;
      if (has_adapter(block)) {
        out_of_middle(up, packed.wide[block.group], block.group, block.rows, middle, middle_stride, j, n,
                      result, result_stride, mode, panels);
      } else {
        if (p.accumulate) return;
        __builtin_memset(tile, 0, static_cast<size_t>(block.rows * kColumns) * sizeof(T));
      }
      if (!straight) store_tile(block, tile, j, n);
    }
  }

  // out (+)= tile, or tile + bias, for columns j .. j + n - 1.
  void store_tile(const Block& block, const T* tile, int64_t j, int64_t n) const {
    visit_storage(p.out_dtype, [&](auto storage) {
      using Storage = decltype(storage);
      constexpr int64_t N = kLanes<T>;
      for (int64_t i = 0; i < block.rows; ++i) {
        Storage* const out = static_cast<Storage*>(p.out) + plan.token(block, i) * p.out_row_stride + j;
        const T* const row = tile + i * kColumns;
        int64_t c = 0;
        for (; c + N <= n; c += N) {
          Vec<T> sum = load(row + c);
          if (bias != nullptr) sum += load(bias + j + c);
          if (p.accumulate) sum += load_as<T>(out + c);
          store_as<T>(out + c, sum);
        }
        if (c == n) continue;
        Vec<T> sum = load_first(row + c, n - c);
        if (bias != nullptr) sum += load_first(bias + j + c, n - c);
        if (p.accumulate) sum += load_first_as<T>(out + c, n - c);
        store_first_as<T>(out + c, sum, n - c);
      }
    });
  }

  Scratch scratch;
  const LowRankForward& p;
  const Plan plan;
  const Factor down, up;  // A^T (in_features, rank) and B^T (rank, out_features)
  const Packed<T> packed;
  const int64_t middle_stride;
  T* bias = nullptr;
};

// ---- backward ----

template <class T>
class Backward {
 public:
  explicit Backward(const LowRankBackward& parameters)
      : p(parameters),
        plan(make_plan(p.tokens, p.adapters, p.adapter_index, scratch)),
        up{p.param_dtype, p.b, p.out_features, p.rank, p.rank, 1},
        down{p.param_dtype, p.a, p.rank, p.in_features, p.in_features, 1},
        middle_stride(padded<T>(p.rank)),
        in_stride(padded<T>(p.in_features)),
        out_stride(padded<T>(p.out_features)) {}

  void run_all() {
    if (p.dx != nullptr || p.da != nullptr) packed = pack_factors<T>(plan, up, down, scratch);
    make_chunks();
    const int64_t work = p.tokens * p.rank * (p.in_features + p.out_features);
    run(chunk_count, 2 * work, [&](int64_t chunk) {
      for (int64_t i = chunks[chunk].begin; i < chunks[chunk].end; ++i) {
        take_block(plan.blocks[i], chunks[chunk],
                   i == chunks[chunk].begin ? Mode::overwrite : Mode::accumulate);
      }
    });
    add_partials();
  }

 private:
  // Blocks begin .. end - 1, of one group, and the sums over their tokens. Null: not wanted.
  struct Chunk {
    int64_t begin, end;
    T* da;     // (rank, in_stride)
    T* db;     // (rank, out_stride): dB^T, without the scale
    T* dbias;  // (out_stride)
  };

  void make_chunks() {
    const int64_t partial = (p.da != nullptr ? p.rank * in_stride : 0) +
                            (p.db != nullptr ? p.rank * out_stride : 0) +
                            (p.dbias != nullptr ? out_stride : 0);
    const int64_t bytes = maximum<int64_t>(1, partial * static_cast<int64_t>(sizeof(T)));
    const int64_t most = maximum<int64_t>(1, minimum(kPartials, kPartialBytes / bytes));
    const int64_t each = partial == 0 ? 1 : maximum<int64_t>(1, ceil_div(plan.count, most));
    chunks = scratch.take<Chunk>(ceil_div(plan.count, each) + plan.groups);
    group_chunk = scratch.take<int64_t>(plan.groups + 1);
    group_chunk[0] = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      const bool has_adapter = group < p.adapters;
      for (int64_t i = plan.group_block[group]; i < plan.group_block[group + 1]; i += each) {
        Chunk& chunk = chunks[chunk_count++];
        chunk = {i, minimum(i + each, plan.group_block[group + 1]), nullptr, nullptr, nullptr};
        if (p.da != nullptr && has_adapter) chunk.da = scratch.take<T>(p.rank * in_stride);
        if (p.db != nullptr && has_adapter) chunk.db = scratch.take<T>(p.rank * out_stride);
        if (p.dbias != nullptr) chunk.dbias = scratch.take<T>(out_stride);
      }
      group_chunk[group + 1] = chunk_count;
    }
  }

  void take_block(const Block& block, const Chunk& chunk, Mode mode) const {
    Scratch local;
    const bool has_adapter = block.group < p.adapters;
    const bool wants_middle = has_adapter && (p.dx != nullptr || p.da != nullptr);
    T* const middle = local.take<T>(block.rows * middle_stride);
    if (wants_middle || chunk.db != nullptr || chunk.dbias != nullptr) {
      walk_grad_out(block, chunk, mode, wants_middle ? middle : nullptr);
    }
    if (wants_middle) {
      scale_rows(block.rows, middle_stride, static_cast<T>(p.scale), middle);
      walk_x(block, chunk, mode, middle);
    } else if (p.dx != nullptr) {
      T* const zeros = local.take<T>(p.in_features);
      __builtin_memset(zeros, 0, static_cast<size_t>(p.in_features) * sizeof(T));
      for (int64_t i = 0; i < block.rows; ++i) {
        store_row(p.x_dtype, zeros, p.in_features, p.dx, plan.token(block, i) * p.in_features);
      }
    }
  }

  // middle = dy B, dB^T (+)= hidden^T dy, dbias (+)= the sum of dy.
  void walk_grad_out(const Block& block, const Chunk& chunk, Mode mode, T* middle) const {
    Scratch local;
    const T* const deep = middle != nullptr ? packed.deep[block.group] : nullptr;
    const int64_t step = middle != nullptr ? depth_step(up, deep) : kDotDepth;
    T* const columns = local.take<T>(block.rows * step);
    T* const panels = local.take<T>(panel_size<T>(block.rows, step));
    Tile<T> hidden{};
    if (chunk.db != nullptr) {
      hidden = view_columns(plan, block, dtype_of<T>(), p.hidden, p.rank, 0, p.rank,
                            local.take<T>(block.rows * p.rank));
    }
    for (int64_t j = 0; j < p.out_features; j += step) {
      const int64_t n = minimum(step, p.out_features - j);
      const Tile<T> dy =
          view_columns(plan, block, p.out_dtype, p.grad_out, p.grad_out_row_stride, j, n, columns);
      if (middle != nullptr) {
        into_middle(up, deep, block.group, block.rows, dy, j, n, middle, middle_stride);
      }
      if (chunk.db != nullptr) {
        pack_panels(dtype_of<T>(), dy.data, dy.row_stride, 1, block.rows, n, panels);
        gemm(p.rank, n, block.rows, hidden.data, 1, hidden.row_stride, panels, chunk.db + j, out_stride,
             mode);
      }
      if (chunk.dbias != nullptr) sum_rows(block.rows, n, dy, chunk.dbias + j, mode);
    }
  }

  static void sum_rows(int64_t rows, int64_t n, Tile<T> values, T* sums, Mode mode) {
    constexpr int64_t N = kLanes<T>, kChains = 4;  // as many additions under way, and short chains are exact
    for (int64_t c = 0; c < n; c += N) {
      const int64_t count = minimum(N, n - c);
      const auto part = [&](int64_t i) {
        const T* const from = values.row(i) + c;
        return count == N ? load(from) : load_first(from, count);
      };
      Vec<T> chain[kChains] = {};
      int64_t i = 0;
      for (; i + kChains <= rows; i += kChains) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < kChains; ++k) chain[k] += part(i + k);
      }
      for (; i < rows; ++i) chain[0] += part(i);
      const Vec<T> sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
      store(sums + c, mode == Mode::overwrite ? sum : load(sums + c) + sum);
    }
  }

  // dx = mask * (middle A), dA (+)= middle^T (mask * x).
  void walk_x(const Block& block, const Chunk& chunk, Mode mode, const T* middle) const {
    const int64_t rows = block.rows;
    Scratch local;
    T* const mask = p.dropout.active() ? local.take<T>(rows * kColumns) : nullptr;
    T* const tile = local.take<T>(rows * kColumns);
    T* const x_panels = local.take<T>(panel_size<T>(rows, kColumns));
    T* const a_panels = local.take<T>(panel_size<T>(p.rank, kColumns));
    for (int64_t j = 0; j < p.in_features; j += kColumns) {
      const int64_t n = minimum(kColumns, p.in_features - j);
      if (mask != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          dropout_multipliers(p.dropout, plan.token(block, i), j, n, mask + i * kColumns);
        }
      }
      if (chunk.da != nullptr) {
        const Tile<T> x = masked_input(block, j, n, mask, tile);
        pack_panels(dtype_of<T>(), x.data, x.row_stride, 1, rows, n, x_panels);
        gemm(p.rank, n, rows, middle, 1, middle_stride, x_panels, chunk.da + j, in_stride, mode);
      }
      if (p.dx != nullptr) {
        out_of_middle(down, packed.wide[block.group], block.group, rows, middle, middle_stride, j, n, tile,
                      kColumns, Mode::overwrite, a_panels);
        for (int64_t i = 0; i < rows; ++i) {
          T* const row = tile + i * kColumns;
          if (mask != nullptr) multiply_row(n, mask + i * kColumns, row);
          store_row(p.x_dtype, row, n, p.dx, plan.token(block, i) * p.in_features + j);
        }
      }
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

  // ---- the second step of the sums ----

  void add_partials() const {
    const int64_t in_tasks = p.da != nullptr ? ceil_div(p.in_features, kPackColumns) : 0;
    const int64_t out_tasks = p.db != nullptr ? ceil_div(p.out_features, kPackColumns) : 0;
    const int64_t each = in_tasks + out_tasks;
    const int64_t chunks_each = ceil_div(chunk_count, p.adapters) + 1;
    run(p.adapters * each, p.adapters * p.rank * (p.in_features + p.out_features) * chunks_each,
        [&](int64_t task) {
          const int64_t adapter = task / each, part = task % each;
          if (part < in_tasks) {
            add_da(adapter, part * kPackColumns, minimum((part + 1) * kPackColumns, p.in_features));
          } else {
            const int64_t j = (part - in_tasks) * kPackColumns;
            add_db(adapter, j, minimum(j + kPackColumns, p.out_features));
          }
        });
    if (p.dbias == nullptr) return;
    Scratch local;
    T* const sums = local.take<T>(out_stride);
    add_rows(0, chunk_count, &Chunk::dbias, 0, p.out_features, sums);
    store_row(p.bias_dtype, sums, p.out_features, p.dbias, 0);
  }

  // sums[0 .. n) = the sum over chunks begin .. end - 1 of the n partial sums from `offset` on; whole vectors.
  void add_rows(int64_t begin, int64_t end, T* Chunk::* partial, int64_t offset, int64_t n, T* sums) const {
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t chunk = begin; chunk < end; ++chunk) sum += load(chunks[chunk].*partial + offset + c);
      store(sums + c, sum);
    }
  }

  void add_da(int64_t adapter, int64_t begin, int64_t end) const {
    Scratch local;
    T* const sums = local.take<T>(padded<T>(end - begin));
    for (int64_t i = 0; i < p.rank; ++i) {
      add_rows(group_chunk[adapter], group_chunk[adapter + 1], &Chunk::da, i * in_stride + begin, end - begin,
               sums);
      store_row(p.param_dtype, sums, end - begin, p.da, (adapter * p.rank + i) * p.in_features + begin);
    }
  }

  void add_db(int64_t adapter, int64_t begin, int64_t end) const {
    Scratch local;
    T* const sums = local.take<T>(p.rank * kColumns);
    T* const rows = local.take<T>(panel_size<T>(kColumns, p.rank));
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t n = minimum(kColumns, end - j);
      for (int64_t i = 0; i < p.rank; ++i) {
        add_rows(group_chunk[adapter], group_chunk[adapter + 1], &Chunk::db, i * out_stride + j, n,
                 sums + i * kColumns);
      }
      scale_rows(p.rank, kColumns, static_cast<T>(p.scale), sums);
      // from (rank, n) to the (n, rank) of dB: packing is transposing, in panels of so many columns
      pack_panels(dtype_of<T>(), sums, 1, kColumns, n, p.rank, rows);
      for (int64_t panel = 0; panel < p.rank; panel += kPanelColumns<T>) {
        const int64_t width = minimum(kPanelColumns<T>, p.rank - panel);
        for (int64_t c = 0; c < n; ++c) {
          store_row(p.param_dtype, rows + panel * n + c * padded<T>(width), width, p.db,
                    (adapter * p.out_features + j + c) * p.rank + panel);
        }
      }
    }
  }

  Scratch scratch;
  const LowRankBackward& p;
  const Plan plan;
  const Factor up, down;  // B (out_features, rank) and A (rank, in_features)
  const int64_t middle_stride, in_stride, out_stride;
  Packed<T> packed{};
  Chunk* chunks = nullptr;
  int64_t* group_chunk = nullptr;  // (groups + 1): where a group's chunks start in `chunks`
  int64_t chunk_count = 0;
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
