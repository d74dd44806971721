// Blocks that own 64 keys of a key head, or of its prefix: dK = scale * dR^T Q and dV = (P * Z)^T dO, summed over the rows
// of the group that see them; of a prefix that all sequences share, over those too. The products are taken transposed,
// S^T = K Q^T and dP^T = V dO^T, with 16 keys a warp: so P^T and dR^T are the left operands of the next products as they
// stand in the registers. dK and dV stay in registers throughout.
#include "attention/attention_backward_cuda.cuh"

namespace lwft::cuda {
namespace {

// Shared memory: K and V; stages of Q, dO, the rows' state and what dropout keeps of them.
template <int D>
constexpr int kStageTile = kStep * (D + kPad);
template <int D>
constexpr int kStageElements =
    2 * kStageTile<D> + kStep * (static_cast<int>(sizeof(RowState)) + kKeepBytes) / static_cast<int>(sizeof(uint16_t));
static_assert(kStageElements<64> % 8 == 0 && kStageElements<128> % 8 == 0);
template <int D>
constexpr size_t kSharedBytes = (2 * kOwnedElements<D> + kStages * kStageElements<D>)*sizeof(uint16_t);

// The keys that a block owns, and the tiles of rows whose gradients it sums, in the order (batch, tile).
struct OwnedKeys {
  bool prefix;
  int batch, kv_head, part;
  int first, count;      // keys; those of the tensor
  int first_row, steps;  // tiles of kStep rows in each group
  int begin, end;        // of the tiles of all batches

  LWFT_DEVICE OwnedKeys(const AttentionBackward& p, const AttentionBackwardPlan& plan, bool prefix_in)
      : prefix(prefix_in), count(static_cast<int>(prefix ? p.shape.prefix : p.shape.keys)) {
    const int tiles = prefix ? plan.prefix_tiles : plan.key_tiles;
    const int kv_heads = static_cast<int>(p.shape.kv_heads);
    const int batches = static_cast<int>(prefix ? p.prefix_batch : p.shape.batch);
    int number = block_index();
    first = number % tiles * kTile - (prefix ? 0 : plan.early);
    number /= tiles;
    kv_head = number % kv_heads;
    number /= kv_heads;
    batch = number % batches;
    part = number / batches;

    const HeadGroup group = group_at(p, 0);
    int first_query = 0, end_query = group.queries;
    if (!prefix) {
      const int last = minimum(first + kTile, group.key_end) - 1, offset = group.keys - group.queries;
      if (p.rule.causal) first_query = maximum(0, first - offset);
      if (p.rule.window > 0) {
        const int widest = group.keys + group.queries;
        const int window = p.rule.window < widest ? static_cast<int>(p.rule.window) : widest;
        if (!p.rule.causal) first_query = maximum(0, maximum(first, 0) - offset - window + 1);
        end_query = minimum(end_query, last - offset + window);
      }
      if (last < maximum(first, 0)) end_query = 0;
    }
    first_row = first_query * group.group_size / kStep * kStep;
    steps = end_query > first_query ? (end_query * group.group_size - first_row + kStep - 1) / kStep : 0;
    const int64_t all = (prefix && p.prefix_batch == 1 ? p.shape.batch : 1) * steps;
    const int64_t each = prefix ? (all + plan.prefix_parts - 1) / plan.prefix_parts : all;
    begin = static_cast<int>(part * each < all ? part * each : all);
    end = static_cast<int>(begin + each < all ? begin + each : all);
  }

  LWFT_DEVICE HeadGroup group_at(const AttentionBackward& p, int turn) const {
    const int of_batch = batch + (turn == 0 ? 0 : turn / steps);
    return HeadGroup(p.shape, p.rule, of_batch * static_cast<int>(p.shape.kv_heads) + kv_head);
  }
  LWFT_DEVICE int row_at(int turn) const { return first_row + turn % steps * kStep; }

  LWFT_DEVICE KeyTile tile(const AttentionBackward& p, const HeadGroup& group, int row) const {
    if (prefix) return {true, first + kTile > count, first, count, first};
    const KeyRange top = group.visible(row), bottom = group.visible(minimum(row + kStep, group.rows) - 1);
    return {false, first < bottom.begin || first + kTile > top.end, first, group.key_end,
            static_cast<int>(p.shape.prefix) + first};
  }
};

template <class T, int D>
LWFT_KERNEL(kThreads)
attention_dkv_kernel(AttentionBackward p, AttentionBackwardPlan plan, bool prefix) {
  T* const keys = reinterpret_cast<T*>(shared_memory());
  T* const values = keys + kOwnedElements<D>;
  T* const stages = values + kOwnedElements<D>;
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const OwnedKeys owned(p, plan, prefix);
  const bool dk_wanted = prefix ? p.dprefix_k != nullptr : p.dk.data != nullptr;
  const bool dv_wanted = prefix ? p.dprefix_v != nullptr : p.dv.data != nullptr;

  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  const auto load = [&](int i, T* stage) {
    const HeadGroup group = owned.group_at(p, owned.begin + i);
    const int row = owned.row_at(owned.begin + i);
    copy_queries<kThreads, kStep, D>(stage, group, p.q, row);
    copy_queries<kThreads, kStep, D>(stage + kStageTile<D>, group, p.grad_out, row);
    RowState* const states = reinterpret_cast<RowState*>(stage + 2 * kStageTile<D>);
    for (int r = thread_index(); r < kStep; r += kThreads) states[r] = row_state(p, plan, group, row + r);
    if (dropout.active()) {
      const int column = owned.first + (prefix ? 0 : static_cast<int>(p.shape.prefix));
      draw_block<kStep>(group, dropout, row, column, reinterpret_cast<uint8_t*>(states + kStep));
    }
  };
  const auto use = [&](int i, const T* stage) {
    const T* const grad_out = stage + kStageTile<D>;
    const RowState* const states = reinterpret_cast<const RowState*>(stage + 2 * kStageTile<D>);
    const uint8_t* const keep = reinterpret_cast<const uint8_t*>(states + kStep);
    const KeyTile tile = owned.tile(p, owned.group_at(p, owned.begin + i), owned.row_at(owned.begin + i));
    float products[kStep / 8][4] = {}, dweights[kStep / 8][4] = {};
    multiply_tiles<T, D, kStep>(keys, stage, products, values, grad_out, dweights);
    for_elements<kStep>([&](int key, int r, int n, int e) {
      const bool is_kept = !dropout.active() || kept(keep, r, key);
      const Gradients gradients =
          gradients_of<T>(p, plan, states[r], tile, tile.start + key, products[n][e], dweights[n][e], is_kept);
      products[n][e] = gradients.dropped;
      dweights[n][e] = gradients.dproduct;
    });
    if (dv_wanted) multiply_by_tile<T, D, kStep>(products, grad_out, dv);
    if (dk_wanted) multiply_by_tile<T, D, kStep>(dweights, stage, dk);
  };
  if (owned.begin < owned.end) {
    const HeadGroup group = owned.group_at(p, 0);
    const KeyHead<T> head(p, group, prefix);
    const KeyTile tile = owned.tile(p, group, 0);
    copy_keys<kThreads, kTile, D>(keys, group, tile, head.k, head.k_stride);
    copy_keys<kThreads, kTile, D>(values, group, tile, head.v, head.v_stride);
    for_chunks(owned.end - owned.begin, stages, kStageElements<D>, load, use);
  }

  if (!prefix) {
    const auto store = [&](const StridedOut& out, const float (&acc)[D / 8][4], float factor) {
      T* const to = static_cast<T*>(out.data) + owned.batch * out.stride[0] + owned.kv_head * out.stride[1];
      store_rows<T, D>(acc, factor, p.shape.head_dim, [&](int r) {
        const int key = owned.first + r;
        return key >= 0 && key < owned.count ? to + key * out.stride[2] : nullptr;
      });
    };
    if (dk_wanted) store(p.dk, dk, plan.scale);
    if (dv_wanted) store(p.dv, dv, plan.keep_scale);
    return;
  }
  const int64_t head = (owned.part * p.prefix_batch + owned.batch) * p.shape.kv_heads + owned.kv_head;
  for_elements<D>([&](int r, int column, int n, int e) {
    if (owned.first + r >= owned.count || column >= p.shape.head_dim) return;
    const int64_t to = (head * p.shape.prefix + owned.first + r) * p.shape.head_dim + column;
    if (dk_wanted) plan.dprefix_k[to] = dk[n][e] * plan.scale;
    if (dv_wanted) plan.dprefix_v[to] = dv[n][e] * plan.keep_scale;
  });
}

struct Instance {
  DType dtype;
  int largest_head_dim;
  size_t shared_bytes;
  void (*dkv)(AttentionBackward, AttentionBackwardPlan, bool);
};

template <class T, int D>
constexpr Instance instance(DType dtype) {
  return {dtype, D, kSharedBytes<D>, attention_dkv_kernel<T, D>};
}

const Instance kInstances[] = {
    instance<BFloat16, 64>(DType::bf16),
    instance<BFloat16, 128>(DType::bf16),
    instance<Float16, 64>(DType::f16),
    instance<Float16, 128>(DType::f16),
};

}  // namespace

int attention_dkv_cuda(const AttentionBackward& p, const AttentionBackwardPlan& plan, void* stream) {
  const Instance& instance = instance_for(kInstances, p.shape);
  for (bool prefix : {false, true}) {
    const bool wanted = prefix ? p.dprefix_k || p.dprefix_v : p.dk.data || p.dv.data;
    const int64_t members = prefix ? plan.prefix_parts * p.prefix_batch : p.shape.batch;
    const int64_t blocks = members * p.shape.kv_heads * (prefix ? plan.prefix_tiles : plan.key_tiles);
    if (!wanted || blocks == 0) continue;
    const int error =
        launch(instance.dkv, static_cast<int>(blocks), kThreads, instance.shared_bytes, stream, p, plan, prefix);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace lwft::cuda
