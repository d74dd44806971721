// Attention backward on the CPU (FlashAttention-2, Dao 2023, algorithm 2; the formulas are in
// lwft_kernels/attention/autograd.py). For each HeadGroup, for each block of keys, for each tile of rows,
// with everything in the cache:
//     S = Q K^T,  dP = dO V^T,  P = exp(S - lse),  dS = P * (Z * dP - delta),
//     dV += (P * Z)^T dO,  dK += dS^T Q,  dQ += dS K.
// In parts (tile_parts.h) dV^T and dK^T are summed instead: splitting a transposed left-hand side is dear, and then it is
// the narrow dO and Q, not the scores.
//
// Memory of a task: dQ of its group in float, and under 1.5 MiB besides (heads of up to 128). Common to all:
// what attention_backward_plan.h says.
#include "attention/attention_backward_plan.h"
#include "common/cpu/transpose.h"

namespace lwft::LWFT_ISA {
namespace {

// Whether dK and dV of a block are summed as (padded D, kBlockKeys), and not as (keys, padded D).
template <class E>
constexpr bool kSumsTransposed = std::is_same_v<E, FloatParts>;

// A tile of rows of q or grad_out, in the forms the products read.
template <class E>
struct PackedRows {
  using L = LeftOf<E>;

  L* left;    // (rows, operand_stride(D)): a left-hand side
  E* panels;  // (rows, D): a right-hand side; with narrow heads of floats the same memory. Null where nothing reads it.

  PackedRows(int64_t d, Scratch& scratch) : left(scratch.take<L>(kScoreRows<E> * operand_stride<E>(d))) {
    if constexpr (kSumsTransposed<E>) {
      panels = nullptr;
    } else {
      const bool same = !kIsPair<E> && d <= kPanelColumns<E>;
      panels = same ? left : scratch.take<E>(panel_size<E>(units<E>(kScoreRows<E>), d));
    }
  }
  const E* pack(int64_t count, int64_t d) {
    const DType dtype = kIsPair<E> ? DType::bf16 : dtype_of<SumOf<E>>();
    if (panels != left) pack_operand(dtype, left, operand_stride<E>(d) * kUnit<E>, 1, count, d, panels);
    return panels;
  }
};

template <class E>
struct BackwardBuffers {
  using T = SumOf<E>;

  T* dq = nullptr;  // (rows, padded D) of the group; null when not wanted
  // Per block.
  E *keys_transposed, *values_transposed;  // K^T, V^T: (D, keys) in panels
  E* keys;                                 // K: (keys, D) in panels
  T *dk, *dv;                              // (keys, padded D), or transposed: kSumsTransposed
  bool started;                            // whether they hold anything yet
  // Per tile.
  PackedRows<E> q, grad_out;
  T *scores, *dscores;    // (kScoreRows, kScoreStride): S;  dP, then Z * dP
  T *slope, *multiplier;  // (kGroupRows, kScoreStride): derivative of the softcap; Z
  // P * Z and dS as they come into the products: of floats in place of S and dP. Packed: the transpose of either, as columns
  // of pairs; in parts either as a right-hand side.
  LeftOf<E>*weights, *dweights;  // (kScoreRows, kScoreStride)
  E* packed;

  BackwardBuffers(int64_t d, Scratch& scratch) : q(d, scratch), grad_out(d, scratch) {
    keys_transposed = scratch.take<E>(panel_size<E>(units<E>(d), kBlockKeys));
    values_transposed = scratch.take<E>(panel_size<E>(units<E>(d), kBlockKeys));
    keys = scratch.take<E>(panel_size<E>(units<E>(kBlockKeys), d));
    dk = scratch.take<T>(kBlockKeys * padded<T>(d));
    dv = scratch.take<T>(kBlockKeys * padded<T>(d));
    scores = scratch.take<T>(kScoreRows<E> * kScoreStride<T>);
    dscores = scratch.take<T>(kScoreRows<E> * kScoreStride<T>);
    slope = scratch.take<T>(kGroupRows<T> * kScoreStride<T>);
    multiplier = scratch.take<T>(kGroupRows<T> * kScoreStride<T>);
    if constexpr (kIsPair<E>) {
      weights = scratch.take<E>(kScoreRows<E> * kScoreStride<E>);
      dweights = scratch.take<E>(kScoreRows<E> * kScoreStride<E>);
      packed = scratch.take<E>(panel_size<E>(units<E>(kScoreRows<E>), kBlockKeys));
    } else {
      weights = scores;
      dweights = dscores;
      packed = kSumsTransposed<E> ? scratch.take<E>(panel_size<E>(kScoreRows<E>, kBlockKeys)) : nullptr;
    }
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
  const int64_t depth = units<E>(d), skipped = first * panel_depth<E>(depth);
  gemm(rows, keys, depth, buffers.q.left, stride, 1, buffers.keys_transposed + skipped, buffers.scores, kScoreStride<T>,
       Mode::overwrite);
  gemm(rows, keys, depth, buffers.grad_out.left, stride, 1, buffers.values_transposed + skipped, buffers.dscores,
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

// ---- groups of rows (attention_softmax.h) ----

// Rows of a tile from `start` on, in the buffers and in the group of heads; column `first` of their scores is a key.
template <class T>
struct RowGroup {
  Range rows;
  int64_t start, first;
  Range seen[kGroupRows<T>];      // keys
  Vec<T> largest[kGroupRows<T>];  // scores, lane by lane, before `scale`
  T scale;                        // what is still to be done to the scores

  int64_t begin(int64_t i) const { return seen[i].begin - first; }
};

// body(rows) for all groups of rows of a tile.
template <class T, class Body>
void for_row_groups(Range tile, int64_t first, const Body& body) {
  RowGroup<T> rows;
  rows.first = first;
  for (rows.start = 0; rows.start < tile.size(); rows.start += kGroupRows<T>) {
    const int64_t begin = tile.begin + rows.start;
    rows.rows = {begin, minimum(begin + kGroupRows<T>, tile.end)};
    body(rows);
  }
}

// Products q.k and dP of the keys that the rows see become scores, but for rows.scale, and Z * dP.
template <class E, class T = SumOf<E>>
void prepare(const HeadGroup& group, const Segment& segment, Range block, RowGroup<T>& rows,
             const BackwardBuffers<E>& buffers) {
  const Dropout& dropout = group.rule.dropout;
  rows.scale = scores_scale<E>(group);
  const T scale = rows.scale;
  for (int64_t i = 0; i < kGroupRows<T>; ++i) rows.largest[i] = broadcast(-kInfinity<T>);
  for (int64_t i = 0; i < rows.rows.size(); ++i) {
    const int64_t row = rows.rows.begin + i;
    rows.seen[i] = intersect(segment.visible(group, row), block);
    const int64_t n = rows.seen[i].size();
    if (n <= 0) continue;
    const int64_t at = (rows.start + i) * kScoreStride<T> + rows.begin(i);
    T *const scores = buffers.scores + at, *const dscores = buffers.dscores + at;
    rows.scale = finish_scores(group, row, segment.prefix, rows.seen[i].begin, n, scale, scores,
                               buffers.slope + i * kScoreStride<T>);
    rows.largest[i] = largest_lanes(n, scores);
    fill(dscores, n, padded<T>(n), T{0});
    if (!dropout.active()) continue;
    T* const multiplier = buffers.multiplier + i * kScoreStride<T>;
    dropout_multipliers(dropout, group.index(row), segment.first_column + rows.seen[i].begin, n, multiplier);
    fill(multiplier, n, padded<T>(n), T{0});
    for (int64_t j = 0; j < n; j += kLanes<T>) store(dscores + j, load(dscores + j) * load(multiplier + j));
  }
}

// The softmax of some rows and, with the same weights, the sum of Z * dP; block by block.
template <class T>
struct RunningDelta {
  SoftmaxRows<T> softmax;
  T* products;

  RunningDelta(int64_t rows, Scratch& scratch)
      : softmax(rows, scratch), products(scratch.take<T>(rows + kGroupRows<T>)) {
    fill(products, 0, rows + kGroupRows<T>, T{0});
  }
  RunningDelta(SoftmaxRows<T> softmax_in, T* products_in) : softmax(softmax_in), products(products_in) {}

  RunningDelta from(int64_t row) const { return {softmax.from(row), products + row}; }

  // Scores of a block become exp(score - highest), for those of the rows for which wanted(i).
  template <class E, class Wanted>
  void add(const RowGroup<T>& rows, const BackwardBuffers<E>& buffers, const Wanted& wanted) const {
    T shift[kGroupRows<T>];
    const Vec<T> factor = softmax.raise(largest_of_each<T>(rows.largest) * rows.scale, shift);
    Vec<T> sums[kGroupRows<T>] = {}, of_products[kGroupRows<T>] = {};
    for (int64_t i = 0; i < rows.rows.size(); ++i) {
      if (rows.seen[i].empty() || !wanted(i)) continue;
      const int64_t at = (rows.start + i) * kScoreStride<T> + rows.begin(i);
      T *const scores = buffers.scores + at, *const dscores = buffers.dscores + at;
      Vec<T> sum{}, product{};
      for (int64_t j = 0; j < rows.seen[i].size(); j += kLanes<T>) {
        const Vec<T> e = exp_difference(load(scores + j), rows.scale, shift[i]);
        store(scores + j, e);
        sum += e;
        product = fma(e, load(dscores + j), product);
      }
      sums[i] = sum;
      of_products[i] = product;
    }
    softmax.add(sum_of_each<T>(sums));
    store(products, load(products) * factor + sum_of_each<T>(of_products));
  }
  T delta(int64_t row, T dlse) const {
    return softmax.total[row] == 0 ? T{0} : products[row] * softmax.inverse_total(row) - dlse;
  }
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
  Scratch scratch;
  const RunningDelta<T> running(tile.size(), scratch);
  load_tile(plan.p, group, tile, buffers);
  // The same blocks as for the gradients, so that S and dP are the same to the last bit.
  for (int64_t i = 0; i < plan.blocks(); ++i) {
    const Segment segment(plan.p, plan.is_prefix(i));
    const Range block = plan.block(i);
    const Range visible = intersect(segment.visible(group, tile), block);
    if (visible.empty()) continue;
    pack_transposed(plan, group, segment, block, buffers);
    score_products(plan, group, segment, block, tile.size(), 0, visible.end - block.begin, buffers);
    for_row_groups<T>(tile, block.begin, [&](RowGroup<T>& rows) {
      prepare(group, segment, block, rows, buffers);
      running.from(rows.start).add(rows, buffers, [](int64_t) { return true; });
    });
  }
  for (int64_t r = 0; r < tile.size(); ++r) {
    RowStatistics<T>& row = plan.statistics_of(group)[tile.begin + r];
    row.shift = running.softmax.total[r] == 0 ? kInfinity<T> : running.softmax.highest[r];
    row.factor = running.softmax.inverse_total(r);
    row.delta = running.delta(r, grad_lse<T>(plan.p, group, tile.begin + r));
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

// One row, P = weight(score) and Z * dP in dscores: weights = P * Z, dweights = dS = P * (Z * dP - delta).
template <class T, class Weight, class Out>
void weigh(int64_t n, const Weight& weight, T delta, const T* multiplier, const T* scores, const T* dscores,
           Out* weights, Out* dweights) {
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Vec<T> p = weight(load(scores + j)), ds = p * (load(dscores + j) - delta);
    store_as<T>(weights + j, multiplier == nullptr ? p : p * load(multiplier + j));
    store_as<T>(dweights + j, ds);
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

// Products q.k and dP of a tile with `width` keys of a block, from `first` on, become P * Z and dS as left-hand sides, 0
// where nothing is seen.
template <class E, class T = SumOf<E>>
void score_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, const Segment& segment, int64_t chunk,
                     Range block, Range tile, int64_t first, int64_t width, const BackwardBuffers<E>& buffers) {
  const bool dropout = group.rule.dropout.active(), softcap = group.rule.softcap > 0;
  const bool bias = plan.bias.data != nullptr && !segment.prefix;
  for_row_groups<T>(tile, first, [&](RowGroup<T>& rows) {
    prepare(group, segment, block, rows, buffers);
    T highest[kGroupRows<T>], total[kGroupRows<T>], products[kGroupRows<T>];
    bool whole[kGroupRows<T>] = {}, any_whole = false;
    for (int64_t i = 0; i < rows.rows.size(); ++i) {
      if (rows.seen[i].empty()) continue;
      whole[i] = is_whole(plan, group, rows.rows.begin + i, segment, block);
      any_whole = any_whole || whole[i];
    }
    // The exact statistics cost next to nothing here.
    const RunningDelta<T> exact(SoftmaxRows<T>(highest, total), products);
    if (any_whole) {
      fill(highest, 0, kGroupRows<T>, -kInfinity<T>);
      fill(total, 0, kGroupRows<T>, T{0});
      fill(products, 0, kGroupRows<T>, T{0});
      exact.add(rows, buffers, [&](int64_t i) { return whole[i]; });
    }
    for (int64_t i = 0; i < rows.rows.size(); ++i) {
      const int64_t row = rows.rows.begin + i;
      Element<E>* const weights = elements(buffers.weights + (rows.start + i) * kScoreStride<E>, width);
      Element<E>* const dweights = elements(buffers.dweights + (rows.start + i) * kScoreStride<E>, width);
      if (rows.seen[i].empty()) {
        fill(weights, 0, width, Element<E>{});
        fill(dweights, 0, width, Element<E>{});
        continue;
      }
      const int64_t begin = rows.begin(i), n = rows.seen[i].size();
      T* const scores = buffers.scores + (rows.start + i) * kScoreStride<T> + begin;
      T* const dscores = buffers.dscores + (rows.start + i) * kScoreStride<T> + begin;
      const T* const multiplier = dropout ? buffers.multiplier + i * kScoreStride<T> : nullptr;
      const auto write = [&](const auto& weight, T delta) {
        if (!bias && !softcap) {
          return weigh(n, weight, delta, multiplier, scores, dscores, weights + begin, dweights + begin);
        }
        weigh(n, weight, delta, multiplier, scores, dscores, scores, dscores);
        if (bias) add_bias_gradient(plan.bias, plan.bias.row(group, row, chunk), rows.seen[i].begin, n, dscores);
        const T* const slope = buffers.slope + i * kScoreStride<T>;
        for (int64_t j = 0; j < n; j += kLanes<T>) {
          const Vec<T> ds = load(dscores + j);
          store_as<T>(weights + begin + j, load(scores + j));
          store_as<T>(dweights + begin + j, softcap ? ds * load(slope + j) : ds);
        }
      };
      if (whole[i]) {
        const T factor = exact.softmax.inverse_total(i);
        write([factor](Vec<T> e) { return e * factor; }, exact.delta(i, grad_lse<T>(plan.p, group, row)));
      } else {
        const RowStatistics<T> known = plan.statistics_of(group)[row];
        const T scale = rows.scale;
        write([known, scale](Vec<T> score) { return exp_difference(score, scale, known.shift) * known.factor; },
              known.delta);
      }
      for (Element<E>* x : {weights, dweights}) {
        fill(x, 0, begin, Element<E>{});
        fill(x, begin + n, width, Element<E>{});
      }
    }
  });
}

// The keys from `first` on of sums, dK or dV, (+)= scores^T R: scores (count, width) of row stride kScoreStride<E>, R (count, D).
template <class E, class T = SumOf<E>>
void add_transposed_product(int64_t first, int64_t width, int64_t d, int64_t count, const LeftOf<E>* scores,
                            PackedRows<E>& rows, BackwardBuffers<E>& buffers, T* sums, Mode mode) {
  const int64_t d_padded = padded<T>(d);
  if constexpr (kSumsTransposed<E>) {
    pack_operand(dtype_of<T>(), scores, kScoreStride<E>, 1, count, width, buffers.packed);
    gemm(d, width, count, rows.left, 1, operand_stride<E>(d), buffers.packed, sums + first, kBlockKeys, mode);
  } else if constexpr (kIsPair<E>) {
    const int64_t depth = units<E>(count);
    const E* const b = rows.pack(count, d);
    pack_operand(DType::bf16, scores, 2 * kScoreStride<E>, 1, count, width, buffers.packed);
    for (int64_t i = 0; i < width; i += kPanelColumns<E>) {
      const int64_t keys = minimum(kPanelColumns<E>, width - i);
      gemm(keys, d, depth, buffers.packed + i * depth, 1, padded<E>(keys), b, sums + (first + i) * d_padded, d_padded,
           mode);
    }
  } else {
    gemm(width, d, count, scores, 1, kScoreStride<E>, rows.pack(count, d), sums + first * d_padded, d_padded, mode);
  }
}

// How a product goes into dK and dV of a block: the first of all need not find zeros there if it is for all keys.
template <class E>
Mode start_key_gradients(int64_t keys, int64_t d_padded, bool all_keys, BackwardBuffers<E>& buffers) {
  if (buffers.started) return Mode::accumulate;
  buffers.started = true;
  if (all_keys) return Mode::overwrite;
  const int64_t count = (kSumsTransposed<E> ? kBlockKeys : keys) * d_padded;
  fill(buffers.dk, 0, count, SumOf<E>{0});
  fill(buffers.dv, 0, count, SumOf<E>{0});
  return Mode::accumulate;
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
  score_gradients(plan, group, segment, chunk, block, tile, block.begin + first, width, buffers);
  const Mode mode = start_key_gradients(block.size(), d_padded, width == block.size(), buffers);
  if (dv_wanted) {
    add_transposed_product(first, width, d, count, buffers.weights, buffers.grad_out, buffers, buffers.dv, mode);
  }
  if (dk_wanted) {
    add_transposed_product(first, width, d, count, buffers.dweights, buffers.q, buffers, buffers.dk, mode);
  }
  if (buffers.dq == nullptr) return;
  T* dq = buffers.dq + tile.begin * d_padded;
  if constexpr (!kIsPair<E>) {
    if (plan.few_rows) {
      combine_rows(count, d, width, buffers.dweights, kScoreStride<T>, p.shape.dtype, segment.key(group, block.begin),
                   segment.k.stride[2], dq, d_padded, Mode::accumulate);
      return;
    }
  }
  gemm_with_rows(count, d, units<E>(width), buffers.dweights, kScoreStride<E>, 1, buffers.keys, units<E>(first),
                 units<E>(block.size()), dq, d_padded, Mode::accumulate);
}

// ---- a block, a group, everything ----

// Sums of a block: (padded D, kBlockKeys) becomes (keys, padded D).
template <class T>
void turn_sums(int64_t keys, int64_t d, int64_t d_padded, T* sums) {
  Scratch scratch;
  T* const from = scratch.take<T>(d * kBlockKeys);
  __builtin_memcpy(from, sums, static_cast<size_t>(d * kBlockKeys) * sizeof(T));
  turn(from, kBlockKeys, d, keys, sums, d_padded);
}

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
  buffers.started = false;
  for (int64_t t = 0; t < plan.tiles.count; ++t) {
    tile_gradients(plan, group, segment, chunk, block, plan.tiles[t], dk_wanted, dv_wanted, buffers);
  }
  start_key_gradients(block.size(), plan.d_padded, false, buffers);  // where no row sees any
  if constexpr (kSumsTransposed<E>) {
    if (dk_wanted) turn_sums(block.size(), plan.d, plan.d_padded, buffers.dk);
    if (dv_wanted) turn_sums(block.size(), plan.d, plan.d_padded, buffers.dv);
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

// All blocks of a chunk, each for all `groups` (a function of 0 .. count - 1).
template <class E, class Groups, class T = SumOf<E>>
void chunk_gradients(const BackwardPlan<T>& plan, int64_t count, const Groups& groups, int64_t chunk) {
  Scratch scratch;
  BackwardBuffers<E> buffers(plan.d, scratch);
  const int64_t size = plan.rows * plan.d_padded;
  const bool wanted = plan.p.dq.data != nullptr, own = wanted && plan.dq_chunks == nullptr;
  T* const sums = own ? scratch.take<T>(count * size) : nullptr;
  const auto dq = [&](int64_t i) {
    return !wanted ? nullptr : own ? sums + i * size : plan.dq_chunk(groups(i).number(), chunk);
  };
  for (int64_t i = 0; wanted && i < count; ++i) fill(dq(i), 0, size, T{0});
  for (int64_t block = plan.chunks[chunk].begin; block < minimum(plan.chunks[chunk].end, plan.blocks()); ++block) {
    for (int64_t i = 0; i < count; ++i) {
      buffers.dq = dq(i);
      block_gradients(plan, groups(i), block, chunk, buffers);
    }
  }
  for (int64_t i = 0; own && i < count; ++i) store_dq(plan, groups(i), {0, plan.rows}, dq(i));
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
  const BackwardPlan<T> plan(p, {kScoreRows<E>, kTileRows<E>, kKeysOfBlock<E>}, scratch);
  parallel_for(plan.all_whole ? 0 : plan.groups * plan.tiles.count, [&](int64_t task) {
    const HeadGroup group(p.shape, p.rule, task / plan.tiles.count);
    row_statistics<E>(plan, group, plan.tiles[task % plan.tiles.count]);
  });
  const Pieces owners(plan.owners, plan.together, 1);
  parallel_for(owners.count * plan.chunks.count, [&](int64_t task) {
    const Range mine = owners[task / plan.chunks.count];
    const int64_t chunk = task % plan.chunks.count;
    for (int64_t member = 0; member < plan.members(); ++member) {
      chunk_gradients<E>(plan, mine.size(), [&](int64_t i) { return plan.group(mine.begin + i, member); }, chunk);
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
  if constexpr (kSplitsFloat) {
    if (takes_parts(p.shape)) return backward_as<FloatParts>(p);
  }
  backward_as<float>(p);
}

}  // namespace lwft::LWFT_ISA
