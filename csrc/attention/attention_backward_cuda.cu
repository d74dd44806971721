// The attention backward on tensor cores, bf16 and fp16, sm_80 and later (FlashAttention-2, Dao 2023, algorithm 2; the
// formulas are in lwft_kernels/attention/autograd.py): how the work is cut, the statistics of rows, and the sums of parts.
// What is summed by blocks stands in attention_{dq,dkv,dbias}_cuda.cu.
#include <utility>

#include "attention/attention_backward_cuda.cuh"

namespace lwft::cuda {
namespace {

// Rows of a group that are few enough for one to weigh much; keys likewise.
constexpr int64_t kFewRows = 8, kFewKeys = 32;

constexpr int kRowLanes = 16;  // of a warp, for a row of up to 128 elements
constexpr int kRowsOfBlock = kThreads / kRowLanes;
constexpr int64_t kLargestHeadDim = 8 * kRowLanes;

constexpr int tiles_of(int64_t count) { return static_cast<int>((count + kTile - 1) / kTile); }
constexpr int64_t at_least_1(int64_t count) { return count > 1 ? count : 1; }
// So many parts that there are enough blocks, but none without a turn.
int64_t parts_of(int64_t blocks, int64_t turns) {
  const int64_t wanted = (kEnoughBlocks + at_least_1(blocks) - 1) / at_least_1(blocks);
  return at_least_1(wanted < turns ? wanted : turns);
}

// delta = rowsum(dO * O) - dlse; shift = lse, or infinity for a row that sees nothing: then P = 0.
template <class T>
LWFT_KERNEL(kThreads)
attention_statistics_kernel(AttentionBackward p, AttentionBackwardPlan plan) {
  const AttentionShape& s = p.shape;
  const int lane = thread_index() % kRowLanes;
  const int64_t row = static_cast<int64_t>(block_index()) * kRowsOfBlock + thread_index() / kRowLanes;
  const bool inside = row < s.batch * s.heads * s.queries;
  float total = 0.0f;
  if (inside && lane * 8 < s.head_dim) {
    const int64_t batch = row / s.queries / s.heads, head = row / s.queries % s.heads, query = row % s.queries;
    const auto load_part = [&](const Strided& tensor, float (&to)[8]) {
      const int64_t at = batch * tensor.stride[0] + head * tensor.stride[1] + query * tensor.stride[2];
      load(static_cast<const T*>(tensor.data) + at + lane * 8, to);
    };
    float grad_out[8], out[8];
    load_part(p.grad_out, grad_out);
    load_part(p.out, out);
#pragma unroll
    for (int e = 0; e < 8; ++e) total += grad_out[e] * out[e];
  }
#pragma unroll
  for (int mask = kRowLanes / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (!inside || lane != 0) return;
  const float lse = static_cast<const float*>(p.lse)[row];
  const bool nothing = lse == -INFINITY;
  const float grad_lse = p.grad_lse == nullptr ? 0.0f : static_cast<const float*>(p.grad_lse)[row];
  plan.shift[row] = nothing ? INFINITY : lse;
  plan.factor[row] = nothing ? 0.0f : 1.0f;
  plan.delta[row] = nothing ? 0.0f : total - grad_lse;
}

// (parts, count) summed in the order of the parts.
template <class T>
LWFT_KERNEL(kThreads)
attention_sum_kernel(const float* from, int64_t count, int64_t parts, T* to) {
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (i >= count) return;
  float total = 0.0f;
  for (int64_t part = 0; part < parts; ++part) total += from[part * count + i];
  to[i] = from_float<T>(total);
}

template <class T>
int sum_as(const float* from, int64_t count, int64_t parts, void* to, void* stream) {
  const auto blocks = static_cast<int>((count + kThreads - 1) / kThreads);
  if (blocks == 0) return 0;
  return launch(attention_sum_kernel<T>, blocks, kThreads, 0, stream, from, count, parts, static_cast<T*>(to));
}

int sum_parts(DType dtype, const float* from, int64_t count, int64_t parts, void* to, void* stream) {
  const auto sum = dtype == DType::f32 ? sum_as<float> : dtype == DType::bf16 ? sum_as<BFloat16> : sum_as<Float16>;
  return sum(from, count, parts, to, stream);
}

int64_t prefix_elements(const AttentionBackward& p) {
  return p.prefix_batch * p.shape.kv_heads * p.shape.prefix * p.shape.head_dim;
}

int statistics_cuda(const AttentionBackward& p, const AttentionBackwardPlan& plan, void* stream) {
  const int64_t rows = p.shape.batch * p.shape.heads * p.shape.queries;
  if (plan.exact || rows == 0) return 0;
  const auto kernel =
      p.shape.dtype == DType::bf16 ? attention_statistics_kernel<BFloat16> : attention_statistics_kernel<Float16>;
  const auto blocks = static_cast<int>((rows + kRowsOfBlock - 1) / kRowsOfBlock);
  return launch(kernel, blocks, kThreads, 0, stream, p, plan);
}

}  // namespace

AttentionBackwardPlan::AttentionBackwardPlan(const AttentionBackward& p) : floats(0) {
  const AttentionShape& s = p.shape;
  const auto take = [&](bool wanted, int64_t count) -> float* {
    const int64_t at = floats;
    if (wanted) floats += count;
    return wanted && p.workspace != nullptr ? static_cast<float*>(p.workspace) + at : nullptr;
  };
  early = p.rule.dropout.active() ? static_cast<int>(s.prefix % kTile) : 0;
  scale = static_cast<float>(p.rule.scale);
  softcap = static_cast<float>(p.rule.softcap);
  inner = softcap > 0.0f ? scale / softcap : scale;
  keep_scale = static_cast<float>(p.rule.dropout.keep_scale);
  groups = s.batch * s.kv_heads;
  const int64_t group_rows = s.kv_heads == 0 ? 0 : s.heads / s.kv_heads * s.queries;
  row_tiles = tiles_of(group_rows);
  key_tiles = s.keys == 0 ? 0 : tiles_of(s.keys + early);
  prefix_tiles = tiles_of(s.prefix);
  // A bias that is the same for all keys: the sum of dS over them is a difference of equals.
  exact = group_rows <= kFewRows || s.prefix + s.keys <= kFewKeys || (p.dbias != nullptr && p.bias_size[3] == 1);
  const int64_t rows = s.batch * s.heads * s.queries;
  shift = take(true, rows);
  factor = take(true, rows);
  delta = take(true, rows);

  const bool shared = p.prefix_batch == 1;
  const int64_t turns = (shared ? s.batch : 1) * ((group_rows + kStep - 1) / kStep);
  prefix_parts = s.batch == 0 ? 0 : static_cast<int>(parts_of(p.prefix_batch * s.kv_heads * prefix_tiles, turns));
  dprefix_k = take(p.dprefix_k != nullptr, prefix_parts * prefix_elements(p));
  dprefix_v = take(p.dprefix_v != nullptr, prefix_parts * prefix_elements(p));

  query_tiles = tiles_of(s.queries);
  own_batch = p.bias_size[0] == s.batch;
  own_head = p.bias_size[1] == s.heads;
  own_rows = p.bias_size[2] == s.queries;
  own_keys = p.bias_size[3] == s.keys;
  const int64_t sizes[] = {s.batch, s.heads, query_tiles, key_tiles};
  const bool own[] = {own_batch, own_head, own_rows, own_keys};
  bias_blocks = bias_elements = 1;
  int64_t bias_turns = 1;
  for (int i = 0; i < 4; ++i) {
    (own[i] ? bias_blocks : bias_turns) *= sizes[i];
    bias_elements *= p.bias_size[i];
  }
  bias_parts = parts_of(bias_blocks, bias_turns);
  dbias = take(p.dbias != nullptr && bias_parts > 1, bias_parts * bias_elements);
}

}  // namespace lwft::cuda

namespace lwft {

const char* attention_cuda_declines(const AttentionBackward& p) {
  if (const char* reason = cuda::inputs_decline(p)) return reason;
  // dK and dV of wider heads do not fit a lane's registers
  if (p.shape.head_dim > cuda::kLargestHeadDim) return "the head size must be at most 128 for the gradients";
  if (!cuda::rows_aligned(p.grad_out) || !cuda::rows_aligned(p.out)) {
    return "the rows of grad_out and out must start at multiples of 16 bytes";
  }
  constexpr int64_t kMost = INT32_MAX;  // blocks of a launch
  const cuda::AttentionBackwardPlan plan(p);
  if (p.shape.batch * p.shape.heads * p.shape.queries > kMost || plan.groups * plan.key_tiles > kMost ||
      p.prefix_batch * p.shape.kv_heads * plan.prefix_tiles > kMost || plan.bias_blocks > kMost) {
    return "there are too many queries or keys in all sequences together";
  }
  return nullptr;
}

int64_t attention_backward_workspace(const AttentionBackward& p) { return cuda::AttentionBackwardPlan(p).floats; }

int attention_backward_cuda(const AttentionBackward& p, void* stream) {
  const cuda::AttentionBackwardPlan plan(p);
  if (const int error = cuda::statistics_cuda(p, plan, stream)) return error;
  if (const int error = cuda::attention_dq_cuda(p, plan, stream)) return error;
  if (const int error = cuda::attention_dkv_cuda(p, plan, stream)) return error;
  for (const auto& [from, to] : {std::pair(plan.dprefix_k, p.dprefix_k), std::pair(plan.dprefix_v, p.dprefix_v)}) {
    if (to == nullptr) continue;
    const int64_t count = cuda::prefix_elements(p);
    if (const int error = cuda::sum_parts(p.shape.dtype, from, count, plan.prefix_parts, to, stream)) return error;
  }
  if (p.dbias == nullptr) return 0;
  if (const int error = cuda::attention_dbias_cuda(p, plan, stream)) return error;
  if (plan.bias_parts == 1) return 0;
  return cuda::sum_parts(p.rule.bias_dtype, plan.dbias, plan.bias_elements, plan.bias_parts, p.dbias, stream);
}

}  // namespace lwft
