// Attention forward on the CPU.
//
// A task owns some rows of a HeadGroup (attention_scores.h) and walks once over the keys they see, a block at
// a time: it packs the block's keys and values into panels, then for each tile of rows
//     scores = Q K^T,   running softmax of each row,   out = factor * out + P V,
// with the tile in the cache all the while. Prefix first, then keys; blocks that no row sees are not even
// packed. Few rows (decoding) go another way: see forward_few.
//
// Memory of a task: q and out of its rows (at most kTaskElements each), two panels of at most kPanelBytes and
// a tile of scores: under 1 MiB for any length. Tasks depend on the shape alone (of few rows also on how they lie), so
// results do not depend on the threads.
#include "attention/attention_softmax.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {
namespace {

// Keys of a tile of scores: the more, the less often `out` is read and written; but it has to stay in the nearer caches, as
// have the panels.
constexpr int64_t kBlockKeys = 256;
constexpr int64_t kPanelBytes = 128 << 10;
// Rows of a task: the more, the less packing weighs, which matrix registers leave most of the time to; but q and out, of at
// most so many elements each, have to stay in the second cache.
template <class E>
constexpr int64_t kTaskRows = kPanelsAreRows<E> ? 480 : 1024;
template <class E>
constexpr int64_t kTaskElements = (kPanelsAreRows<E> ? 32 : 64) << 10;
// Where there are few heads, tasks become smaller, down to kFewestTaskRows, until there are so many.
constexpr int64_t kEnoughTasks = 8, kFewestTaskRows = 96;
// Keys of a task where there are few rows: as many as leave kEnoughTasks, within these.
constexpr int64_t kFewestFewRowsKeys = 128, kFewRowsKeys = 512;
// Of one head so many tokens at once, and more where they are short: about so many bytes.
constexpr int64_t kTokensAtOnce = 8, kBytesAtOnce = 2048;
// Keys and values that are together larger than kFewRowsCached are asked for about so many bytes before they are read. (32
// heads of 128, 4096 keys in bfloat16, 1 and 2 threads of a Xeon that reads 20 and 48 GB/s: where the tokens of a head lie
// together 17 and 38 GB/s, without 12 and 31.)
constexpr int64_t kFewRowsAhead = 4096, kFewRowsCached = 8 << 20;
// Tasks that each thread should find, and how many scores a task with many heads may keep.
constexpr int64_t kTasksOfThread = 4, kFewRowsScores = 32 << 10;

template <class E>
Pieces task_rows(const AttentionShape& shape) {
  const int64_t rows = HeadGroup::rows(shape), groups = maximum<int64_t>(HeadGroup::count(shape), 1);
  const int64_t largest = minimum(kTaskRows<E>, maximum(kScoreRows<E>, kTaskElements<E> / shape.head_dim));
  const int64_t wanted = ceil_div(rows, ceil_div(kEnoughTasks, groups));
  return Pieces(rows, minimum(largest, maximum(wanted, kFewestTaskRows)), kTileRows<E>);
}

// Keys of a block, for panels of at most kPanelBytes (with very large heads: of 64 keys).
template <class E>
int64_t block_keys(int64_t head_dim) {
  const int64_t fitting = kPanelBytes / (panel_depth<E>(units<E>(head_dim)) * static_cast<int64_t>(sizeof(E)));
  return maximum<int64_t>(64, minimum(kBlockKeys, fitting / 64 * 64));
}

// out and lse of some rows, softmax their states, from their sums of exp(score - highest) * v.
template <class T>
void store_results(const AttentionForward& p, const HeadGroup& group, Range rows, SoftmaxRows<T> softmax,
                   const T* sums) {
  store_rows(
      p.shape, rows, sums, [&](int64_t row) { return softmax.inverse_total(row - rows.begin); }, p.out.data,
      [&](int64_t row) { return group.offset(p.out.stride, row); });
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    static_cast<T*>(p.lse)[group.index(row)] = softmax.log_sum_exp(row - rows.begin);
  }
}

// Some rows of q.k with `keys`: `scale` times them are the scores, but for what the rule adds. As `weights` they are
// exponentiated and dropped out, 0 for keys that a row does not see; `factors` (a group more than rows) gets what all that
// a row has summed before must be multiplied by.
template <class T, class Out>
void softmax_rows(const HeadGroup& group, const Segment& segment, Range rows, Range keys, T scale,
                  SoftmaxRows<T> softmax, T* scores, int64_t stride, Out* weights, int64_t weight_stride, T* factors) {
  const Dropout& dropout = group.rule.dropout;
  for (int64_t begin = 0; begin < rows.size(); begin += kGroupRows<T>) {
    const int64_t count = minimum<int64_t>(kGroupRows<T>, rows.size() - begin);
    Range seen[kGroupRows<T>];
    Vec<T> lanes[kGroupRows<T>];
    T shift[kGroupRows<T>], left = scale;
    for (int64_t i = 0; i < kGroupRows<T>; ++i) lanes[i] = broadcast(-kInfinity<T>);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.begin + begin + i;
      seen[i] = intersect(segment.visible(group, row), keys);
      if (seen[i].empty()) continue;
      T* const x = scores + (begin + i) * stride + seen[i].begin - keys.begin;
      left = finish_scores<T>(group, row, segment.prefix, seen[i].begin, seen[i].size(), scale, x, nullptr);
      lanes[i] = largest_lanes(seen[i].size(), x);
    }
    const SoftmaxRows<T> states = softmax.from(begin);
    store(factors + begin, states.raise(largest_of_each<T>(lanes) * left, shift));
    for (int64_t i = 0; i < kGroupRows<T>; ++i) lanes[i] = Vec<T>{};
    for (int64_t i = 0; i < count; ++i) {
      Out* const to = weights + (begin + i) * weight_stride;
      if (seen[i].empty()) {
        fill(to, 0, keys.size(), Out{});
        continue;
      }
      const int64_t first = seen[i].begin - keys.begin, n = seen[i].size();
      T* const x = scores + (begin + i) * stride + first;
      if (dropout.active()) {
        lanes[i] = exponentiate(n, x, left, shift[i], x);
        dropout_row(dropout, group.index(rows.begin + begin + i), segment.first_column + seen[i].begin, n, x);
        if constexpr (!std::is_same_v<T, Out>) {
          for (int64_t j = 0; j < n; j += kLanes<T>) store_as<T>(to + first + j, load(x + j));
        }
      } else {
        lanes[i] = exponentiate(n, x, left, shift[i], to + first);
      }
      fill(to, 0, first, Out{});
      fill(to, first + n, keys.size(), Out{});
    }
    states.add(sum_of_each<T>(lanes));
  }
}

template <class E>
struct ForwardBuffers {
  using T = SumOf<E>;
  using L = LeftOf<E>;

  L* q;             // (rows, operand_stride(D))
  T* out;           // (rows, padded D)
  bool* started;    // per tile: whether `out` holds anything yet
  E* key_panels;    // K^T of the block: (D, keys) in panels
  E* value_panels;  // V of the block: (keys, D) in panels
  T* scores;        // (kScoreRows, kScoreStride)
  L* weights;       // the same, exponentiated, as a left-hand side: for pairs in a place of their own
};

// A row of scores may be overwritten past its end by a vector; and not a power of two, or all rows would meet
// in the same sets of the cache.
template <class E>
constexpr int64_t kScoreStride = units<E>(kBlockKeys) + 2 * kLanes<E>;

// Rows `tile`, at tile_start in the task's buffers, against the keys of a packed block that they see.
template <class E, class T = SumOf<E>>
void attend_tile(const HeadGroup& group, const Segment& segment, Range block, Range tile, int64_t tile_start,
                 bool& started, SoftmaxRows<T> softmax, const ForwardBuffers<E>& buffers) {
  const Range seen = intersect(segment.visible(group, tile), block);
  if (seen.empty()) return;
  const int64_t d = group.shape.head_dim, d_padded = padded<T>(d), q_stride = operand_stride<E>(d);
  // Whole panels of keys, from the first one seen to the last.
  const int64_t first = (seen.begin - block.begin) / kPanelColumns<E> * kPanelColumns<E>;
  const int64_t end = seen.end - block.begin, width = end - first;
  const int64_t columns = minimum(round_up(end, kPanelColumns<E>), block.size()) - first;
  T* out = buffers.out + tile_start * d_padded;
  gemm(tile.size(), columns, units<E>(d), buffers.q + tile_start * q_stride, q_stride, 1,
       buffers.key_panels + first * panel_depth<E>(units<E>(d)), buffers.scores, kScoreStride<T>, Mode::overwrite);
  T factors[kScoreRows<E> + kGroupRows<T>];
  for (int64_t i = 0; i < tile.size(); ++i) elements(buffers.weights + i * kScoreStride<E>, width);
  softmax_rows(group, segment, tile, {block.begin + first, block.begin + end}, scores_scale<E>(group),
               softmax.from(tile_start), buffers.scores, kScoreStride<T>, elements_of(buffers.weights),
               kScoreStride<E> * kUnit<E>, factors);
  for (int64_t i = 0; i < tile.size(); ++i) {
    if (started && factors[i] != T{1}) scale_row(d_padded, out + i * d_padded, factors[i]);
  }
  gemm_with_rows(tile.size(), d, units<E>(width), buffers.weights, kScoreStride<E>, 1, buffers.value_panels,
                 units<E>(first), units<E>(block.size()), out, d_padded, started ? Mode::accumulate : Mode::overwrite);
  started = true;
}

template <class E, class T = SumOf<E>>
void forward_rows(const AttentionForward& p, const HeadGroup& group, Range rows) {
  const int64_t d = p.shape.head_dim, d_padded = padded<T>(d);
  const Pieces tiles(rows.size(), kScoreRows<E>, kTileRows<E>);
  Scratch scratch;
  ForwardBuffers<E> buffers{};
  buffers.q = scratch.take<LeftOf<E>>(rows.size() * operand_stride<E>(d));
  buffers.out = scratch.take<T>(rows.size() * d_padded);
  const SoftmaxRows<T> softmax(rows.size(), scratch);
  buffers.started = scratch.take<bool>(tiles.count);
  const int64_t most_keys = block_keys<E>(d);
  buffers.key_panels = scratch.take<E>(panel_size<E>(units<E>(d), most_keys));
  buffers.value_panels = scratch.take<E>(panel_size<E>(units<E>(most_keys), d));
  buffers.scores = scratch.take<T>(kScoreRows<E> * kScoreStride<T>);
  if constexpr (kIsPair<E>) {
    buffers.weights = scratch.take<LeftOf<E>>(kScoreRows<E> * kScoreStride<E>);
  } else {
    buffers.weights = buffers.scores;
  }
  load_queries(group, p.q, rows, buffers.q);
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
        attend_tile(group, segment, block, tile, tiles[t].begin, buffers.started[t], softmax, buffers);
      }
    }
  }
  store_results(p, group, rows, softmax, buffers.out);
}

template <class E>
void forward_many(const AttentionForward& p) {
  const Pieces rows = task_rows<E>(p.shape);
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
// R rows of its heads, its own softmax state and its own sum over values; they are merged in the order of the keys.
//
// Keys and values are read as they lie. Where all heads of a token lie together, a walk over the keys of one head meets a
// page for every one of them and takes a few lines from it, which neither the prefetchers nor the tables of addresses
// are made for: so a task takes many heads, and for some tokens all of them before it goes on. (32 heads of 128, 4096 keys
// in bfloat16, 1 and 2 threads of a Xeon that reads 22 and 47 GB/s: 21 and 42 GB/s; by one head after the other 8 and 10.)

struct FewRowsPlan {
  bool by_token;  // all heads of a token lie together
  int64_t heads;  // that a task takes: a head's results do not depend on it
  Pieces prefix_chunks, key_chunks;

  explicit FewRowsPlan(const AttentionForward& p)
      : by_token(p.k.stride[1] < p.k.stride[2]),
        heads(1),
        prefix_chunks(p.shape.prefix, keys_of_task(p.shape), kTokensAtOnce),
        key_chunks(p.shape.keys, keys_of_task(p.shape), kTokensAtOnce) {
    if (!by_token) return;
    const int64_t tasks = maximum<int64_t>(p.shape.batch * chunks(), 1);
    const int64_t parts = ceil_div(kTasksOfThread * thread_count(), tasks);
    heads =
        maximum<int64_t>(1, minimum(p.shape.kv_heads / parts,
                                    kFewRowsScores / (maximum<int64_t>(HeadGroup::rows(p.shape), 1) * kFewRowsKeys)));
  }

  int64_t chunks() const { return prefix_chunks.count + key_chunks.count; }
  bool is_prefix(int64_t chunk) const { return chunk < prefix_chunks.count; }
  Range chunk(int64_t i) const { return is_prefix(i) ? prefix_chunks[i] : key_chunks[i - prefix_chunks.count]; }

 private:
  int64_t keys_of_task(const AttentionShape& shape) const {
    const int64_t others = maximum<int64_t>(shape.batch * (by_token ? 1 : shape.kv_heads), 1);
    const int64_t wanted = ceil_div(shape.keys, ceil_div(kEnoughTasks, others));
    return minimum(kFewRowsKeys, maximum(kFewestFewRowsKeys, wanted));
  }
};

template <class T>
struct Partial {
  SoftmaxRows<T> softmax;  // (groups, chunks, R, and up to a group more)
  T* sum;                  // (groups, chunks, R, padded D)
};

// Entries of a chunk's states: what is done for a group of rows reaches past the last.
template <class T>
int64_t state_rows(int64_t rows) {
  return rows + kGroupRows<T>;
}

// `heads` key heads of one sequence, from `group` on, against a chunk of keys; partial_of(i) is for head i of them.
template <class T, class PartialOf>
void attend_few(const AttentionForward& p, const HeadGroup& group, int64_t heads, const Segment& segment, Range chunk,
                const PartialOf& partial_of) {
  const int64_t d = p.shape.head_dim, d_padded = padded<T>(d), rows = group.rows();
  const Range seen = intersect(segment.visible(group, Range{0, rows}), chunk);  // whichever head
  if (seen.empty()) return;
  Scratch scratch;
  const int64_t q_size = rows * d_padded, score_stride = padded<T>(seen.size()) + kLanes<T>;
  T* const q = scratch.take<T>(heads * q_size);
  T* const scores = scratch.take<T>(heads * rows * score_stride);
  T* const factors = scratch.take<T>(state_rows<T>(rows));  // of nothing so far
  const auto head = [&](int64_t i) { return HeadGroup(p.shape, p.rule, group.number() + i); };
  const int64_t row_bytes = d * static_cast<int64_t>(element_size(p.shape.dtype));
  const bool asks = 2 * HeadGroup::count(p.shape) * segment.count * row_bytes > kFewRowsCached;
  const int64_t tokens = maximum(kTokensAtOnce, kBytesAtOnce / row_bytes / kTokensAtOnce * kTokensAtOnce);
  const int64_t steps_ahead = ceil_div(kFewRowsAhead, tokens * row_bytes);
  // body(i, j, count, rows) for the tokens j .. j + count - 1 of head i, which lie at `rows`.
  const auto for_tokens = [&](const Strided& tensor, const void* first, const auto& body) {
    const auto at = [&](int64_t i, int64_t j) {
      return element(p.shape.dtype, first, i * tensor.stride[1] + (j - seen.begin) * tensor.stride[2]);
    };
    int64_t next_i = steps_ahead % heads, next_j = seen.begin + steps_ahead / heads * tokens;
    for (int64_t j = seen.begin; j < seen.end; j += tokens) {
      for (int64_t i = 0; i < heads; ++i) {
        for (int64_t l = next_j; asks && l < minimum(next_j + tokens, seen.end); ++l) {
          const char* const row = static_cast<const char*>(at(next_i, l));
          for (int64_t byte = 0; byte < row_bytes; byte += kLine) prefetch_to_second_cache(row + byte);
        }
        if (++next_i == heads) {
          next_i = 0;
          next_j += tokens;
        }
        body(i, j, minimum(tokens, seen.end - j), at(i, j));
      }
    }
  };
  for (int64_t i = 0; i < heads; ++i) load_queries(head(i), p.q, {0, rows}, q + i * q_size);
  for_tokens(segment.k, segment.key(group, seen.begin), [&](int64_t i, int64_t j, int64_t count, const void* keys) {
    dot_rows(rows, count, d, q + i * q_size, d_padded, p.shape.dtype, keys, segment.k.stride[2],
             scores + i * rows * score_stride + j - seen.begin, score_stride, Mode::overwrite);
  });
  for (int64_t i = 0; i < heads; ++i) {
    T* const mine = scores + i * rows * score_stride;
    softmax_rows(head(i), segment, {0, rows}, seen, T{1}, partial_of(i).softmax, mine, score_stride, mine, score_stride,
                 factors);
  }
  for_tokens(segment.v, segment.value(group, seen.begin), [&](int64_t i, int64_t j, int64_t count, const void* values) {
    combine_rows(rows, d, count, scores + i * rows * score_stride + j - seen.begin, score_stride, p.shape.dtype, values,
                 segment.v.stride[2], partial_of(i).sum, d_padded,
                 j == seen.begin ? Mode::overwrite : Mode::accumulate);
  });
}

template <class T>
void merge_row(const AttentionForward& p, const HeadGroup& group, int64_t row, int64_t chunks,
               const Partial<T>& partial, T* sum) {
  const int64_t d_padded = padded<T>(p.shape.head_dim), rows = group.rows();
  T highest = -kInfinity<T>, total{0};
  fill(sum, 0, d_padded, T{0});
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const SoftmaxRows<T> part = partial.softmax.from(chunk * state_rows<T>(rows) + row);
    if (*part.total == 0) continue;  // its sum was not written
    const T before = highest;
    highest = maximum(before, *part.highest);
    const T old_factor = exp(broadcast(before - highest))[0], factor = exp(broadcast(*part.highest - highest))[0];
    total = total * old_factor + *part.total * factor;
    const T* part_sum = partial.sum + (chunk * rows + row) * d_padded;
    for (int64_t j = 0; j < d_padded; j += kLanes<T>) {
      store(sum + j, load(sum + j) * old_factor + load(part_sum + j) * factor);
    }
  }
  store_results(p, group, {row, row + 1}, SoftmaxRows<T>(&highest, &total), sum);
}

template <class T>
void forward_few(const AttentionForward& p) {
  const int64_t groups = HeadGroup::count(p.shape), rows = HeadGroup::rows(p.shape);
  const int64_t d_padded = padded<T>(p.shape.head_dim);
  const FewRowsPlan plan(p);
  const int64_t chunks = plan.chunks();
  Scratch scratch;
  const SoftmaxRows<T> softmax(groups * chunks * state_rows<T>(rows), scratch);
  T* const sums = scratch.take<T>(groups * chunks * rows * d_padded);
  const auto of_group = [&](int64_t group) {
    return Partial<T>{softmax.from(group * chunks * state_rows<T>(rows)), sums + group * chunks * rows * d_padded};
  };
  const Pieces heads(p.shape.kv_heads, plan.heads, 1);
  parallel_for(p.shape.batch * chunks * heads.count, [&](int64_t task) {
    const int64_t batch = task / (chunks * heads.count), chunk = task / heads.count % chunks;
    const Range mine = heads[task % heads.count];
    const int64_t first = batch * p.shape.kv_heads + mine.begin;
    attend_few<T>(p, HeadGroup(p.shape, p.rule, first), mine.size(), Segment(p, plan.is_prefix(chunk)),
                  plan.chunk(chunk), [&](int64_t i) {
                    const Partial<T> all = of_group(first + i);
                    return Partial<T>{all.softmax.from(chunk * state_rows<T>(rows)), all.sum + chunk * rows * d_padded};
                  });
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
  if constexpr (kSplitsFloat) {
    if (takes_parts(p.shape)) return forward_many<FloatParts>(p);
  }
  forward_many<float>(p);
}

}  // namespace

void attention_backward(const AttentionBackward& p);  // attention_backward_cpu.cpp

extern const AttentionKernels attention_kernels;
constexpr AttentionKernels attention_kernels = {forward, attention_backward};

}  // namespace lwft::LWFT_ISA
