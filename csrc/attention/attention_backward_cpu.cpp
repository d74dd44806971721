// Attention backward on the CPU (FlashAttention-2, Dao 2023, algorithm 2; the formulas are in
// lwft_kernels/attention/autograd.py). For each HeadGroup, for each block of keys, for each tile of rows,
// with everything in the cache:
//     S = Q K^T,  dP = dO V^T,  P = exp(S - lse),  dS = P * (Z * dP - delta),
//     dV += (P * Z)^T dO,  dK += dS^T Q,  dQ += dS K.
//
// Memory of a task: dQ of its group in float, and under 1 MiB besides (heads of up to 128). Common to all:
// what attention_backward_plan.h says.
#include "attention/attention_backward_plan.h"

namespace lwft::LWFT_ISA {
namespace {

// A tile of rows of q or grad_out, in the two forms the products read. With narrow heads of floats they are the same
// memory.
template <class E>
struct PackedRows {
  E* left;    // (rows, operand_stride(D)): a left-hand side
  E* panels;  // (rows, D): a right-hand side

  PackedRows(int64_t d, Scratch& scratch) {
    const bool same = !kIsPair<E> && d <= kPanelColumns<E>;
    left = scratch.take<E>(kScoreRows * operand_stride<E>(d));
    panels = same ? left : scratch.take<E>(panel_size<E>(units<E>(kScoreRows), d));
  }
  void pack(int64_t count, int64_t d) {
    const DType dtype = kIsPair<E> ? DType::bf16 : dtype_of<SumOf<E>>();
    if (panels != left) pack_operand(dtype, left, operand_stride<E>(d) * kUnit<E>, 1, count, d, panels);
  }
};

template <class E>
struct BackwardBuffers {
  using T = SumOf<E>;

  T* dq = nullptr;  // (rows, padded D) of the group; null when not wanted
  // Per block.
  E *keys_transposed, *values_transposed;  // K^T, V^T: (D, keys) in panels
  E* keys;                                 // K: (keys, D) in panels
  T *dk, *dv;                              // (keys, padded D)
  // Per tile.
  PackedRows<E> q, grad_out;
  T *scores, *dscores;    // (kScoreRows, kScoreStride): S, then P * Z;  dP, then dS
  T *slope, *multiplier;  // (kScoreStride), of one row: derivative of the softcap; Z
  // For pairs, P * Z and dS as they come into the products: as rows, and the transpose of either.
  E *weight_rows, *dscore_rows;  // (kScoreRows, kScoreStride)
  E* transposed;

  BackwardBuffers(int64_t d, Scratch& scratch) : q(d, scratch), grad_out(d, scratch) {
    keys_transposed = scratch.take<E>(panel_size<E>(units<E>(d), kBlockKeys));
    values_transposed = scratch.take<E>(panel_size<E>(units<E>(d), kBlockKeys));
    keys = scratch.take<E>(panel_size<E>(units<E>(kBlockKeys), d));
    dk = scratch.take<T>(kBlockKeys * padded<T>(d));
    dv = scratch.take<T>(kBlockKeys * padded<T>(d));
    scores = scratch.take<T>(kScoreRows * kScoreStride<T>);
    dscores = scratch.take<T>(kScoreRows * kScoreStride<T>);
    slope = scratch.take<T>(kScoreStride<T>);
    multiplier = scratch.take<T>(kScoreStride<T>);
    weight_rows = scratch.take<E>(kIsPair<E> ? kScoreRows * kScoreStride<E> : 0);
    dscore_rows = scratch.take<E>(kIsPair<E> ? kScoreRows * kScoreStride<E> : 0);
    transposed = scratch.take<E>(kIsPair<E> ? panel_size<E>(units<E>(kScoreRows), kBlockKeys) : 0);
  }
};

// ---- scores of a tile ----

// The rows of a tile of q, and of grad_out.
template <class E>
void load_tile(const AttentionBackward& p, const HeadGroup& group, Range tile, BackwardBuffers<E>& buffers) {
  load_queries(group, p.q, tile, buffers.q.left);
  load_operand(group, p.grad_out, tile, SumOf<E>{1}, buffers.grad_out.left);
}

// Raw scores and dP of a tile and the keys first .. end - 1 of a block; first is a multiple of kPanelColumns.
template <class E, class T = SumOf<E>>
void score_products(const BackwardPlan<T>& plan, const HeadGroup& group, const Segment& segment, Range block,
                    int64_t rows, int64_t first, int64_t end, BackwardBuffers<E>& buffers) {
  const int64_t d = plan.d, stride = operand_stride<E>(d);
  if constexpr (!kIsPair<E>) {
    if (plan.few_rows) {
      const DType dtype = plan.p.shape.dtype;
      const int64_t keys = end - first;
      dot_rows(rows, keys, d, buffers.q.left, stride, dtype, segment.key(group, block.begin + first),
               segment.k.stride[2], buffers.scores, kScoreStride<T>, Mode::overwrite);
      dot_rows(rows, keys, d, buffers.grad_out.left, stride, dtype, segment.value(group, block.begin + first),
               segment.v.stride[2], buffers.dscores, kScoreStride<T>, Mode::overwrite);
      return;
    }
  }
  const int64_t keys = minimum(round_up(end, kPanelColumns<E>), block.size()) - first;  // whole panels
  const int64_t depth = units<E>(d);
  gemm(rows, keys, depth, buffers.q.left, stride, 1, buffers.keys_transposed + first * depth, buffers.scores,
       kScoreStride<T>, Mode::overwrite);
  gemm(rows, keys, depth, buffers.grad_out.left, stride, 1, buffers.values_transposed + first * depth, buffers.dscores,
       kScoreStride<T>, Mode::overwrite);
}

// K^T and V^T of a block, for score_products.
template <class E, class T = SumOf<E>>
void pack_transposed(const BackwardPlan<T>& plan, const HeadGroup& group, const Segment& segment, Range block,
                     BackwardBuffers<E>& buffers) {
  if (plan.few_rows) return;
  const DType dtype = plan.p.shape.dtype;
  pack_operand(dtype, segment.key(group, block.begin), 1, segment.k.stride[2], plan.d, block.size(),
               buffers.keys_transposed);
  pack_operand(dtype, segment.value(group, block.begin), 1, segment.v.stride[2], plan.d, block.size(),
               buffers.values_transposed);
}

// Raw scores and dP of the keys `seen` of one row become scores and Z * dP. Returns Z, or null without
// dropout.
template <class E, class T = SumOf<E>>
const T* finish_row(const HeadGroup& group, int64_t row, const Segment& segment, Range seen,
                    const BackwardBuffers<E>& buffers, T* scores, T* dscores) {
  const Dropout& dropout = group.rule.dropout;
  const int64_t n = seen.size();
  const T scale = scores_scale<E>(group);
  if (scale != T{1}) scale_row(n, scores, scale);
  finish_scores(group, row, segment.prefix, seen.begin, n, scores, buffers.slope);
  fill(dscores, n, padded<T>(n), T{0});
  if (!dropout.active()) return nullptr;
  dropout_multipliers(dropout, group.index(row), segment.first_column + seen.begin, n, buffers.multiplier);
  fill(buffers.multiplier, n, padded<T>(n), T{0});
  for (int64_t j = 0; j < n; j += kLanes<T>) store(dscores + j, load(dscores + j) * load(buffers.multiplier + j));
  return buffers.multiplier;
}

// The softmax of a row and, with the same weights, the sum of Z * dP; block by block.
template <class T>
struct RunningDelta {
  RunningSoftmax<T> softmax;
  T products = 0;

  void add(int64_t n, T* scores, const T* dscores) {
    const T factor = softmax.add(n, scores);
    Vec<T> sums{};
    for (int64_t j = 0; j < n; j += kLanes<T>) sums = fma(load(scores + j), load(dscores + j), sums);
    products = products * factor + sum(sums);
  }
  T delta(T dlse) const { return softmax.total == 0 ? T{0} : products * softmax.inverse_total() - dlse; }
};

template <class T>
T grad_lse(const AttentionBackward& p, const HeadGroup& group, int64_t row) {
  return p.grad_lse == nullptr ? T{0} : static_cast<const T*>(p.grad_lse)[group.index(row)];
}

// ---- statistics of rows ----
//
// As a rule shift is lse, factor 1, and delta rowsum(dO * O) - dlse: nothing of size (S, L) is needed for it.
// But what it is subtracted from is a dP with other rounding errors, and a rounded `out`; and lse was rounded
// too. Mostly that does not matter beside the other errors. Where it does, the statistics are taken from all
// scores and dP of the row.

template <class E, class T = SumOf<E>>
void exact_statistics(const BackwardPlan<T>& plan, const HeadGroup& group, Range tile, BackwardBuffers<E>& buffers) {
  RunningDelta<T> rows[kScoreRows];
  load_tile(plan.p, group, tile, buffers);
  // The same blocks as for the gradients, so that S and dP are the same to the last bit.
  for (int64_t i = 0; i < plan.blocks(); ++i) {
    const Segment segment(plan.p, plan.is_prefix(i));
    const Range block = plan.block(i);
    const Range visible = intersect(segment.visible(group, tile), block);
    if (visible.empty()) continue;
    pack_transposed(plan, group, segment, block, buffers);
    score_products(plan, group, segment, block, tile.size(), 0, visible.end - block.begin, buffers);
    for (int64_t r = 0; r < tile.size(); ++r) {
      const Range seen = intersect(segment.visible(group, tile.begin + r), block);
      if (seen.empty()) continue;
      const int64_t start = r * kScoreStride<T> + seen.begin - block.begin;
      finish_row(group, tile.begin + r, segment, seen, buffers, buffers.scores + start, buffers.dscores + start);
      rows[r].add(seen.size(), buffers.scores + start, buffers.dscores + start);
    }
  }
  for (int64_t r = 0; r < tile.size(); ++r) {
    RowStatistics<T>& row = plan.statistics_of(group)[tile.begin + r];
    row.shift = rows[r].softmax.total == 0 ? kInfinity<T> : rows[r].softmax.highest;
    row.factor = rows[r].softmax.inverse_total();
    row.delta = rows[r].delta(grad_lse<T>(plan.p, group, tile.begin + r));
  }
}

template <class E, class T = SumOf<E>>
void row_statistics(const BackwardPlan<T>& plan, const HeadGroup& group, Range tile) {
  const AttentionBackward& p = plan.p;
  const int64_t d = plan.d;
  Scratch scratch;
  T* grad_out_row = scratch.take<T>(plan.d_padded);
  T* out_row = scratch.take<T>(plan.d_padded);
  bool exact = plan.exact_statistics;
  for (int64_t row = tile.begin; row < tile.end && !exact; ++row) {
    const T lse = static_cast<const T*>(p.lse)[group.index(row)];
    exact = lse > kLseTooLarge || (lse < -kLseTooLarge && lse != -kInfinity<T>);
    const bool sees_nothing = lse == -kInfinity<T>;
    load_row(p.shape.dtype, p.grad_out.data, group.offset(p.grad_out.stride, row), d, grad_out_row);
    load_row(p.shape.dtype, p.out.data, group.offset(p.out.stride, row), d, out_row);
    fill(grad_out_row, d, plan.d_padded, T{0});
    fill(out_row, d, plan.d_padded, T{0});
    Vec<T> products{};
    for (int64_t j = 0; j < d; j += kLanes<T>) products = fma(load(grad_out_row + j), load(out_row + j), products);
    plan.statistics_of(group)[row] = {sees_nothing ? kInfinity<T> : lse, T{1},  // then P = 0
                                      sees_nothing ? T{0} : sum(products) - grad_lse<T>(p, group, row)};
  }
  if (!exact) return;
  BackwardBuffers<E> buffers(d, scratch);
  exact_statistics(plan, group, tile, buffers);
}

// ---- a tile ----

// One row, P = weight(score) and Z * dP in dscores: scores become P * Z, dscores dS = P * (Z * dP - delta).
template <class T, class Weight>
void weigh(int64_t n, const Weight& weight, T delta, const T* multiplier, T* scores, T* dscores) {
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Vec<T> p = weight(load(scores + j));
    store(scores + j, multiplier == nullptr ? p : p * load(multiplier + j));
    store(dscores + j, p * (load(dscores + j) - delta));
  }
}

// Whether all that a row sees is in this block.
template <class T>
bool is_whole(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t row, const Segment& segment, Range block) {
  if (plan.all_whole) return true;
  const Range keys = group.visible(row);
  if (segment.prefix) return block.size() == segment.count && keys.empty();
  return group.shape.prefix == 0 && block.begin <= keys.begin && keys.end <= block.end;
}

template <class T>
void add_bias_gradient(const BiasSums<T>& bias, T* sums, int64_t first, int64_t n, const T* dscores) {
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  const Vec<T> last = load_first(dscores + whole, n - whole);
  if (bias.key == 0) {
    Vec<T> total = last;
    for (int64_t j = 0; j < whole; j += kLanes<T>) total += load(dscores + j);
    *sums += sum(total);
    return;
  }
  sums += first;
  for (int64_t j = 0; j < whole; j += kLanes<T>) store(sums + j, load(sums + j) + load(dscores + j));
  if (whole < n) store_first(sums + whole, load_first(sums + whole, n - whole) + last, n - whole);
}

// One row of a tile: raw scores and dP of `width` keys from `first` on become P * Z and dS, 0 where nothing
// is seen.
template <class E, class T = SumOf<E>>
void score_gradient_row(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t row, const Segment& segment,
                        int64_t chunk, Range block, int64_t first, int64_t width, const BackwardBuffers<E>& buffers,
                        T* scores, T* dscores) {
  const Range seen = intersect(segment.visible(group, row), block);
  if (seen.empty()) {
    fill(scores, 0, width, T{0});
    fill(dscores, 0, width, T{0});
    return;
  }
  const int64_t begin = seen.begin - first, n = seen.size();
  const T* multiplier = finish_row(group, row, segment, seen, buffers, scores + begin, dscores + begin);
  if (is_whole(plan, group, row, segment, block)) {
    // The exact statistics cost next to nothing here.
    RunningDelta<T> whole;
    whole.add(n, scores + begin, dscores + begin);
    const T factor = whole.softmax.inverse_total(), delta = whole.delta(grad_lse<T>(plan.p, group, row));
    weigh(n, [factor](Vec<T> e) { return e * factor; }, delta, multiplier, scores + begin, dscores + begin);
  } else {
    const RowStatistics<T> known = plan.statistics_of(group)[row];
    weigh(
        n, [known](Vec<T> score) { return exp(score - known.shift) * known.factor; }, known.delta, multiplier,
        scores + begin, dscores + begin);
  }
  if (plan.bias.data != nullptr && !segment.prefix) {
    add_bias_gradient(plan.bias, plan.bias.row(group, row, chunk), seen.begin, n, dscores + begin);
  }
  if (group.rule.softcap > 0) {
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      store(dscores + begin + j, load(dscores + begin + j) * load(buffers.slope + j));
    }
  }
  for (T* x : {scores, dscores}) {
    fill(x, 0, begin, T{0});
    fill(x, begin + n, width, T{0});
  }
}

// to (width, padded D) += scores^T B, scores (count, width) of row stride kScoreStride<E>, B (count, D) in panels.
template <class E, class T = SumOf<E>>
void add_transposed_product(int64_t width, int64_t d, int64_t count, const E* scores, const E* b,
                            BackwardBuffers<E>& buffers, T* to) {
  const int64_t d_padded = padded<T>(d);
  if constexpr (kIsPair<E>) {
    const int64_t depth = units<E>(count);
    pack_operand(DType::bf16, scores, 2 * kScoreStride<E>, 1, count, width, buffers.transposed);
    for (int64_t i = 0; i < width; i += kPanelColumns<E>) {
      const int64_t keys = minimum(kPanelColumns<E>, width - i);
      gemm(keys, d, depth, buffers.transposed + i * depth, 1, padded<E>(keys), b, to + i * d_padded, d_padded,
           Mode::accumulate);
    }
  } else {
    gemm(width, d, count, scores, 1, kScoreStride<E>, b, to, d_padded, Mode::accumulate);
  }
}

template <class E, class T = SumOf<E>>
void tile_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, const Segment& segment, int64_t chunk,
                    Range block, Range tile, bool dk_wanted, bool dv_wanted, BackwardBuffers<E>& buffers) {
  const AttentionBackward& p = plan.p;
  const int64_t d = plan.d, d_padded = plan.d_padded, count = tile.size();
  const Range seen = intersect(segment.visible(group, tile), block);
  if (seen.empty()) return;
  const int64_t first = plan.few_rows ? 0 : (seen.begin - block.begin) / kPanelColumns<E> * kPanelColumns<E>;
  const int64_t end = seen.end - block.begin, width = end - first;

  load_tile(p, group, tile, buffers);
  score_products(plan, group, segment, block, count, first, end, buffers);
  const E *weights = nullptr, *dscores = nullptr;
  for (int64_t i = 0; i < count; ++i) {
    T* const score_row = buffers.scores + i * kScoreStride<T>;
    T* const dscore_row = buffers.dscores + i * kScoreStride<T>;
    score_gradient_row(plan, group, tile.begin + i, segment, chunk, block, block.begin + first, width, buffers,
                       score_row, dscore_row);
    if constexpr (kIsPair<E>) {
      store_operand(score_row, width, buffers.weight_rows + i * kScoreStride<E>);
      store_operand(dscore_row, width, buffers.dscore_rows + i * kScoreStride<E>);
    }
  }
  if constexpr (kIsPair<E>) {
    weights = buffers.weight_rows;
    dscores = buffers.dscore_rows;
  } else {
    weights = buffers.scores;
    dscores = buffers.dscores;
  }
  if (dv_wanted) {
    buffers.grad_out.pack(count, d);
    add_transposed_product(width, d, count, weights, buffers.grad_out.panels, buffers, buffers.dv + first * d_padded);
  }
  if (dk_wanted) {
    buffers.q.pack(count, d);
    add_transposed_product(width, d, count, dscores, buffers.q.panels, buffers, buffers.dk + first * d_padded);
  }
  if (buffers.dq == nullptr) return;
  T* dq = buffers.dq + tile.begin * d_padded;
  if constexpr (!kIsPair<E>) {
    if (plan.few_rows) {
      combine_rows(count, d, width, dscores, kScoreStride<T>, p.shape.dtype, segment.key(group, block.begin),
                   segment.k.stride[2], dq, d_padded, Mode::accumulate);
      return;
    }
  }
  // One panel of K at a time, so that the keys may be a part of those packed.
  for (int64_t j = 0; j < d; j += kPanelColumns<E>) {
    const int64_t panel_width = minimum(kPanelColumns<E>, padded<E>(d - j));
    gemm(count, panel_width, units<E>(width), dscores, kScoreStride<E>, 1,
         buffers.keys + j * units<E>(block.size()) + units<E>(first) * panel_width, dq + j, d_padded, Mode::accumulate);
  }
}

// ---- a block, a group, everything ----

// Rows of dk or dv, times `scale`, to where they belong.
template <class T>
void store_key_gradient(const BackwardPlan<T>& plan, const HeadGroup& group, bool prefix, Range block, const T* from,
                        T scale, const StridedOut& keys, void* prefix_out, T* prefix_sums) {
  const AttentionShape& shape = plan.p.shape;
  const auto factor = [scale](int64_t) { return scale; };
  const auto in_prefix = [&](int64_t j) { return (group.number() * shape.prefix + j) * plan.d; };
  if (!prefix) {
    const int64_t start = group.batch * keys.stride[0] + group.kv_head * keys.stride[1];
    store_rows(shape, block, from, factor, keys.data, [&](int64_t j) { return start + j * keys.stride[2]; });
  } else if (prefix_sums == nullptr) {
    store_rows(shape, block, from, factor, prefix_out, in_prefix);
  } else {
    AttentionShape sums = shape;
    sums.dtype = dtype_of<T>();
    store_rows(sums, block, from, factor, static_cast<void*>(prefix_sums), in_prefix);
  }
}

template <class E, class T = SumOf<E>>
void block_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t index, int64_t chunk,
                     BackwardBuffers<E>& buffers) {
  const AttentionBackward& p = plan.p;
  const bool prefix = plan.is_prefix(index);
  const Segment segment(p, prefix);
  const Range block = plan.block(index);
  const bool dk_wanted = (prefix ? p.dprefix_k : p.dk.data) != nullptr;
  const bool dv_wanted = (prefix ? p.dprefix_v : p.dv.data) != nullptr;
  if (!dk_wanted && !dv_wanted && buffers.dq == nullptr && (prefix || plan.bias.data == nullptr)) return;

  pack_transposed(plan, group, segment, block, buffers);
  if (buffers.dq != nullptr && !plan.few_rows) {
    pack_operand(p.shape.dtype, segment.key(group, block.begin), segment.k.stride[2], 1, block.size(), plan.d,
                 buffers.keys);
  }
  fill(buffers.dk, 0, block.size() * plan.d_padded, T{0});
  fill(buffers.dv, 0, block.size() * plan.d_padded, T{0});
  for (int64_t t = 0; t < plan.tiles.count; ++t) {
    tile_gradients(plan, group, segment, chunk, block, plan.tiles[t], dk_wanted, dv_wanted, buffers);
  }
  if (dk_wanted) {
    store_key_gradient(plan, group, prefix, block, buffers.dk, scores_scale<E>(group), p.dk, p.dprefix_k,
                       plan.dprefix_k);
  }
  if (dv_wanted) {
    store_key_gradient(plan, group, prefix, block, buffers.dv, T{1}, p.dv, p.dprefix_v, plan.dprefix_v);
  }
}

// dQ = scale * dS K
template <class T>
void store_dq(const BackwardPlan<T>& plan, const HeadGroup& group, Range rows, const T* dq) {
  const T scale = static_cast<T>(plan.p.rule.scale);
  store_rows(
      plan.p.shape, rows, dq, [scale](int64_t) { return scale; }, plan.p.dq.data,
      [&](int64_t row) { return group.offset(plan.p.dq.stride, row); });
}

template <class E, class T = SumOf<E>>
void group_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t chunk) {
  Scratch scratch;
  BackwardBuffers<E> buffers(plan.d, scratch);
  if (plan.p.dq.data != nullptr) {
    const int64_t size = plan.rows * plan.d_padded;
    buffers.dq = plan.dq_chunks == nullptr ? scratch.take<T>(size) : plan.dq_chunk(group.number(), chunk);
    fill(buffers.dq, 0, size, T{0});
  }
  for (int64_t i = plan.chunks[chunk].begin; i < minimum(plan.chunks[chunk].end, plan.blocks()); ++i) {
    block_gradients(plan, group, i, chunk, buffers);
  }
  if (buffers.dq != nullptr && plan.dq_chunks == nullptr) store_dq(plan, group, {0, plan.rows}, buffers.dq);
}

// dQ of the chunks, added in their order.
template <class T>
void sum_dq_chunks(const BackwardPlan<T>& plan) {
  parallel_for(plan.groups * plan.tiles.count, [&](int64_t task) {
    const int64_t index = task / plan.tiles.count;
    const Range rows = plan.tiles[task % plan.tiles.count];
    T* total = plan.dq_chunk(index, 0) + rows.begin * plan.d_padded;
    for (int64_t chunk = 1; chunk < plan.chunks.count; ++chunk) {
      const T* part = plan.dq_chunk(index, chunk) + rows.begin * plan.d_padded;
      for (int64_t i = 0; i < rows.size() * plan.d_padded; ++i) total[i] += part[i];
    }
    store_dq(plan, HeadGroup(plan.p.shape, plan.p.rule, index), rows, total);
  });
}

template <class E, class T = SumOf<E>>
void backward_as(const AttentionBackward& p) {
  Scratch scratch;
  const BackwardPlan<T> plan(p, scratch);
  parallel_for(plan.all_whole ? 0 : plan.groups * plan.tiles.count, [&](int64_t task) {
    const HeadGroup group(p.shape, p.rule, task / plan.tiles.count);
    row_statistics<E>(plan, group, plan.tiles[task % plan.tiles.count]);
  });
  parallel_for(plan.owners * plan.chunks.count, [&](int64_t task) {
    for (int64_t member = 0; member < plan.members(); ++member) {
      group_gradients<E>(plan, plan.group(task / plan.chunks.count, member), task % plan.chunks.count);
    }
  });
  if (plan.dq_chunks != nullptr) sum_dq_chunks(plan);
  if (plan.dprefix_k != nullptr) sum_prefix(p, plan.dprefix_k, p.dprefix_k);
  if (plan.dprefix_v != nullptr) sum_prefix(p, plan.dprefix_v, p.dprefix_v);
  if (p.dbias != nullptr) sum_bias(plan);
}

}  // namespace

// In the table of attention_cpu.cpp.
void attention_backward(const AttentionBackward& p) {
  if (p.shape.dtype == DType::f64) return backward_as<double>(p);
  if constexpr (kMultipliesBFloat16) {
    const bool many = HeadGroup::rows(p.shape) > kFewRows;
    if (p.shape.dtype == DType::bf16 && many) return backward_as<BFloat16Pair>(p);
  }
  backward_as<float>(p);
}

}  // namespace lwft::LWFT_ISA
