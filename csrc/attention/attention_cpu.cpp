// Attention forward on the CPU.
//
// A task owns some rows of a HeadGroup (attention_scores.h) and walks once over the keys they see, a block at
// a time: it packs the block's keys and values into panels, then for each tile of rows
//     scores = Q K^T,   running softmax of each row,   out = factor * out + P V,
// with the tile in the cache all the while. Prefix first, then keys; blocks that no row sees are not even
// packed. Few rows (decoding) go another way: see forward_few.
//
// Memory of a task: q and out of its rows (at most kTaskElements each), two panels of at most kPanelBytes and
// a tile of scores: under 1 MiB for any length. Tasks depend on the shape alone, so results do not depend on
// the threads.
#include "attention/attention_scores.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {
namespace {

// The tile of scores. Its rows: a multiple of kTileRows. Its keys: the more, the less often `out` is read and
// written; but it has to stay in the nearer caches, as have the panels.
constexpr int64_t kScoreRows = 48, kBlockKeys = 256;
constexpr int64_t kPanelBytes = 128 << 10;
// Rows of a task: the more, the less packing weighs; but q and out have to stay in the second cache.
constexpr int64_t kTaskRows = 480, kTaskElements = 32 << 10;
// Where there are few heads, tasks become smaller, down to kFewestTaskRows, until there are so many.
constexpr int64_t kEnoughTasks = 8, kFewestTaskRows = 96;
// Keys of a task where there are few rows.
constexpr int64_t kFewRowsKeys = 512;

Pieces task_rows(const AttentionShape& shape) {
  const int64_t rows = HeadGroup::rows(shape), groups = maximum<int64_t>(HeadGroup::count(shape), 1);
  const int64_t largest = minimum(kTaskRows, maximum(kScoreRows, kTaskElements / shape.head_dim));
  const int64_t wanted = ceil_div(rows, ceil_div(kEnoughTasks, groups));
  return Pieces(rows, minimum(largest, maximum(wanted, kFewestTaskRows)), kTileRows);
}

// Keys of a block, for panels of at most kPanelBytes (with very large heads: of 64 keys).
template <class E>
int64_t block_keys(int64_t head_dim) {
  const int64_t fitting = kPanelBytes / (units<E>(head_dim) * static_cast<int64_t>(sizeof(E)));
  return maximum<int64_t>(64, minimum(kBlockKeys, fitting / 64 * 64));
}

// out and lse of some rows from their sums of exp(score - highest) * v.
template <class T>
void store_results(const AttentionForward& p, const HeadGroup& group, Range rows, const RunningSoftmax<T>* softmax,
                   const T* sums) {
  const auto state = [&](int64_t row) -> const RunningSoftmax<T>& { return softmax[row - rows.begin]; };
  store_rows(
      p.shape, rows, sums, [&](int64_t row) { return state(row).inverse_total(); }, p.out.data,
      [&](int64_t row) { return group.offset(p.out.stride, row); });
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    static_cast<T*>(p.lse)[group.index(row)] = state(row).log_sum_exp();
  }
}

// One row of a tile: scores of the keys `seen`, but for `scale`, are finished, exponentiated and dropped out; 0 for the
// other keys from `first` on, `width` in all. Returns the factor of what the row has summed so far.
template <class T>
T softmax_row(const HeadGroup& group, int64_t row, const Segment& segment, Range seen, int64_t first, int64_t width,
              T scale, RunningSoftmax<T>& softmax, T* x) {
  const int64_t begin = seen.begin - first, n = seen.size();
  T factor{1};
  if (seen.empty()) {
    fill(x, 0, width, T{0});
    return factor;
  }
  if (scale != T{1}) scale_row(n, x + begin, scale);
  finish_scores(group, row, segment.prefix, seen.begin, n, x + begin);
  factor = softmax.add(n, x + begin);
  if (group.rule.dropout.active()) {
    dropout_row(group.rule.dropout, group.index(row), segment.first_column + seen.begin, n, x + begin);
  }
  fill(x, 0, begin, T{0});
  fill(x, begin + n, width, T{0});
  return factor;
}

template <class E>
struct ForwardBuffers {
  using T = SumOf<E>;

  E* q;                        // (rows, operand_stride(D))
  T* out;                      // (rows, padded D)
  RunningSoftmax<T>* softmax;  // (rows)
  bool* started;               // per tile: whether `out` holds anything yet
  E* key_panels;               // K^T of the block: (D, keys) in panels
  E* value_panels;             // V of the block: (keys, D) in panels
  T* scores;                   // (kScoreRows, kScoreStride)
  E* weights;                  // for pairs: the same, exponentiated, as a left-hand side
};

// A row of scores may be overwritten past its end by a vector; and not a power of two, or all rows would meet
// in the same sets of the cache.
template <class E>
constexpr int64_t kScoreStride = units<E>(kBlockKeys) + 2 * kLanes<E>;

// Rows `tile`, at tile_start in the task's buffers, against the keys of a packed block that they see.
template <class E, class T = SumOf<E>>
void attend_tile(const HeadGroup& group, const Segment& segment, Range block, Range tile, int64_t tile_start,
                 bool& started, const ForwardBuffers<E>& buffers) {
  const Range seen = intersect(segment.visible(group, tile), block);
  if (seen.empty()) return;
  const int64_t d = group.shape.head_dim, d_padded = padded<T>(d), q_stride = operand_stride<E>(d);
  // Whole panels of keys, from the first one seen to the last.
  const int64_t first = (seen.begin - block.begin) / kPanelColumns<E> * kPanelColumns<E>;
  const int64_t end = seen.end - block.begin, width = end - first;
  const int64_t columns = minimum(round_up(end, kPanelColumns<E>), block.size()) - first;
  T* out = buffers.out + tile_start * d_padded;
  gemm(tile.size(), columns, units<E>(d), buffers.q + tile_start * q_stride, q_stride, 1,
       buffers.key_panels + first * units<E>(d), buffers.scores, kScoreStride<T>, Mode::overwrite);
  const T scale = scores_scale<E>(group);
  for (int64_t i = 0; i < tile.size(); ++i) {
    const int64_t row = tile.begin + i;
    T* const x = buffers.scores + i * kScoreStride<T>;
    const T factor = softmax_row(group, row, segment, intersect(segment.visible(group, row), block),
                                 block.begin + first, width, scale, buffers.softmax[tile_start + i], x);
    if constexpr (kIsPair<E>) store_operand(x, width, buffers.weights + i * kScoreStride<E>);
    if (started && factor != T{1}) scale_row(d_padded, out + i * d_padded, factor);
  }
  const E* weights = nullptr;
  if constexpr (kIsPair<E>) {
    weights = buffers.weights;
  } else {
    weights = buffers.scores;
  }
  // One panel of V at a time, so that the keys may be a part of those packed.
  for (int64_t j = 0; j < d; j += kPanelColumns<E>) {
    const int64_t panel_width = minimum(kPanelColumns<E>, padded<E>(d - j));
    gemm(tile.size(), panel_width, units<E>(width), weights, kScoreStride<E>, 1,
         buffers.value_panels + j * units<E>(block.size()) + units<E>(first) * panel_width, out + j, d_padded,
         started ? Mode::accumulate : Mode::overwrite);
  }
  started = true;
}

template <class E, class T = SumOf<E>>
void forward_rows(const AttentionForward& p, const HeadGroup& group, Range rows) {
  const int64_t d = p.shape.head_dim, d_padded = padded<T>(d);
  const Pieces tiles(rows.size(), kScoreRows, kTileRows);
  Scratch scratch;
  ForwardBuffers<E> buffers{};
  buffers.q = scratch.take<E>(rows.size() * operand_stride<E>(d));
  buffers.out = scratch.take<T>(rows.size() * d_padded);
  buffers.softmax = scratch.take<RunningSoftmax<T>>(rows.size());
  buffers.started = scratch.take<bool>(tiles.count);
  const int64_t most_keys = block_keys<E>(d);
  buffers.key_panels = scratch.take<E>(panel_size<E>(units<E>(d), most_keys));
  buffers.value_panels = scratch.take<E>(panel_size<E>(units<E>(most_keys), d));
  buffers.scores = scratch.take<T>(kScoreRows * kScoreStride<T>);
  buffers.weights = scratch.take<E>(kIsPair<E> ? kScoreRows * kScoreStride<E> : 0);
  load_queries(group, p.q, rows, buffers.q);
  for (int64_t i = 0; i < rows.size(); ++i) buffers.softmax[i] = RunningSoftmax<T>{};
  for (int64_t i = 0; i < tiles.count; ++i) buffers.started[i] = false;

  for (const bool prefix : {true, false}) {
    const Segment segment(p, prefix);
    const Range visible = segment.visible(group, rows);
    const Pieces blocks(visible.size(), most_keys, kLanes<T>);
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Range block{visible.begin + blocks[i].begin, visible.begin + blocks[i].end};
      pack_operand(p.shape.dtype, segment.key(group, block.begin), 1, segment.k.stride[2], d, block.size(),
                   buffers.key_panels);
      pack_operand(p.shape.dtype, segment.value(group, block.begin), segment.v.stride[2], 1, block.size(), d,
                   buffers.value_panels);
      for (int64_t t = 0; t < tiles.count; ++t) {
        const Range tile{rows.begin + tiles[t].begin, rows.begin + tiles[t].end};
        attend_tile(group, segment, block, tile, tiles[t].begin, buffers.started[t], buffers);
      }
    }
  }
  store_results(p, group, rows, buffers.softmax, buffers.out);
}

template <class E>
void forward_many(const AttentionForward& p) {
  const Pieces rows = task_rows(p.shape);
  parallel_for(HeadGroup::count(p.shape) * rows.count, [&](int64_t task) {
    // Later rows of a causal head see more keys. Taken alternately from both ends, any stretch of tasks that
    // a thread is handed costs about the same.
    const int64_t i = task % rows.count;
    forward_rows<E>(p, HeadGroup(p.shape, p.rule, task / rows.count),
                    rows[i % 2 == 0 ? i / 2 : rows.count - 1 - i / 2]);
  });
}

// ---- few rows: decoding ----
//
// One token against a long cache only reads the keys and values, once, so nothing is packed; and the keys are
// split, or there would be too few tasks (Flash-Decoding, Dao et al. 2023). Each task leaves, for each of the
// R rows, its own softmax state and its own sum over values; they are merged in the order of the keys.

template <class T>
struct Partial {
  RunningSoftmax<T>* softmax;  // (groups, chunks, R)
  T* sum;                      // (groups, chunks, R, padded D)
};

template <class T>
void attend_few(const AttentionForward& p, const HeadGroup& group, const Segment& segment, Range chunk,
                RunningSoftmax<T>* softmax, T* sum) {
  const int64_t d = p.shape.head_dim, d_padded = padded<T>(d), rows = group.rows();
  for (int64_t row = 0; row < rows; ++row) softmax[row] = RunningSoftmax<T>{};
  const Range seen = intersect(segment.visible(group, Range{0, rows}), chunk);
  if (seen.empty()) return;
  Scratch scratch;
  T* q = scratch.take<T>(rows * d_padded);
  const int64_t score_stride = padded<T>(seen.size()) + kLanes<T>;
  T* scores = scratch.take<T>(rows * score_stride);
  load_queries(group, p.q, {0, rows}, q);
  dot_rows(rows, seen.size(), d, q, d_padded, p.shape.dtype, segment.key(group, seen.begin), segment.k.stride[2],
           scores, score_stride, Mode::overwrite);
  for (int64_t row = 0; row < rows; ++row) {
    softmax_row(group, row, segment, intersect(segment.visible(group, row), seen), seen.begin, seen.size(), T{1},
                softmax[row], scores + row * score_stride);
  }
  combine_rows(rows, d, seen.size(), scores, score_stride, p.shape.dtype, segment.value(group, seen.begin),
               segment.v.stride[2], sum, d_padded, Mode::overwrite);
}

template <class T>
void merge_row(const AttentionForward& p, const HeadGroup& group, int64_t row, int64_t chunks,
               const Partial<T>& partial, T* sum) {
  const int64_t d_padded = padded<T>(p.shape.head_dim), rows = group.rows();
  RunningSoftmax<T> whole;
  fill(sum, 0, d_padded, T{0});
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const RunningSoftmax<T>& part = partial.softmax[chunk * rows + row];
    if (part.total == 0) continue;  // its sum was not written
    const T highest = maximum(whole.highest, part.highest);
    const T old_factor = exp(broadcast(whole.highest - highest))[0], factor = exp(broadcast(part.highest - highest))[0];
    whole.highest = highest;
    whole.total = whole.total * old_factor + part.total * factor;
    const T* part_sum = partial.sum + (chunk * rows + row) * d_padded;
    for (int64_t j = 0; j < d_padded; j += kLanes<T>) {
      store(sum + j, load(sum + j) * old_factor + load(part_sum + j) * factor);
    }
  }
  store_results(p, group, {row, row + 1}, &whole, sum);
}

template <class T>
void forward_few(const AttentionForward& p) {
  const int64_t groups = HeadGroup::count(p.shape), rows = HeadGroup::rows(p.shape);
  const int64_t d_padded = padded<T>(p.shape.head_dim);
  const Pieces prefix_chunks(p.shape.prefix, kFewRowsKeys, 1), key_chunks(p.shape.keys, kFewRowsKeys, 1);
  const int64_t chunks = prefix_chunks.count + key_chunks.count;
  Scratch scratch;
  const Partial<T> partial{scratch.take<RunningSoftmax<T>>(groups * chunks * rows),
                           scratch.take<T>(groups * chunks * rows * d_padded)};
  const auto of_group = [&](int64_t group) {
    return Partial<T>{partial.softmax + group * chunks * rows, partial.sum + group * chunks * rows * d_padded};
  };
  parallel_for(groups * chunks, [&](int64_t task) {
    const HeadGroup group(p.shape, p.rule, task / chunks);
    const int64_t chunk = task % chunks;
    const bool prefix = chunk < prefix_chunks.count;
    const Partial<T> mine = of_group(task / chunks);
    attend_few(p, group, Segment(p, prefix), prefix ? prefix_chunks[chunk] : key_chunks[chunk - prefix_chunks.count],
               mine.softmax + chunk * rows, mine.sum + chunk * rows * d_padded);
  });
  parallel_for(groups, [&](int64_t index) {
    const HeadGroup group(p.shape, p.rule, index);
    Scratch task_scratch;
    T* sum = task_scratch.take<T>(d_padded);
    for (int64_t row = 0; row < rows; ++row) merge_row(p, group, row, chunks, of_group(index), sum);
  });
}

void forward(const AttentionForward& p) {
  const bool few = HeadGroup::rows(p.shape) <= kFewRows;
  if (p.shape.dtype == DType::f64) return few ? forward_few<double>(p) : forward_many<double>(p);
  if (few) return forward_few<float>(p);
  if constexpr (kMultipliesBFloat16) {
    if (p.shape.dtype == DType::bf16) return forward_many<BFloat16Pair>(p);
  }
  forward_many<float>(p);
}

}  // namespace

void attention_backward(const AttentionBackward& p);  // attention_backward_cpu.cpp

extern const AttentionKernels attention_kernels;
constexpr AttentionKernels attention_kernels = {forward, attention_backward};

}  // namespace lwft::LWFT_ISA
