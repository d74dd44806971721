// The attention forward for few rows before many keys (decoding), on tensor cores. What counts there is that every
// multiprocessor reads keys all the time, so the keys are cut into parts with a block each (Flash-Decoding, Dao et al.
// 2023). A block has 16 rows of one key head, all of its query heads among them, and its warps take 16 keys each of a tile
// that streams through shared memory. The warps' softmax states are merged in shared memory, those of the parts by a
// second kernel, both in a fixed order.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include <algorithm>

#include "attention/attention_forward_cuda.cuh"

namespace lwft::cuda {
namespace {

constexpr int kRows = 16, kWarpKeys = 16;
constexpr int kMergeWarps = 4, kMergeThreads = kMergeWarps * kWarpLanes;
// Up to so many rows of a key head, where there are fewer such heads than an H200 has multiprocessors, tiles of 16 rows
// and parts of the keys give more blocks than the larger tiles of attention_cuda.cu. By shape and not by card, so that
// sums have one order everywhere.
constexpr int64_t kFewRows = 64, kFewGroups = 132;
constexpr int64_t kBlocks = 264, kFewestKeysOfAPart = 512, kMostParts = 64;

// How the work is cut.
struct Plan {
  int64_t rows, groups, row_tiles, parts, all_rows;

  explicit Plan(const AttentionForward& p) {
    const AttentionShape& s = p.shape;
    rows = s.heads / s.kv_heads * s.queries;
    groups = s.batch * s.kv_heads;
    row_tiles = (rows + kRows - 1) / kRows;
    all_rows = s.batch * s.heads * s.queries;
    int64_t keys = s.keys;
    const int64_t window = p.rule.window, reach = p.rule.causal ? 1 : 2;
    if (window > 0 && window < keys && window * reach + s.queries < keys) keys = window * reach + s.queries;
    parts = std::max<int64_t>(
        1, std::min({kMostParts, kBlocks / (groups * row_tiles), (keys + s.prefix) / kFewestKeysOfAPart}));
  }
  // of workspace: Partial
  int64_t floats(int64_t head_dim) const { return parts == 1 ? 0 : parts * all_rows * (head_dim + 2); }
};

// Sum of weights * v, highest score and sum of weights of a part of a row.
struct Partial {
  float *sums, *highest, *total;

  LWFT_DEVICE Partial(const AttentionForward& p, int64_t all_rows, int64_t parts, int64_t part, int64_t row) {
    const int64_t d = p.shape.head_dim, at = part * all_rows + row;
    float* workspace = static_cast<float*>(p.workspace);
    sums = workspace + at * d;
    highest = workspace + parts * all_rows * d + at;
    total = highest + parts * all_rows;
  }
};

// So many blocks fit the shared memory of an H200's multiprocessor.
template <int D>
constexpr int kResident = D == 64    ? 4
                          : D == 128 ? 3
                                     : 2;

template <class T, int D, int KeyWarps>
LWFT_KERNEL(KeyWarps* kWarpLanes, kResident<D>)
attention_decode_kernel(AttentionForward p, int row_tiles, int parts) {
  constexpr int kThreads = KeyWarps * kWarpLanes, kKeys = KeyWarps * kWarpKeys, kStride = D + kPad;
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const int part = block_index() % parts, tile = block_index() / parts % row_tiles, first_row = tile * kRows;
  const HeadGroup group(p.shape, p.rule, block_index() / parts / row_tiles);
  const KeyTiles<kKeys> tiles(group, first_row, minimum(first_row + kRows, group.rows) - 1);
  const int each = (tiles.count + parts - 1) / parts, begin = part * each, end = minimum(begin + each, tiles.count);
  T* q = reinterpret_cast<T*>(shared_memory());
  T* stages = q + kRows * kStride;
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const float unit = score_unit(p.rule);
  SoftmaxRows<1, D> state;
  if (begin < end) {
    copy_queries<kThreads, kRows, D>(q, group, p.q, first_row);  // lands with the first tile
    for_key_tiles<kThreads, T, kKeys, D>(p, group, tiles, begin, end, stages,
                                         [&](const KeyTile& keys, const T* k, const T* v) {
                                           const int first = warp * kWarpKeys;
                                           attend<T, 1, kWarpKeys, D>(group, dropout, keys, first_row, first, q,
                                                                      k + first * kStride, v + first * kStride, state);
                                         });
  }
  state.finish();

  // The stages are free by now. Of each warp: highest and total of the rows, then its sums, scaled to the highest of all.
  float* highests = reinterpret_cast<float*>(stages);
  float* totals = highests + KeyWarps * kRows;
  float* sums = totals + KeyWarps * kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    if (lane % 4 == 0) highests[warp * kRows + r] = state.highest[0][half];
  }
  block_barrier();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    float highest = highests[r];
#pragma unroll
    for (int w = 1; w < KeyWarps; ++w) highest = fmaxf(highest, highests[w * kRows + r]);
    const float factor = exp2_fast((state.highest[0][half] - shift_of(highest)) * unit);
    if (lane % 4 == 0) totals[warp * kRows + r] = state.total[0][half] * factor;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums[(warp * kRows + r) * kStride + d * 8 + lane % 4 * 2 + e] = state.out[0][d][2 * half + e] * factor;
      }
    }
  }
  block_barrier();
  // A warp has rows of its own, so that a row's statistics are read once.
  for (int r = warp; r < kRows && first_row + r < group.rows; r += KeyWarps) {
    float highest = highests[r], total = totals[r];
#pragma unroll
    for (int w = 1; w < KeyWarps; ++w) {
      highest = fmaxf(highest, highests[w * kRows + r]);
      total += totals[w * kRows + r];
    }
    const int64_t index = group.index(first_row + r);
    const auto sum_of = [&](int64_t d) {
      float sum = sums[r * kStride + d];
#pragma unroll
      for (int w = 1; w < KeyWarps; ++w) sum += sums[(w * kRows + r) * kStride + d];
      return sum;
    };
    if (parts > 1) {
      const Partial partial(p, p.shape.batch * p.shape.heads * p.shape.queries, parts, part, index);
      for (int64_t d = lane; d < p.shape.head_dim; d += kWarpLanes) partial.sums[d] = sum_of(d);
      if (lane == 0) {
        *partial.highest = highest;
        *partial.total = total;
      }
    } else {
      const float inverse = inverse_of(total, dropout);
      T* out = static_cast<T*>(p.out.data) + group.offset(p.out.stride, first_row + r);
      for (int64_t d = lane; d < p.shape.head_dim; d += kWarpLanes) out[d] = from_float<T>(sum_of(d) * inverse);
      if (lane == 0) static_cast<float*>(p.lse)[index] = log_sum_exp(highest, total, unit);
    }
  }
}

// A warp per row: weights exp(highest of the part - highest of all), the parts in order.
template <class T>
LWFT_KERNEL(kMergeThreads)
attention_merge_kernel(AttentionForward p, int parts) {
  const int lane = thread_index() % kWarpLanes;
  const AttentionShape& s = p.shape;
  const int64_t all_rows = s.batch * s.heads * s.queries;
  const int64_t row = static_cast<int64_t>(block_index()) * kMergeWarps + thread_index() / kWarpLanes;
  if (row >= all_rows) return;
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const float unit = score_unit(p.rule);
  float highest = -INFINITY;
  for (int part = 0; part < parts; ++part) {
    highest = fmaxf(highest, *Partial(p, all_rows, parts, part, row).highest);
  }
  constexpr int kColumns = 256 / kWarpLanes;
  float total = 0.0f, sums[kColumns] = {};
  for (int part = 0; part < parts; ++part) {
    const Partial partial(p, all_rows, parts, part, row);
    const float factor = exp2_fast((*partial.highest - shift_of(highest)) * unit);
    total += *partial.total * factor;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (lane + i * kWarpLanes < s.head_dim) sums[i] += partial.sums[lane + i * kWarpLanes] * factor;
    }
  }
  const int64_t batch = row / (s.heads * s.queries), head = row / s.queries % s.heads, query = row % s.queries;
  T* out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + head * p.out.stride[1] + query * p.out.stride[2];
  const float inverse = inverse_of(total, dropout);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (lane + i * kWarpLanes < s.head_dim) out[lane + i * kWarpLanes] = from_float<T>(sums[i] * inverse);
  }
  if (lane == 0) static_cast<float*>(p.lse)[row] = log_sum_exp(highest, total, unit);
}

struct Instance {
  DType dtype;
  int largest_head, threads;
  size_t shared_bytes;
  void (*kernel)(AttentionForward, int, int);
  void (*merge)(AttentionForward, int);
};

template <class T, int D, int KeyWarps>
constexpr Instance instance(DType dtype) {
  constexpr size_t kStages = kStagesBytes<KeyWarps * kWarpKeys, D>;
  static_assert(KeyWarps * kRows * (D + kPad + 2) * sizeof(float) <= kStages, "the warps' states lie in the stages");
  constexpr size_t kBytes = kRows * (D + kPad) * sizeof(uint16_t) + kStages;
  return {dtype, D, KeyWarps * kWarpLanes, kBytes, attention_decode_kernel<T, D, KeyWarps>, attention_merge_kernel<T>};
}

// So many keys in a tile that two blocks fit a multiprocessor of an A100, and one that of a card with 99 KiB.
const Instance kInstances[] = {
    instance<BFloat16, 64, 4>(DType::bf16),  instance<BFloat16, 128, 4>(DType::bf16),
    instance<BFloat16, 256, 2>(DType::bf16), instance<Float16, 64, 4>(DType::f16),
    instance<Float16, 128, 4>(DType::f16),   instance<Float16, 256, 2>(DType::f16),
};

}  // namespace

bool few_rows(const AttentionForward& p) {
  const Plan plan(p);
  return plan.rows <= kRows || (plan.rows <= kFewRows && plan.groups < kFewGroups);
}

int64_t decode_workspace(const AttentionForward& p) {
  const AttentionShape& s = p.shape;
  if (s.batch * s.heads * s.queries == 0 || !few_rows(p)) return 0;
  return Plan(p).floats(s.head_dim);
}

int decode_cuda(const AttentionForward& p, void* stream) {
  const Plan plan(p);
  for (const Instance& instance : kInstances) {
    if (instance.dtype != p.shape.dtype || p.shape.head_dim > instance.largest_head) continue;
    const int parts = static_cast<int>(plan.parts), blocks = static_cast<int>(plan.groups * plan.row_tiles * parts);
    const int error = launch(instance.kernel, blocks, instance.threads, instance.shared_bytes, stream, p,
                             static_cast<int>(plan.row_tiles), parts);
    if (error != 0 || parts == 1) return error;
    const int64_t merge_blocks = (plan.all_rows + kMergeWarps - 1) / kMergeWarps;
    return launch(instance.merge, static_cast<int>(merge_blocks), kMergeThreads, 0, stream, p, parts);
  }
  return 1;  // cudaErrorInvalidValue; attention_cuda_declines has said why
}

}  // namespace lwft::cuda
