// add_layer_norm on a GPU: bound by memory, so each row is read once into registers and written once.
//
// A row belongs to 1, 2, 4 or 8 warps of a block, 1024 columns to each. A lane holds 4 vectors of 8 columns that lie 16
// apart: the columns c, c + 16, c + 32, c + 48 take their dropout draws from one call of Philox (common/philox.h), so a
// lane makes 8 calls for its 32 columns. Two lanes read 32 bytes side by side, a whole sector of the cache.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "norm/norm.h"

#include "common/cuda/dropout.cuh"
#include "common/cuda/row.cuh"

namespace lwft::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpLanes;
constexpr int kVectors = 4, kColumnsOfWarp = kWarpLanes * kVectors * 8;
constexpr int kLargestRow = kWarps * kColumnsOfWarp;
// Blocks of backward, each with partial sums of dweight and dbias: two for each multiprocessor of an H200. By shape and
// not by card, so that the sums have one order everywhere.
constexpr int64_t kBackwardBlocks = 264;

int warps_of_row(int64_t d) {
  int warps = 1;
  while (warps * kColumnsOfWarp < d) warps *= 2;
  return warps;
}

// The part of a row that a lane holds, and the row's warps to sum with.
struct Lane {
  int warps;      // of the row
  int warp;       // of these
  int row;        // of the block's
  int rows;       // of the block
  int column;     // of the first vector; vector v lies at column + 16 v
  float* shared;  // a float per warp of the block

  LWFT_DEVICE Lane(int warps_of_row, float* memory) : warps(warps_of_row), shared(memory) {
    const int lane = thread_index() % kWarpLanes, block_warp = thread_index() / kWarpLanes;
    warp = block_warp % warps;
    row = block_warp / warps;
    rows = kWarps / warps;
    column = warp * kColumnsOfWarp + lane / 2 * 64 + lane % 2 * 8;
  }

  // Over the row; every warp of the block takes part.
  LWFT_DEVICE float sum(float value) const {
    value = warp_sum(value);
    if (warps == 1) return value;
    block_barrier();  // the sums before have been read
    shared[row * warps + warp] = value;
    block_barrier();
    float total = 0.0f;
    for (int i = 0; i < warps; ++i) total += shared[row * warps + i];
    return total;
  }
};

using Values = float[kVectors][8];

template <class T>
LWFT_DEVICE void load_row(const Lane& lane, const T* row, bool inside, int d, Values& to) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (inside && lane.column + 16 * v < d) {
      load(row + lane.column + 16 * v, to[v]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[v][e] = 0.0f;
    }
  }
}

template <class T>
LWFT_DEVICE void store_row(const Lane& lane, T* row, bool inside, int d, const Values& from) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (inside && lane.column + 16 * v < d) store(row + lane.column + 16 * v, from[v]);
  }
}

// A parameter vector of T or float32; `missing` where it is null.
template <class T>
LWFT_DEVICE void load_parameter(const Lane& lane, const void* parameter, bool is_float, float missing, int d,
                                Values& to) {
  if (parameter == nullptr) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[v][e] = missing;
    }
  } else if (is_float) {
    load_row(lane, static_cast<const float*>(parameter), true, d, to);
  } else {
    load_row(lane, static_cast<const T*>(parameter), true, d, to);
  }
}

// Bit 8 v + e is set when element e of vector v is kept.
LWFT_DEVICE uint32_t kept(const Lane& lane, const Dropout& dropout, int64_t row) {
  if (!dropout.active()) return 0xFFFFFFFFu;
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int column = lane.column + e;
    const PhiloxWords words =
        philox4x32_10(static_cast<uint32_t>(column / kPhiloxColumns * kPhiloxLanes + column % kPhiloxLanes),
                      static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                      static_cast<uint32_t>(dropout.offset), static_cast<uint32_t>(dropout.seed),
                      static_cast<uint32_t>(dropout.seed >> 32));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) bits |= static_cast<uint32_t>(words.word[v] >= dropout.threshold) << (8 * v + e);
  }
  return bits;
}

LWFT_DEVICE void drop(uint32_t keep, float keep_scale, Values& values) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < 8; ++e) values[v][e] = keep >> (8 * v + e) & 1 ? values[v][e] * keep_scale : 0.0f;
  }
}

// x + dropout(u) of a row, and what is kept.
template <class T, class P>
LWFT_DEVICE uint32_t residual_sum(const Lane& lane, const P& p, const Dropout& dropout, int64_t row, bool inside,
                                  Values& sum) {
  const int d = static_cast<int>(p.model_dim);
  Values added;
  load_row(lane, static_cast<const T*>(p.x) + row * p.x_row_stride, inside, d, sum);
  load_row(lane, static_cast<const T*>(p.sublayer_out) + row * p.sublayer_row_stride, inside, d, added);
  const uint32_t keep = kept(lane, dropout, row);
  if (dropout.active()) drop(keep, static_cast<float>(dropout.keep_scale), added);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[v][e] += added[v][e];
  }
  return keep;
}

template <class T>
LWFT_KERNEL(kThreads)
add_layer_norm_forward_kernel(AddLayerNormForward p, int warps) {
  const Lane lane(warps, reinterpret_cast<float*>(shared_memory()));
  const int64_t row = static_cast<int64_t>(block_index()) * lane.rows + lane.row;
  const bool inside = row < p.tokens;
  const int d = static_cast<int>(p.model_dim);
  const float inverse_width = 1.0f / static_cast<float>(d);
  Values s;
  residual_sum<T>(lane, p, device_dropout(p.dropout, p.device_seed), row, inside, s);

  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += s[v][e];
  }
  const float mean = lane.sum(sum) * inverse_width;
  // The variance of deviations, from registers: not a difference of large sums.
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (lane.column + 16 * v < d) {
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += (s[v][e] - mean) * (s[v][e] - mean);
    }
  }
  const float rstd = 1.0f / sqrtf(lane.sum(squares) * inverse_width + static_cast<float>(p.eps));

  Values weight, bias;
  load_parameter<T>(lane, p.weight, p.param_dtype == DType::f32, 1.0f, d, weight);
  load_parameter<T>(lane, p.bias, p.param_dtype == DType::f32, 0.0f, d, bias);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < 8; ++e) s[v][e] = (s[v][e] - mean) * rstd * weight[v][e] + bias[v][e];
  }
  store_row(lane, static_cast<T*>(p.out) + row * p.model_dim, inside, d, s);
  if (inside && lane.warp == 0 && thread_index() % kWarpLanes == 0) {
    static_cast<float*>(p.mean)[row] = mean;
    static_cast<float*>(p.rstd)[row] = rstd;
  }
}

// The sums of the block's rows in their order, by the first of them, to row block_index() of `partials`.
LWFT_DEVICE void store_partial(const Lane& lane, float* partials, int d, const Values& sum) {
  float* staged = lane.shared + kWarps;  // (rows, warps * kColumnsOfWarp)
  const int width = lane.warps * kColumnsOfWarp;
  block_barrier();  // what was staged before has been read
#pragma unroll
  for (int v = 0; v < kVectors; ++v) store(staged + lane.row * width + lane.column + 16 * v, sum[v]);
  block_barrier();
  for (int column = thread_index(); column < d; column += kThreads) {
    float total = 0.0f;
    for (int row = 0; row < lane.rows; ++row) total += staged[row * width + column];
    partials[static_cast<int64_t>(block_index()) * d + column] = total;
  }
}

// n = (s - mean) rstd, g = grad_out weight: ds = rstd (g - mean(g) - n mean(g n)), dx = ds, du = mask ds.
template <class T>
LWFT_KERNEL(kThreads)
add_layer_norm_backward_kernel(AddLayerNormBackward p, int warps, int64_t blocks) {
  const Lane lane(warps, reinterpret_cast<float*>(shared_memory()));
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const int d = static_cast<int>(p.model_dim);
  const float inverse_width = 1.0f / static_cast<float>(d);
  Values weight_sum = {}, bias_sum = {};
  for (int64_t first = static_cast<int64_t>(block_index()) * lane.rows; first < p.tokens; first += blocks * lane.rows) {
    const int64_t row = first + lane.row;
    const bool inside = row < p.tokens;
    Values grad, s, weight;
    load_row(lane, static_cast<const T*>(p.grad_out) + row * p.grad_out_row_stride, inside, d, grad);
    const uint32_t keep = residual_sum<T>(lane, p, dropout, row, inside, s);
    const float mean = inside ? static_cast<const float*>(p.mean)[row] : 0.0f;
    const float rstd = inside ? static_cast<const float*>(p.rstd)[row] : 0.0f;
    // read again for each row, from the first cache: kept, it would take the registers that the sums need
    load_parameter<T>(lane, p.weight, p.param_dtype == DType::f32, 1.0f, d, weight);
    float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        s[v][e] = (s[v][e] - mean) * rstd;  // n; past the end grad is zero, so it counts nowhere
        weight_sum[v][e] += grad[v][e] * s[v][e];
        bias_sum[v][e] += grad[v][e];
        grad[v][e] *= weight[v][e];
        sum_g += grad[v][e];
        sum_gn += grad[v][e] * s[v][e];
      }
    }
    const float mean_g = lane.sum(sum_g) * inverse_width, mean_gn = lane.sum(sum_gn) * inverse_width;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 8; ++e) s[v][e] = rstd * (grad[v][e] - mean_g - s[v][e] * mean_gn);
    }
    if (p.dx != nullptr) store_row(lane, static_cast<T*>(p.dx) + row * p.model_dim, inside, d, s);
    if (p.dsublayer_out != nullptr) {
      if (dropout.active()) drop(keep, static_cast<float>(dropout.keep_scale), s);
      store_row(lane, static_cast<T*>(p.dsublayer_out) + row * p.model_dim, inside, d, s);
    }
  }
  float* partials = static_cast<float*>(p.workspace);
  if (p.dweight != nullptr) store_partial(lane, partials, d, weight_sum);
  if (p.dbias != nullptr) store_partial(lane, partials + blocks * d, d, bias_sum);
}

// dweight and dbias from the blocks' partial sums, in the order of the blocks.
template <class T>
LWFT_KERNEL(kThreads)
sum_partials_kernel(AddLayerNormBackward p, int64_t blocks) {
  const int64_t column = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (column >= p.model_dim) return;
  void* const results[] = {p.dweight, p.dbias};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (results[i] == nullptr) continue;
    const float* partials = static_cast<const float*>(p.workspace) + i * blocks * p.model_dim;
    float total = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) total += partials[block * p.model_dim + column];
    if (p.param_dtype == DType::f32) {
      static_cast<float*>(results[i])[column] = total;
    } else {
      static_cast<T*>(results[i])[column] = from_float<T>(total);
    }
  }
}

struct Instance {
  DType dtype;
  void (*forward)(AddLayerNormForward, int);
  void (*backward)(AddLayerNormBackward, int, int64_t);
  void (*sum)(AddLayerNormBackward, int64_t);
};

const Instance kInstances[] = {
    {DType::bf16, add_layer_norm_forward_kernel<BFloat16>, add_layer_norm_backward_kernel<BFloat16>,
     sum_partials_kernel<BFloat16>},
    {DType::f16, add_layer_norm_forward_kernel<Float16>, add_layer_norm_backward_kernel<Float16>,
     sum_partials_kernel<Float16>},
    {DType::f32, add_layer_norm_forward_kernel<float>, add_layer_norm_backward_kernel<float>,
     sum_partials_kernel<float>},
};

const Instance* instance_of(DType dtype) {
  for (const Instance& instance : kInstances) {
    if (instance.dtype == dtype) return &instance;
  }
  return nullptr;
}

int64_t backward_blocks(int64_t tokens, int rows) {
  const int64_t needed = (tokens + rows - 1) / rows;
  return needed < kBackwardBlocks ? needed : kBackwardBlocks;
}

template <class P>
const char* declines(const P& p) {
  if (instance_of(p.x_dtype) == nullptr) return "x must be bfloat16, float16 or float32";
  if (p.sublayer_dtype != p.x_dtype) return "x and sublayer_out must have one dtype";
  if (p.model_dim % 8 != 0 || p.model_dim > kLargestRow) return "rows must be a multiple of 8 and at most 8192 wide";
  if (p.x_row_stride % 8 != 0 || p.sublayer_row_stride % 8 != 0) return "rows must start at multiples of 16 bytes";
  if (!aligned(p.x) || !aligned(p.sublayer_out)) return "x and sublayer_out must start at multiples of 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace lwft::cuda

namespace lwft {

const char* add_layer_norm_cuda_declines(const AddLayerNormForward& p) {
  if (const char* reason = cuda::declines(p)) return reason;
  const bool fits = cuda::aligned(p.weight) && cuda::aligned(p.bias);
  return fits ? nullptr : "weight and bias must start at multiples of 16 bytes";
}

const char* add_layer_norm_cuda_declines(const AddLayerNormBackward& p) {
  if (const char* reason = cuda::declines(p)) return reason;
  const bool fits = cuda::aligned(p.weight) && cuda::aligned(p.grad_out) && p.grad_out_row_stride % 8 == 0;
  return fits ? nullptr : "weight and the rows of grad_out must start at multiples of 16 bytes";
}

int add_layer_norm_forward_cuda(const AddLayerNormForward& p, void* stream) {
  if (p.tokens == 0) return 0;
  const int warps = cuda::warps_of_row(p.model_dim), rows = cuda::kWarps / warps;
  const auto blocks = static_cast<int>((p.tokens + rows - 1) / rows);
  return cuda::launch(cuda::instance_of(p.x_dtype)->forward, blocks, cuda::kThreads, cuda::kWarps * sizeof(float),
                      stream, p, warps);
}

int64_t add_layer_norm_backward_workspace(const AddLayerNormBackward& p) {
  const int rows = cuda::kWarps / cuda::warps_of_row(p.model_dim);
  return 2 * cuda::backward_blocks(p.tokens, rows) * p.model_dim;
}

int add_layer_norm_backward_cuda(const AddLayerNormBackward& p, void* stream) {
  const int warps = cuda::warps_of_row(p.model_dim), rows = cuda::kWarps / warps;
  const int64_t blocks = cuda::backward_blocks(p.tokens, rows);
  const cuda::Instance& instance = *cuda::instance_of(p.x_dtype);
  const size_t shared = (cuda::kWarps + cuda::kLargestRow) * sizeof(float);
  if (blocks > 0) {
    const int error =
        cuda::launch(instance.backward, static_cast<int>(blocks), cuda::kThreads, shared, stream, p, warps, blocks);
    if (error != 0) return error;
  }
  if (p.dweight == nullptr && p.dbias == nullptr) return 0;
  const auto columns = static_cast<int>((p.model_dim + cuda::kThreads - 1) / cuda::kThreads);
  return cuda::launch(instance.sum, columns, cuda::kThreads, 0, stream, p, blocks);
}

}  // namespace lwft
