// Blocks that own a tile of dbias, 64 queries by 64 keys of a head: dS, summed over the sequences and heads that the bias
// is broadcast over; where it is broadcast over queries or keys, over all tiles along them, and at the end within the tile.
#include "attention/attention_backward_cuda.cuh"

namespace lwft::cuda {
namespace {

// Shared memory: Q, dO, K, V and what dropout keeps. One stage of it, so that a second block fits beside it, whose
// products go on while this one waits for its tiles. Behind the loop, the tile of sums.
template <int D>
constexpr size_t kSharedBytes = 4 * kOwnedElements<D> * sizeof(uint16_t) + kTile * kKeepBytes;
constexpr int kSumStride = kTile + 1;
static_assert(kTile * kSumStride * sizeof(float) <= kSharedBytes<64>);

// Where a tile lies among (batch, head, tiles of queries, tiles of keys).
struct Place {
  int batch, head, rows, keys;
};

// `number` in the order of those dimensions, of which only those chosen count.
LWFT_DEVICE Place place_of(int64_t number, const AttentionBackward& p, const AttentionBackwardPlan& plan, bool own) {
  const auto next = [&](bool chosen, int64_t size) {
    if (!chosen) return 0;
    const int64_t at = number % size;
    number /= size;
    return static_cast<int>(at);
  };
  Place place{};
  place.keys = next(plan.own_keys == own, plan.key_tiles);
  place.rows = next(plan.own_rows == own, plan.query_tiles);
  place.head = next(plan.own_head == own, p.shape.heads);
  place.batch = next(plan.own_batch == own, p.shape.batch);
  return place;
}

// sums += dS of a tile.
template <class T, int D>
LWFT_DEVICE void add_tile(const AttentionBackward& p, const AttentionBackwardPlan& plan, const Dropout& dropout,
                          const Place& place, float (&sums)[kTile / 8][4]) {
  const int kv_heads = static_cast<int>(p.shape.kv_heads), group_size = static_cast<int>(p.shape.heads) / kv_heads;
  const HeadGroup group(p.shape, p.rule, place.batch * kv_heads + place.head / group_size);
  HeadGroup head = group;  // as if it were alone, so that its rows are its queries
  head.group_size = 1;
  head.rows = head.queries;
  head.kv_head = place.head;
  const int first = place.rows * kTile, key = place.keys * kTile - plan.early;
  const KeyRange top = head.visible(first), bottom = head.visible(minimum(first + kTile, head.rows) - 1);
  if (key + kTile <= top.begin || key >= bottom.end) return;
  const KeyTile tile{false, key < bottom.begin || key + kTile > top.end, key, group.key_end,
                     static_cast<int>(p.shape.prefix) + key};

  T* const q = reinterpret_cast<T*>(shared_memory());
  T* const grad_out = q + kOwnedElements<D>;
  T* const keys = grad_out + kOwnedElements<D>;
  T* const values = keys + kOwnedElements<D>;
  uint8_t* const keep = reinterpret_cast<uint8_t*>(values + kOwnedElements<D>);
  const KeyHead<T> key_head(p, group, false);
  block_barrier();  // the tiles before have been read
  copy_queries<kThreads, kTile, D>(q, head, p.q, first);
  copy_queries<kThreads, kTile, D>(grad_out, head, p.grad_out, first);
  copy_keys<kThreads, kTile, D>(keys, group, tile, key_head.k, key_head.k_stride);
  copy_keys<kThreads, kTile, D>(values, group, tile, key_head.v, key_head.v_stride);
  copy_commit();
  if (dropout.active()) draw_block<kTile>(head, dropout, first, tile.first_column, keep);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  RowState states[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    states[half] = row_state(p, plan, head, first + warp * 16 + lane / 4 + half * 8);
  }
  copy_wait<0>();
  block_barrier();  // everyone's part of the tiles has landed
  float products[kTile / 8][4] = {}, dweights[kTile / 8][4] = {};
  multiply_tiles<T, D, kTile>(q, keys, products, grad_out, values, dweights);
  for_elements<kTile>([&](int r, int column, int n, int e) {
    const bool is_kept = !dropout.active() || kept(keep, r, column);
    sums[n][e] +=
        gradients_of<T>(p, plan, states[e / 2], tile, tile.start + column, products[n][e], dweights[n][e], is_kept)
            .dscore;
  });
}

template <class T, int D>
LWFT_KERNEL(kThreads)
attention_dbias_kernel(AttentionBackward p, AttentionBackwardPlan plan) {
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const int64_t part = block_index() / plan.bias_blocks;
  const Place own = place_of(block_index() % plan.bias_blocks, p, plan, true);
  const int64_t all = (plan.own_batch ? 1 : p.shape.batch) * (plan.own_head ? 1 : p.shape.heads) *
                      (plan.own_rows ? 1 : plan.query_tiles) * (plan.own_keys ? 1 : plan.key_tiles);
  const int64_t each = (all + plan.bias_parts - 1) / plan.bias_parts;
  const int64_t begin = part * each, end = begin + each < all ? begin + each : all;
  float sums[kTile / 8][4] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Place other = place_of(i, p, plan, false);
    const Place place{own.batch + other.batch, own.head + other.head, own.rows + other.rows, own.keys + other.keys};
    add_tile<T, D>(p, plan, dropout, place, sums);
  }

  const int first_row = plan.own_rows ? own.rows * kTile : 0;
  const int first_key = plan.own_keys ? own.keys * kTile - plan.early : 0;
  const int64_t rows = p.bias_size[2], keys = p.bias_size[3];
  const int64_t matrix = ((plan.own_batch ? own.batch : 0) * p.bias_size[1] + (plan.own_head ? own.head : 0)) * rows;
  const auto store = [&](int r, int c, float value) {
    const int64_t row = first_row + r, key = first_key + c;
    if (row >= rows || key < 0 || key >= keys) return;
    const int64_t at = (matrix + row) * keys + key;
    if (plan.bias_parts > 1) {
      plan.dbias[part * plan.bias_elements + at] = value;
    } else if (p.rule.bias_dtype == DType::f32) {
      static_cast<float*>(p.dbias)[at] = value;
    } else {
      static_cast<T*>(p.dbias)[at] = from_float<T>(value);
    }
  };
  if (plan.own_rows && plan.own_keys) {
    for_elements<kTile>([&](int r, int c, int n, int e) { store(r, c, sums[n][e]); });
    return;
  }
  float* const tile = reinterpret_cast<float*>(shared_memory());
  block_barrier();  // the last tiles have been read
  for_elements<kTile>([&](int r, int c, int n, int e) { tile[r * kSumStride + c] = sums[n][e]; });
  block_barrier();
  const int i = thread_index();
  float total = 0.0f;
  if (i < kTile) {  // of a column where the rows are summed over, else of a row
    const bool column = plan.own_keys;
    for (int j = 0; j < kTile; ++j) total += tile[column ? j * kSumStride + i : i * kSumStride + j];
    if (plan.own_keys) store(0, i, total);
    if (plan.own_rows) store(i, 0, total);
  }
  if (plan.own_rows || plan.own_keys) return;
  block_barrier();  // all rows have been read
  if (i < kTile) tile[i] = total;
  block_barrier();
  if (i != 0) return;
  total = 0.0f;
  for (int j = 0; j < kTile; ++j) total += tile[j];
  store(0, 0, total);
}

struct Instance {
  DType dtype;
  int largest_head_dim;
  size_t shared_bytes;
  void (*dbias)(AttentionBackward, AttentionBackwardPlan);
};

template <class T, int D>
constexpr Instance instance(DType dtype) {
  return {dtype, D, kSharedBytes<D>, attention_dbias_kernel<T, D>};
}

const Instance kInstances[] = {
    instance<BFloat16, 64>(DType::bf16),
    instance<BFloat16, 128>(DType::bf16),
    instance<Float16, 64>(DType::f16),
    instance<Float16, 128>(DType::f16),
};

}  // namespace

int attention_dbias_cuda(const AttentionBackward& p, const AttentionBackwardPlan& plan, void* stream) {
  const Instance& instance = instance_for(kInstances, p.shape);
  const auto blocks = static_cast<int>(plan.bias_blocks * plan.bias_parts);
  if (blocks == 0) return 0;
  return launch(instance.dbias, blocks, kThreads, instance.shared_bytes, stream, p, plan);
}

}  // namespace lwft::cuda
