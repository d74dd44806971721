// Attention backward on the CPU (FlashAttention-2, Dao 2023, algorithm 2; the formulas are in lwft_kernels/attention/
// autograd.py). For each HeadGroup, for each block of keys, for each tile of rows, with everything in the cache:
//     S = Q K^T,  dP = dO V^T,  P = exp(S - lse),  dS = P * (Z * dP - delta),
//     dV += (P * Z)^T dO,  dK += dS^T Q,  dQ += dS K.
//
// Five products, and every sum has one owner and one order. dK and dV are complete when a block is done. dQ is summed in
// a float buffer of the task; where there are few heads, keys are cut into chunks with a task each, and their dQ are
// added in the order of the chunks. A bias that is broadcast over sequences or heads gets their dS summed: by one task
// that takes them in turn, where its gradient is a matrix, else from one small sum per head.
//
// Memory of a task: dQ of its group in float, and under 1 MiB besides. Common to all: the dQ of chunks (at most
// kChunkBytes), dprefix per sequence where it is shared, dbias in float where it has 16 bits.
#include "attention/attention_scores.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {
namespace {

constexpr int64_t kScoreRows = 48, kBlockKeys = 128;
constexpr int64_t kEnoughTasks = 8;
constexpr int64_t kChunkBytes = int64_t{64} << 20;
// Beyond this, lse = highest + log(total) has lost the total (a whole row biased by -3.4e38).
constexpr double kLseTooLarge = 1e5;
// Where the prefix and the keys are so few together, every one weighs much.
constexpr int64_t kFewKeys = 32;
template <class T>
constexpr int64_t kScoreStride = kBlockKeys + 2 * kLanes<T>;

// Where the sums of dS that become dbias stand: five strides into one buffer. Stride 0 = summed over.
template <class T>
struct BiasSums {
  T* data = nullptr;
  bool in_place = false;  // data is dbias itself
  int64_t batch = 0, head = 0, chunk = 0, query = 0, key = 0;

  T* row(const HeadGroup& group, int64_t index, int64_t chunk_index) const {
    return data + group.batch * batch + group.head(index) * head + chunk_index * chunk + group.query(index) * query;
  }
};

// How the work is cut, from the shape and the gradients wanted alone.
template <class T>
struct BackwardPlan {
  const AttentionBackward& p;
  int64_t d, d_padded, rows, groups;
  Pieces tiles, prefix_blocks, key_blocks;
  // A task is (owner, chunk): it takes the groups of its owner in turn, and of the blocks those of its chunk. An owner is
  // one group, or all those whose dS are summed into one matrix dbias.
  bool sum_batch = false, sum_heads = false;
  int64_t owners;
  Pieces chunks;
  // The rows' statistics from their scores and dP rather than from lse and out (two products more).
  bool exact_statistics;
  BiasSums<T> bias;
  T* dq_chunks = nullptr;  // (groups, chunks, rows, padded D) where there is more than one chunk
  T* dprefix_k = nullptr;  // (B, Hkv, P, D) where the prefix is shared
  T* dprefix_v = nullptr;

  BackwardPlan(const AttentionBackward& params, Scratch& scratch)
      : p(params),
        d(p.shape.head_dim),
        d_padded(padded<T>(d)),
        rows(HeadGroup::rows(p.shape)),
        groups(HeadGroup::count(p.shape)),
        tiles(rows, kScoreRows, kTileRows),
        prefix_blocks(p.shape.prefix, kBlockKeys, kLanes<T>),
        key_blocks(p.shape.keys, kBlockKeys, kLanes<T>),
        owners(groups),
        chunks(0, 1, 1) {
    const bool matrix = p.dbias != nullptr && p.bias_size[2] > 1 && p.bias_size[3] > 1;
    sum_batch = matrix && p.bias_size[0] == 1;
    sum_heads = matrix && p.bias_size[1] == 1;
    if (sum_batch) owners = minimum<int64_t>(owners, p.shape.kv_heads);
    if (sum_heads) owners = sum_batch ? minimum<int64_t>(owners, 1) : p.shape.batch;
    cut_chunks(scratch);
    // Few rows: the forward kernel has summed their scores in another order, and where S is large the rounding error of
    // S - lse counts. A bias that is the same for all keys: the sum of dS over them all is a difference of equals.
    exact_statistics = rows <= kFewRows || (p.dbias != nullptr && p.bias_size[3] == 1) ||
                       (p.shape.prefix > 0 && p.shape.prefix + p.shape.keys <= kFewKeys);
    if (p.dbias != nullptr) place_bias_sums(matrix, scratch);
    if (p.shape.prefix > 0 && p.prefix_batch == 1) {
      const int64_t size = groups * p.shape.prefix * d;
      if (p.dprefix_k != nullptr) dprefix_k = scratch.take<T>(size);
      if (p.dprefix_v != nullptr) dprefix_v = scratch.take<T>(size);
    }
  }

  HeadGroup group(int64_t owner, int64_t member) const {
    const int64_t kv_heads = p.shape.kv_heads;
    const int64_t batch = sum_batch ? (sum_heads ? member / kv_heads : member) : sum_heads ? owner : owner / kv_heads;
    const int64_t kv_head = sum_heads ? member % kv_heads : sum_batch ? owner : owner % kv_heads;
    return HeadGroup(p.shape, p.rule, batch * kv_heads + kv_head);
  }
  int64_t members() const { return owners == 0 ? 0 : groups / owners; }
  T* dq_chunk(int64_t group, int64_t chunk) const {
    return dq_chunks + (group * chunks.count + chunk) * rows * d_padded;
  }

 private:
  void cut_chunks(Scratch& scratch) {
    const int64_t blocks = prefix_blocks.count + key_blocks.count;
    int64_t wanted = ceil_div(kEnoughTasks, maximum<int64_t>(owners, 1));
    const int64_t dq_size = groups * rows * d_padded;
    if (p.dq.data != nullptr && dq_size > 0) {
      wanted = minimum(wanted, kChunkBytes / (dq_size * static_cast<int64_t>(sizeof(T))));
    }
    chunks = Pieces(maximum<int64_t>(blocks, 1), ceil_div(maximum<int64_t>(blocks, 1), maximum<int64_t>(wanted, 1)), 1);
    if (p.dq.data != nullptr && chunks.count > 1) dq_chunks = scratch.take<T>(dq_size * chunks.count);
  }

  void place_bias_sums(bool matrix, Scratch& scratch) {
    const int64_t* size = p.bias_size;
    const int64_t row = size[2] * size[3];
    // A matrix is summed where it will stand; a row, a column or a number of each head and chunk on its own.
    const int64_t batches = matrix ? size[0] : p.shape.batch, heads = matrix ? size[1] : p.shape.heads;
    const int64_t copies = size[3] > 1 ? 1 : chunks.count;  // columns of a row belong to one chunk each
    bias.batch = batches == 1 ? 0 : heads * copies * row;
    bias.head = heads == 1 ? 0 : copies * row;
    bias.chunk = copies == 1 ? 0 : row;
    bias.query = size[2] == 1 ? 0 : size[3];
    bias.key = size[3] == 1 ? 0 : 1;
    const int64_t count = batches * heads * copies * row;
    bias.in_place = matrix && p.rule.bias_dtype == dtype_of<T>();
    bias.data = bias.in_place ? static_cast<T*>(p.dbias) : scratch.take<T>(count);
    // Keys that no row of a tile sees are never visited.
    constexpr int64_t kFill = 1 << 16;
    parallel_for(ceil_div(count, kFill), [&](int64_t i) {
      fill(bias.data, i * kFill, minimum((i + 1) * kFill, count), T{0});
    });
  }
};

// A tile of rows of q or grad_out, in the two forms the products read. With narrow heads they are the same memory.
template <class T>
struct PackedRows {
  T* row_major;  // (rows, padded D)
  T* panels;     // (rows, D)

  PackedRows(int64_t d, Scratch& scratch) {
    row_major = scratch.take<T>(kScoreRows * padded<T>(d));
    panels = d <= kPanelColumns<T> ? row_major : scratch.take<T>(panel_size<T>(kScoreRows, d));
  }
  void pack(int64_t count, int64_t d) {
    if (panels != row_major) pack_panels(dtype_of<T>(), row_major, padded<T>(d), 1, count, d, panels);
  }
};

template <class T>
struct BackwardBuffers {
  // Per row of the group: P = exp(S - shift) * factor, dS = P * (Z * dP - delta).
  T *shift, *factor, *delta;
  T* dq;  // (rows, padded D); null when not wanted
  // Per block.
  T *keys_transposed, *values_transposed;  // K^T, V^T: (D, keys) in panels
  T* keys;                                 // K: (keys, D) in panels
  T *dk, *dv;                              // (keys, padded D)
  // Per tile.
  PackedRows<T> q, grad_out;
  T *scores, *dscores;   // (kScoreRows, kScoreStride): S, then P * Z;  dP, then dS
  T *slope, *multiplier;  // (kScoreStride), of one row: derivative of the softcap; Z

  BackwardBuffers(int64_t rows, int64_t d, Scratch& scratch) : q(d, scratch), grad_out(d, scratch) {
    shift = scratch.take<T>(rows);
    factor = scratch.take<T>(rows);
    delta = scratch.take<T>(rows);
    keys_transposed = scratch.take<T>(panel_size<T>(d, kBlockKeys));
    values_transposed = scratch.take<T>(panel_size<T>(d, kBlockKeys));
    keys = scratch.take<T>(panel_size<T>(kBlockKeys, d));
    dk = scratch.take<T>(kBlockKeys * padded<T>(d));
    dv = scratch.take<T>(kBlockKeys * padded<T>(d));
    scores = scratch.take<T>(kScoreRows * kScoreStride<T>);
    dscores = scratch.take<T>(kScoreRows * kScoreStride<T>);
    slope = scratch.take<T>(kScoreStride<T>);
    multiplier = scratch.take<T>(kScoreStride<T>);
  }
};

// ---- scores of a tile ----

// scale * q of the rows of a tile, and their grad_out.
template <class T>
void load_tile(const AttentionBackward& p, const HeadGroup& group, Range tile, BackwardBuffers<T>& buffers) {
  const int64_t d = p.shape.head_dim, d_padded = padded<T>(d);
  load_queries(group, p.q, tile, buffers.q.row_major);
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    T* to = buffers.grad_out.row_major + (row - tile.begin) * d_padded;
    load_row(p.shape.dtype, p.grad_out.data, group.offset(p.grad_out.stride, row), d, to);
    fill(to, d, d_padded, T{0});
  }
}

// Raw scores and dP of a tile and `keys` keys, from the packed key `first` on.
template <class T>
void score_products(int64_t rows, int64_t keys, int64_t d, int64_t first, BackwardBuffers<T>& buffers) {
  gemm(rows, keys, d, buffers.q.row_major, padded<T>(d), 1, buffers.keys_transposed + first * d, buffers.scores,
       kScoreStride<T>, Mode::overwrite);
  gemm(rows, keys, d, buffers.grad_out.row_major, padded<T>(d), 1, buffers.values_transposed + first * d,
       buffers.dscores, kScoreStride<T>, Mode::overwrite);
}

// Raw scores and dP of the keys `seen` of one row become scores and Z * dP. Returns Z, or null without dropout.
template <class T>
const T* finish_row(const HeadGroup& group, int64_t row, const Segment& segment, Range seen,
                    const BackwardBuffers<T>& buffers, T* scores, T* dscores) {
  const Dropout& dropout = group.rule.dropout;
  const int64_t n = seen.size();
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
//     P = exp(S - shift) * factor,   delta = sum over the keys of P * Z * dP - dlse.
//
// As a rule shift is lse, factor 1, and delta rowsum(dO * O) - dlse: nothing of size (S, L) is needed for it. But what
// it is subtracted from is a dP with other rounding errors, and a rounded `out`; and lse was rounded too. Mostly that
// does not matter beside the other errors. Where it does, the statistics are taken from all scores and dP of the row.

template <class T>
void exact_statistics(const AttentionBackward& p, const HeadGroup& group, Range tile, BackwardBuffers<T>& buffers) {
  const int64_t d = p.shape.head_dim;
  RunningDelta<T> rows[kScoreRows];
  load_tile(p, group, tile, buffers);
  for (const bool prefix : {true, false}) {
    const Segment segment(p, prefix);
    const Range visible = segment.visible(group, tile);
    for (int64_t j = visible.begin; j < visible.end; j += kBlockKeys) {
      const Range block{j, minimum(j + kBlockKeys, visible.end)};
      pack_panels(p.shape.dtype, segment.key(group, j), 1, segment.k.stride[2], d, block.size(),
                  buffers.keys_transposed);
      pack_panels(p.shape.dtype, segment.value(group, j), 1, segment.v.stride[2], d, block.size(),
                  buffers.values_transposed);
      score_products(tile.size(), block.size(), d, 0, buffers);
      for (int64_t i = 0; i < tile.size(); ++i) {
        const Range seen = intersect(segment.visible(group, tile.begin + i), block);
        if (seen.empty()) continue;
        T* scores = buffers.scores + i * kScoreStride<T> + (seen.begin - j);
        T* dscores = buffers.dscores + i * kScoreStride<T> + (seen.begin - j);
        finish_row(group, tile.begin + i, segment, seen, buffers, scores, dscores);
        rows[i].add(seen.size(), scores, dscores);
      }
    }
  }
  for (int64_t i = 0; i < tile.size(); ++i) {
    const int64_t row = tile.begin + i;
    buffers.shift[row] = rows[i].softmax.total == 0 ? kInfinity<T> : rows[i].softmax.highest;
    buffers.factor[row] = rows[i].softmax.inverse_total();
    buffers.delta[row] = rows[i].delta(grad_lse<T>(p, group, row));
  }
}

template <class T>
void row_statistics(const BackwardPlan<T>& plan, const HeadGroup& group, Range tile, BackwardBuffers<T>& buffers) {
  const AttentionBackward& p = plan.p;
  const int64_t d = plan.d;
  T* grad_out_row = buffers.grad_out.row_major;
  T* out_row = buffers.q.row_major;
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
    buffers.shift[row] = sees_nothing ? kInfinity<T> : lse;  // P = 0
    buffers.factor[row] = 1;
    buffers.delta[row] = sees_nothing ? T{0} : sum(products) - grad_lse<T>(p, group, row);
  }
  if (exact) exact_statistics(p, group, tile, buffers);
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
inline bool is_whole(const HeadGroup& group, int64_t row, const Segment& segment, Range block) {
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

// One row of a tile: raw scores and dP of `width` keys from `first` on become P * Z and dS, 0 where nothing is seen.
template <class T>
void score_gradient_row(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t row, const Segment& segment,
                        int64_t chunk, Range block, int64_t first, int64_t width, const BackwardBuffers<T>& buffers,
                        T* scores, T* dscores) {
  const Range seen = intersect(segment.visible(group, row), block);
  if (seen.empty()) {
    fill(scores, 0, width, T{0});
    fill(dscores, 0, width, T{0});
    return;
  }
  const int64_t begin = seen.begin - first, n = seen.size();
  const T* multiplier = finish_row(group, row, segment, seen, buffers, scores + begin, dscores + begin);
  if (is_whole(group, row, segment, block)) {
    // The exact statistics cost next to nothing here.
    RunningDelta<T> whole;
    whole.add(n, scores + begin, dscores + begin);
    const T factor = whole.softmax.inverse_total(), delta = whole.delta(grad_lse<T>(plan.p, group, row));
    weigh(n, [factor](Vec<T> e) { return e * factor; }, delta, multiplier, scores + begin, dscores + begin);
  } else {
    const T shift = buffers.shift[row], factor = buffers.factor[row];
    weigh(n, [=](Vec<T> score) { return exp(score - shift) * factor; }, buffers.delta[row], multiplier,
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

template <class T>
void tile_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, const Segment& segment, int64_t chunk,
                    Range block, Range tile, bool dk_wanted, bool dv_wanted, BackwardBuffers<T>& buffers) {
  const AttentionBackward& p = plan.p;
  const int64_t d = plan.d, d_padded = plan.d_padded, count = tile.size();
  const Range seen = intersect(segment.visible(group, tile), block);
  if (seen.empty()) return;
  const int64_t first = (seen.begin - block.begin) / kPanelColumns<T> * kPanelColumns<T>;
  const int64_t end = seen.end - block.begin, width = end - first;
  const int64_t columns = minimum(round_up(end, kPanelColumns<T>), block.size()) - first;

  load_tile(p, group, tile, buffers);
  score_products(count, columns, d, first, buffers);
  for (int64_t i = 0; i < count; ++i) {
    score_gradient_row(plan, group, tile.begin + i, segment, chunk, block, block.begin + first, width, buffers,
                       buffers.scores + i * kScoreStride<T>, buffers.dscores + i * kScoreStride<T>);
  }
  if (dv_wanted) {
    buffers.grad_out.pack(count, d);
    gemm(width, d, count, buffers.scores, 1, kScoreStride<T>, buffers.grad_out.panels, buffers.dv + first * d_padded,
         d_padded, Mode::accumulate);
  }
  if (dk_wanted) {
    buffers.q.pack(count, d);
    gemm(width, d, count, buffers.dscores, 1, kScoreStride<T>, buffers.q.panels, buffers.dk + first * d_padded,
         d_padded, Mode::accumulate);
  }
  if (buffers.dq != nullptr) {
    // One panel of K at a time, so that the keys may be a part of those packed.
    for (int64_t j = 0; j < d; j += kPanelColumns<T>) {
      const int64_t panel_width = minimum(kPanelColumns<T>, padded<T>(d - j));
      gemm(count, panel_width, width, buffers.dscores, kScoreStride<T>, 1,
           buffers.keys + j * block.size() + first * panel_width, buffers.dq + tile.begin * d_padded + j, d_padded,
           Mode::accumulate);
    }
  }
}

// ---- a block, a group, everything ----

// Rows of dk or dv to where they belong.
template <class T>
void store_key_gradient(const BackwardPlan<T>& plan, const HeadGroup& group, bool prefix, Range block, const T* from,
                        const StridedOut& keys, void* prefix_out, T* prefix_sums) {
  const AttentionShape& shape = plan.p.shape;
  const int64_t prefix_start = (group.batch * shape.kv_heads + group.kv_head) * shape.prefix;
  for (int64_t j = block.begin; j < block.end; ++j, from += plan.d_padded) {
    if (!prefix) {
      const int64_t offset = group.batch * keys.stride[0] + group.kv_head * keys.stride[1] + j * keys.stride[2];
      store_row(shape.dtype, from, plan.d, keys.data, offset);
    } else if (prefix_sums != nullptr) {
      store_row(dtype_of<T>(), from, plan.d, prefix_sums, (prefix_start + j) * plan.d);
    } else {
      store_row(shape.dtype, from, plan.d, prefix_out, (prefix_start + j) * plan.d);
    }
  }
}

template <class T>
void block_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t index, int64_t chunk,
                     BackwardBuffers<T>& buffers) {
  const AttentionBackward& p = plan.p;
  const bool prefix = index < plan.prefix_blocks.count;
  const Segment segment(p, prefix);
  const Range block = prefix ? plan.prefix_blocks[index] : plan.key_blocks[index - plan.prefix_blocks.count];
  const bool dk_wanted = (prefix ? p.dprefix_k : p.dk.data) != nullptr;
  const bool dv_wanted = (prefix ? p.dprefix_v : p.dv.data) != nullptr;
  if (!dk_wanted && !dv_wanted && buffers.dq == nullptr && (prefix || plan.bias.data == nullptr)) return;

  pack_panels(p.shape.dtype, segment.key(group, block.begin), 1, segment.k.stride[2], plan.d, block.size(),
              buffers.keys_transposed);
  pack_panels(p.shape.dtype, segment.value(group, block.begin), 1, segment.v.stride[2], plan.d, block.size(),
              buffers.values_transposed);
  if (buffers.dq != nullptr) {
    pack_panels(p.shape.dtype, segment.key(group, block.begin), segment.k.stride[2], 1, block.size(), plan.d,
                buffers.keys);
  }
  fill(buffers.dk, 0, block.size() * plan.d_padded, T{0});
  fill(buffers.dv, 0, block.size() * plan.d_padded, T{0});
  for (int64_t t = 0; t < plan.tiles.count; ++t) {
    tile_gradients(plan, group, segment, chunk, block, plan.tiles[t], dk_wanted, dv_wanted, buffers);
  }
  if (dk_wanted) {
    store_key_gradient(plan, group, prefix, block, buffers.dk, p.dk, p.dprefix_k, plan.dprefix_k);
  }
  if (dv_wanted) {
    store_key_gradient(plan, group, prefix, block, buffers.dv, p.dv, p.dprefix_v, plan.dprefix_v);
  }
}

// dQ = scale * dS K
template <class T>
void store_dq(const BackwardPlan<T>& plan, const HeadGroup& group, Range rows, T* dq) {
  for (int64_t row = rows.begin; row < rows.end; ++row, dq += plan.d_padded) {
    scale_row(plan.d, dq, static_cast<T>(plan.p.rule.scale));
    store_row(plan.p.shape.dtype, dq, plan.d, plan.p.dq.data, group.offset(plan.p.dq.stride, row));
  }
}

template <class T>
void group_gradients(const BackwardPlan<T>& plan, const HeadGroup& group, int64_t chunk) {
  Scratch scratch;
  BackwardBuffers<T> buffers(plan.rows, plan.d, scratch);
  buffers.dq = nullptr;
  if (plan.p.dq.data != nullptr) {
    const int64_t size = plan.rows * plan.d_padded;
    buffers.dq = plan.dq_chunks == nullptr
                     ? scratch.take<T>(size)
                     : plan.dq_chunk(group.batch * plan.p.shape.kv_heads + group.kv_head, chunk);
    fill(buffers.dq, 0, size, T{0});
  }
  for (int64_t t = 0; t < plan.tiles.count; ++t) row_statistics(plan, group, plan.tiles[t], buffers);
  for (int64_t i = plan.chunks[chunk].begin; i < plan.chunks[chunk].end; ++i) {
    if (i < plan.prefix_blocks.count + plan.key_blocks.count) block_gradients(plan, group, i, chunk, buffers);
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

// The gradient of a prefix that all sequences share: the sum over them, in order.
template <class T>
void sum_prefix(const AttentionBackward& p, const T* sums, void* to) {
  const int64_t row = p.shape.prefix * p.shape.head_dim;
  parallel_for(p.shape.kv_heads, [&](int64_t kv_head) {
    Scratch scratch;
    T* total = scratch.take<T>(row);
    fill(total, 0, row, T{0});
    for (int64_t batch = 0; batch < p.shape.batch; ++batch) {
      const T* part = sums + (batch * p.shape.kv_heads + kv_head) * row;
      for (int64_t i = 0; i < row; ++i) total[i] += part[i];
    }
    store_row(p.shape.dtype, total, row, to, kv_head * row);
  });
}

// dbias (bias_size) from its sums: over the sequences and heads it is broadcast over, and over the chunks.
template <class T>
void sum_bias(const BackwardPlan<T>& plan) {
  const AttentionBackward& p = plan.p;
  const BiasSums<T>& bias = plan.bias;
  if (bias.in_place) return;
  const int64_t row = p.bias_size[2] * p.bias_size[3], heads = p.bias_size[1];
  const int64_t batch_members = bias.batch != 0 && p.bias_size[0] == 1 ? p.shape.batch : p.shape.batch == 0 ? 0 : 1;
  const int64_t head_members = bias.head != 0 && heads == 1 ? p.shape.heads : p.shape.heads == 0 ? 0 : 1;
  const int64_t chunks = bias.chunk != 0 ? plan.chunks.count : 1;
  parallel_for(p.bias_size[0] * heads, [&](int64_t task) {
    const int64_t batch = task / heads, head = task % heads;
    Scratch scratch;
    T* total = scratch.take<T>(row);
    fill(total, 0, row, T{0});
    for (int64_t b = batch; b < batch + batch_members; ++b) {
      for (int64_t h = head; h < head + head_members; ++h) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T* part = bias.data + b * bias.batch + h * bias.head + chunk * bias.chunk;
          for (int64_t i = 0; i < row; ++i) total[i] += part[i];
        }
      }
    }
    store_row(p.rule.bias_dtype, total, row, p.dbias, task * row);
  });
}

template <class T>
void backward_as(const AttentionBackward& p) {
  Scratch scratch;
  const BackwardPlan<T> plan(p, scratch);
  parallel_for(plan.owners * plan.chunks.count, [&](int64_t task) {
    for (int64_t member = 0; member < plan.members(); ++member) {
      group_gradients(plan, plan.group(task / plan.chunks.count, member), task % plan.chunks.count);
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
  if (p.shape.dtype == DType::f64) {
    backward_as<double>(p);
  } else {
    backward_as<float>(p);
  }
}

}  // namespace lwft::LWFT_ISA
