// Blocks that own 64 rows of a group of heads: dQ = scale * dR K, and the statistics of rows where they are taken from all
// their scores.
#include "attention/attention_backward_cuda.cuh"

namespace lwft::cuda {
namespace {

// Shared memory: Q and dO; stages of K and V; what dropout keeps, of two groups of 64 columns.
template <int D>
constexpr int kStageElements = 2 * kStep * (D + kPad);
template <int D>
constexpr size_t kSharedBytes =
    (2 * kOwnedElements<D> + kStages * kStageElements<D>)*sizeof(uint16_t) + 2 * kTile * kKeepBytes;

struct OwnedRows {
  HeadGroup group;
  int first;
};

// Neighbouring blocks share a group and thus its keys; where attention is causal, the longest begin first.
LWFT_DEVICE OwnedRows rows_of_block(const AttentionBackward& p, const AttentionBackwardPlan& plan) {
  int tile = block_index() % plan.row_tiles;
  if (p.rule.causal) tile = plan.row_tiles - 1 - tile;
  return {HeadGroup(p.shape, p.rule, block_index() / plan.row_tiles), tile * kTile};
}

// use(tile, its S products, its dP, keep, column of its first key in keep, K in shared memory) for each tile of the prefix
// and of the keys that any of the rows sees; keep is null without dropout.
template <class T, int D, class Use>
LWFT_DEVICE void for_key_tiles(const AttentionBackward& p, const OwnedRows& rows, const Use& use) {
  T* const q = reinterpret_cast<T*>(shared_memory());
  T* const grad_out = q + kOwnedElements<D>;
  T* const stages = grad_out + kOwnedElements<D>;
  uint8_t* const keep = reinterpret_cast<uint8_t*>(stages + kStages * kStageElements<D>);
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const HeadGroup& group = rows.group;
  const KeyTiles<kStep> tiles(group, rows.first, minimum(rows.first + kTile, group.rows) - 1);
  if (tiles.count == 0) return;

  // Groups of 64 columns of the random stream, numbered as they are met: two neighbouring tiles never need three.
  const auto number_of = [&](int i) {
    const int column = tiles[i].first_column / kTile;
    if (i < tiles.prefix_tiles) return column;
    return (tiles.prefix + kTile - 1) / kTile + column - (tiles.prefix + tiles.start) / kTile;
  };
  const auto keep_of = [&](int i) { return keep + number_of(i) % 2 * kTile * kKeepBytes; };

  copy_queries<kThreads, kTile, D>(q, group, p.q, rows.first);
  copy_queries<kThreads, kTile, D>(grad_out, group, p.grad_out, rows.first);
  const auto load = [&](int i, T* stage) {
    const KeyTile tile = tiles[i];
    const KeyHead<T> head(p, group, tile.prefix);
    copy_keys<kThreads, kStep, D>(stage, group, tile, head.k, head.k_stride);
    copy_keys<kThreads, kStep, D>(stage + kStep * (D + kPad), group, tile, head.v, head.v_stride);
    if (dropout.active() && (i == 0 || number_of(i) != number_of(i - 1))) {
      draw_block<kTile>(group, dropout, rows.first, tile.first_column, keep_of(i));
    }
  };
  for_chunks(tiles.count, stages, kStageElements<D>, load, [&](int i, const T* stage) {
    float products[kStep / 8][4] = {}, dweights[kStep / 8][4] = {};
    multiply_tiles<T, D, kStep>(q, stage, products, grad_out, stage + kStep * (D + kPad), dweights);
    use(tiles[i], products, dweights, dropout.active() ? keep_of(i) : nullptr, stage);
  });
}

// The two rows that this lane holds. Taken for each tile anew: that is cheap beside a tile, and held through the products
// they would take registers that there are not.
struct LaneRows {
  RowState state[2];

  LWFT_DEVICE LaneRows(const AttentionBackward& p, const AttentionBackwardPlan& plan, const OwnedRows& rows) {
    const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
    const int first = anew(rows.first) + warp * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) state[half] = row_state(p, plan, rows.group, first + half * 8);
  }
};

LWFT_DEVICE bool is_kept(const uint8_t* keep, const KeyTile& tile, int row, int column) {
  return keep == nullptr || kept(keep, row, tile.first_column % kTile + column);
}

// Statistics of rows from all their scores and dP, in place of those from lse and out, whose rounding errors are not those
// of the dP that delta is subtracted from. Mostly that does not matter. It does where few keys or rows weigh much, and
// where a bias is so large (a whole row of -3.4e38, say) that lse = highest + log(total) has lost the total.
constexpr float kLseTooLarge = 1e5f;

template <class T, int D>
LWFT_KERNEL(kThreads)
attention_exact_kernel(AttentionBackward p, AttentionBackwardPlan plan) {
  const OwnedRows rows = rows_of_block(p, plan);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  if (!plan.exact) {
    bool lost = false;  // each warp looks at all rows, so that all come to one answer
    for (int r = lane; r < kTile; r += kWarpLanes) {
      const float lse = row_state(p, plan, rows.group, rows.first + r).shift;
      lost = lost || (fabsf(lse) > kLseTooLarge && fabsf(lse) < INFINITY);
    }
    if (warp_sum(lost ? 1.0f : 0.0f) == 0.0f) return;
    block_barrier();  // nobody writes what others still look at
  }
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, products[2] = {0.0f, 0.0f};
  for_key_tiles<T, D>(
      p, rows,
      [&](const KeyTile& tile, float (&x)[kStep / 8][4], float (&dweights)[kStep / 8][4], const uint8_t* keep,
          const T*) {
        const LaneRows lane_rows(p, plan, rows);
        float most[2] = {highest[0], highest[1]};
        for_elements<kStep>([&](int, int column, int n, int e) {
          float slope;
          x[n][e] = score_of<T>(p, plan, lane_rows.state[e / 2], tile, tile.start + column, x[n][e], slope);
          most[e / 2] = fmaxf(most[e / 2], x[n][e]);
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // over the 4 lanes that hold a row
          most[half] = fmaxf(most[half], shuffle_xor(most[half], 1));
          most[half] = fmaxf(most[half], shuffle_xor(most[half], 2));
          const float factor = highest[half] == -INFINITY ? 0.0f : exp2_fast((highest[half] - most[half]) * kLog2e);
          highest[half] = most[half];
          total[half] *= factor;
          products[half] *= factor;
        }
        for_elements<kStep>([&](int r, int column, int n, int e) {
          const float weight = x[n][e] == -INFINITY ? 0.0f : exp2_fast((x[n][e] - highest[e / 2]) * kLog2e);
          total[e / 2] += weight;
          if (is_kept(keep, tile, r, column)) products[e / 2] += weight * plan.keep_scale * dweights[n][e];
        });
      });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      total[half] += shuffle_xor(total[half], mask);
      products[half] += shuffle_xor(products[half], mask);
    }
    const int row = rows.first + warp * 16 + lane / 4 + half * 8;
    if (lane % 4 != 0 || row >= rows.group.rows) continue;
    const int64_t index = rows.group.index(row);
    const bool nothing = total[half] == 0.0f;
    const float grad_lse = p.grad_lse == nullptr ? 0.0f : static_cast<const float*>(p.grad_lse)[index];
    plan.shift[index] = nothing ? INFINITY : highest[half];
    plan.factor[index] = nothing ? 0.0f : 1.0f / total[half];
    plan.delta[index] = nothing ? 0.0f : products[half] / total[half] - grad_lse;
  }
}

template <class T, int D>
LWFT_KERNEL(kThreads)
attention_dq_kernel(AttentionBackward p, AttentionBackwardPlan plan) {
  const OwnedRows rows = rows_of_block(p, plan);
  float dq[D / 8][4] = {};
  for_key_tiles<T, D>(p, rows,
                      [&](const KeyTile& tile, float (&x)[kStep / 8][4], float (&dweights)[kStep / 8][4],
                          const uint8_t* keep, const T* keys) {
                        const LaneRows lane_rows(p, plan, rows);
                        for_elements<kStep>([&](int r, int column, int n, int e) {
                          x[n][e] = gradients_of<T>(p, plan, lane_rows.state[e / 2], tile, tile.start + column, x[n][e],
                                                    dweights[n][e], is_kept(keep, tile, r, column))
                                        .dproduct;
                        });
                        multiply_by_tile<T, D, kStep>(x, keys, dq);
                      });
  store_rows<T, D>(dq, plan.scale, p.shape.head_dim, [&](int r) {
    const int row = rows.first + r;
    return row < rows.group.rows ? static_cast<T*>(p.dq.data) + rows.group.offset(p.dq.stride, row) : nullptr;
  });
}

struct Instance {
  DType dtype;
  int largest_head_dim;
  size_t shared_bytes;
  void (*exact)(AttentionBackward, AttentionBackwardPlan);
  void (*dq)(AttentionBackward, AttentionBackwardPlan);
};

template <class T, int D>
constexpr Instance instance(DType dtype) {
  return {dtype, D, kSharedBytes<D>, attention_exact_kernel<T, D>, attention_dq_kernel<T, D>};
}

const Instance kInstances[] = {
    instance<BFloat16, 64>(DType::bf16),
    instance<BFloat16, 128>(DType::bf16),
    instance<Float16, 64>(DType::f16),
    instance<Float16, 128>(DType::f16),
};

}  // namespace

int attention_dq_cuda(const AttentionBackward& p, const AttentionBackwardPlan& plan, void* stream) {
  const Instance& instance = instance_for(kInstances, p.shape);
  const int blocks = static_cast<int>(plan.groups * plan.row_tiles);
  if (blocks == 0) return 0;
  if (plan.exact || p.rule.bias.data != nullptr) {
    const int error = launch(instance.exact, blocks, kThreads, instance.shared_bytes, stream, p, plan);
    if (error != 0) return error;
  }
  if (p.dq.data == nullptr) return 0;
  return launch(instance.dq, blocks, kThreads, instance.shared_bytes, stream, p, plan);
}

}  // namespace lwft::cuda
