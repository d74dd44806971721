// How the backward kernel cuts its work, from the shape and the wanted gradients alone, and the sums that are
// left to be taken afterwards: every sum has one owner and one order, so results do not depend on threads.
//
// dK and dV of a block of keys are complete when all rows have passed. dQ is summed in a float buffer of the
// task; where there are few heads, keys are cut into chunks with a task each, and their dQ are added in the
// order of the chunks. A bias that is broadcast over sequences or heads gets their dS summed: where its
// gradient is a matrix, by one task that takes them in turn, else from one small sum for each.
//
// Memory: three numbers for each row, the dQ of chunks (at most kChunkBytes), dprefix of each sequence where
// it is shared, dbias in float where it has 16 bits.
#pragma once
#include "attention/attention_softmax.h"
#include "common/cpu/threads.h"

namespace lwft::LWFT_ISA {
namespace {

// Keys of a block: the more, the less often dQ and what the tiles are made of is read and written. Floats that the vectors
// multiply want it in the first cache (128 of a Xeon: 7 % faster than 256), matrix registers long products.
constexpr int64_t kBlockKeys = 256;
template <class E>
constexpr int64_t kKeysOfBlock = kPanelsAreRows<E> ? 128 : kBlockKeys;
constexpr int64_t kEnoughTasks = 8;
constexpr int64_t kChunkBytes = int64_t{64} << 20;
// Up to so many rows per key head, a task takes several heads, whose dQ together are at most so large.
constexpr int64_t kRowsForHeads = 48, kHeadsBytes = 256 << 10;
constexpr int64_t kTasksOfThread = 4;
// Beyond this, lse = highest + log(total) has lost the total (a whole row biased by -3.4e38).
constexpr double kLseTooLarge = 1e5;
// Where the prefix and the keys are so few together, every one weighs much.
constexpr int64_t kFewKeys = 32;
template <class E>
constexpr int64_t kScoreStride = units<E>(kBlockKeys) + 2 * kLanes<E>;

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

// P = exp(S - shift) * factor, dS = P * (Z * dP - delta).
template <class T>
struct RowStatistics {
  T shift, factor, delta;
};

template <class T>
struct BackwardPlan {
  const AttentionBackward& p;
  int64_t d, d_padded, rows, groups;
  Pieces tiles, prefix_blocks, key_blocks;
  // A task is (owner, chunk): it takes the groups of its owner in turn, and of the blocks those of its chunk.
  // An owner is one group, or all those whose dS are summed into one matrix dbias.
  bool sum_batch = false, sum_heads = false;
  int64_t owners;
  Pieces chunks;
  // How many owners a task takes, of the same block one after the other: dK and dV are written by token, as keys mostly lie,
  // so that neighbouring heads find the pages that the one before has had looked up. With many rows that is no cost.
  int64_t together = 1;
  bool few_rows;   // as in the forward kernel: nothing is packed
  bool all_whole;  // one block is all there is: its tiles know all of a row, and need no statistics
  // The rows' statistics from their scores and dP rather than from lse and out (two products more).
  bool exact_statistics;
  RowStatistics<T>* statistics;  // (groups, rows)
  BiasSums<T> bias;
  T* dq_chunks = nullptr;  // (groups, chunks, rows, padded D) where there is more than one chunk
  T* dprefix_k = nullptr;  // (B, Hkv, P, D) where the prefix is shared
  T* dprefix_v = nullptr;

  struct Sizes {
    int64_t tile_rows, multiple, block_keys;
  };

  BackwardPlan(const AttentionBackward& params, Sizes sizes, Scratch& scratch)
      : p(params),
        d(p.shape.head_dim),
        d_padded(padded<T>(d)),
        rows(HeadGroup::rows(p.shape)),
        groups(HeadGroup::count(p.shape)),
        tiles(rows, sizes.tile_rows, sizes.multiple),
        prefix_blocks(p.shape.prefix, sizes.block_keys, kLanes<T>),
        key_blocks(p.shape.keys, sizes.block_keys, kLanes<T>),
        owners(groups),
        chunks(0, 1, 1) {
    const bool matrix = p.dbias != nullptr && p.bias_size[2] > 1 && p.bias_size[3] > 1;
    sum_batch = matrix && p.bias_size[0] == 1;
    sum_heads = matrix && p.bias_size[1] == 1;
    if (sum_batch) owners = minimum<int64_t>(owners, p.shape.kv_heads);
    if (sum_heads) owners = sum_batch ? minimum<int64_t>(owners, 1) : p.shape.batch;
    cut_chunks(scratch);
    few_rows = rows <= kFewRows;
    all_whole = blocks() == 1;
    // Few rows and a rounded `out`: one row weighs much. A bias that is the same for all keys: the sum of dS over them
    // all is a difference of equals.
    const bool rounded = p.shape.dtype == DType::bf16 || p.shape.dtype == DType::f16;
    exact_statistics = (few_rows && rounded) || (p.dbias != nullptr && p.bias_size[3] == 1) ||
                       (p.shape.prefix > 0 && p.shape.prefix + p.shape.keys <= kFewKeys);
    statistics = scratch.take<RowStatistics<T>>(all_whole ? 0 : groups * rows);
    if (p.dbias != nullptr) place_bias_sums(matrix, scratch);
    if (p.shape.prefix > 0 && p.prefix_batch == 1) {
      const int64_t size = groups * p.shape.prefix * d;
      if (p.dprefix_k != nullptr) dprefix_k = scratch.take<T>(size);
      if (p.dprefix_v != nullptr) dprefix_v = scratch.take<T>(size);
    }
  }

  int64_t blocks() const { return prefix_blocks.count + key_blocks.count; }
  bool is_prefix(int64_t block) const { return block < prefix_blocks.count; }
  Range block(int64_t i) const { return is_prefix(i) ? prefix_blocks[i] : key_blocks[i - prefix_blocks.count]; }

  HeadGroup group(int64_t owner, int64_t member) const {
    const int64_t kv_heads = p.shape.kv_heads;
    const int64_t batch = sum_batch ? (sum_heads ? member / kv_heads : member) : sum_heads ? owner : owner / kv_heads;
    const int64_t kv_head = sum_heads ? member % kv_heads : sum_batch ? owner : owner % kv_heads;
    return HeadGroup(p.shape, p.rule, batch * kv_heads + kv_head);
  }
  int64_t members() const { return owners == 0 ? 0 : groups / owners; }
  RowStatistics<T>* statistics_of(const HeadGroup& group) const { return statistics + group.number() * rows; }
  T* dq_chunk(int64_t group, int64_t chunk) const {
    return dq_chunks + (group * chunks.count + chunk) * rows * d_padded;
  }

 private:
  void cut_chunks(Scratch& scratch) {
    if (rows > 0 && rows <= kRowsForHeads && members() == 1) {
      const int64_t fitting = kHeadsBytes / (rows * d_padded * static_cast<int64_t>(sizeof(T)));
      together = maximum<int64_t>(1, minimum(fitting, p.shape.kv_heads));
    }
    int64_t wanted = ceil_div(kEnoughTasks, maximum<int64_t>(ceil_div(owners, together), 1));
    const int64_t dq_size = groups * rows * d_padded;
    if (p.dq.data != nullptr && dq_size > 0) {
      wanted = minimum(wanted, kChunkBytes / (dq_size * static_cast<int64_t>(sizeof(T))));
    }
    const int64_t of_blocks = maximum<int64_t>(blocks(), 1);  // no keys: one chunk of nothing
    chunks = Pieces(of_blocks, ceil_div(of_blocks, maximum<int64_t>(wanted, 1)), 1);
    // The cut above depends on the shape alone; this one changes no result.
    const int64_t parts = ceil_div(kTasksOfThread * thread_count(), maximum<int64_t>(chunks.count, 1));
    together = maximum<int64_t>(1, minimum(together, owners / parts));
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
    parallel_for(ceil_div(count, kFill),
                 [&](int64_t i) { fill(bias.data, i * kFill, minimum((i + 1) * kFill, count), T{0}); });
  }
};

// ---- sums afterwards ----

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

}  // namespace
}  // namespace lwft::LWFT_ISA
