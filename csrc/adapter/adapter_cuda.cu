// The adapter forward on tensor cores, bf16 and fp16, sm_80 and later. One block computes 64 tokens:
//
//     z   = n(x) Wd^T + bd      n = LayerNorm or nothing; z is stored for backward (`hidden`)
//     out = residual + dropout(scale * (act(z) Wu^T + bu))
//
// z stays in registers: the layout in which the tensor core leaves C is, pairwise rounded to 16 bits, the layout in which
// it takes A, so act(z) goes straight into the second product. What streams through shared memory, double buffered by
// asynchronous copies, are chunks of 64 columns: of x and Wd in the first product, rows of Wu in the second. x is read
// once, but for LayerNorm, whose statistics need it before (the second reading comes from the L2 cache).
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "adapter/adapter_cuda.cuh"

namespace lwft::cuda {
namespace {

// Shared memory: mean and rstd of the rows, then the stages. The bottleneck M is a template parameter since z is held in
// M / 2 registers; the largest, 256, takes 91 KiB, within the 99 KiB of sm_86 and sm_120.
template <int M>
constexpr int kStageElements = (kRows + M) * (kChunk + kPad) > kChunk*(M + kPad) ? (kRows + M) * (kChunk + kPad)
                                                                                 : kChunk * (M + kPad);
template <int M>
constexpr size_t kSharedBytes = 2 * kRows * sizeof(float) + kStages * kStageElements<M> * sizeof(uint16_t);

// Mean and 1 / sqrt(variance + eps) of each row, a warp per row; the variance from the deviations, in a second pass.
template <class T>
LWFT_DEVICE void row_statistics(const AdapterForward& p, int64_t first_row, float* mean, float* rstd) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const int width = static_cast<int>(p.model_dim);
  for (int r = warp; r < kRows; r += kWarps) {
    const int64_t row = first_row + r;
    if (row >= p.tokens) break;  // the same for all lanes of the warp
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    float sum = 0.0f;
    for (int c = lane * 8; c < width; c += kWarpLanes * 8) {
      const Vector8<T> v = vector_at(x + c);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += to_float(v.element[e]);
    }
    const float m = warp_sum(sum) / static_cast<float>(width);
    float squares = 0.0f;
    for (int c = lane * 8; c < width; c += kWarpLanes * 8) {
      const Vector8<T> v = vector_at(x + c);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float deviation = to_float(v.element[e]) - m;
        squares += deviation * deviation;
      }
    }
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + static_cast<float>(p.eps));
    if (lane == 0) {
      mean[r] = static_cast<float*>(p.mean)[row] = m;
      rstd[r] = static_cast<float*>(p.rstd)[row] = inverse;
    }
  }
}

// z[M] = n(x) Wd^T for the 16 rows of this warp.
template <class T, int M>
LWFT_DEVICE void down_product(const AdapterForward& p, int64_t first_row, const float* mean, const float* rstd,
                              T* stages, float (&z)[M / 8][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const auto load = [&](int chunk, T* stage) {
    const int64_t column = static_cast<int64_t>(chunk) * kChunk;
    copy_rows<kThreads>(stage, kRows, kChunk, static_cast<const T*>(p.x) + first_row * p.x_row_stride + column,
                        p.x_row_stride, p.tokens - first_row, p.model_dim - column);
    copy_rows<kThreads>(stage + kRows * (kChunk + kPad), M, kChunk, static_cast<const T*>(p.down_weight) + column,
                        p.model_dim, p.bottleneck, p.model_dim - column);
  };
  const auto use = [&](int chunk, T* x) {
    const T* weight = x + kRows * (kChunk + kPad);
    if (p.norm_weight != nullptr) {
      normalise(p, first_row, chunk * kChunk, mean, rstd, x);
      block_barrier();
    }
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, x + (warp * 16 + lane % 16) * (kChunk + kPad) + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < M / 16; ++j) {
        multiply_pair(&z[2 * j], a, weight + j * 16 * (kChunk + kPad) + k, kChunk + kPad);
      }
    }
  };
  for_chunks(static_cast<int>((p.model_dim + kChunk - 1) / kChunk), stages, kStageElements<M>, load, use);
}

// Adds the bias, stores z, and leaves act(z) as A fragments for the second product.
template <class T, int M>
LWFT_DEVICE void activate_hidden(const AdapterForward& p, int64_t first_row, float (&z)[M / 8][4],
                                 uint32_t (&h)[M / 16][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const T* bias = static_cast<const T*>(p.down_bias);
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    const bool inside = column < p.bottleneck;
    if (inside && bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[j][i] += to_float(bias[column + i % 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp * 16 + lane / 4 + half * 8;
      float* pair = &z[j][2 * half];
      if (inside && row < p.tokens) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.hidden) + row * p.bottleneck + column) =
            pack<T>(pair[0], pair[1]);
      }
      h[j / 2][j % 2 * 2 + half] = pack<T>(activate(p.activation, pair[0]), activate(p.activation, pair[1]));
    }
  }
}

// One chunk of 64 columns of out, from its 8 accumulator tiles.
template <class T>
LWFT_DEVICE void store_chunk(const AdapterForward& p, const Dropout& dropout, int64_t first_row, int first_column,
                             const float (&y)[kChunk / 8][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const T* bias = static_cast<const T*>(p.up_bias);
  const T* residual = static_cast<const T*>(p.residual);
  const float scale = static_cast<float>(p.scale), keep_scale = static_cast<float>(dropout.keep_scale);
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
    const int column = first_column + j * 8 + lane % 4 * 2;
    if (column >= p.model_dim) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp * 16 + lane / 4 + half * 8;
      if (row >= p.tokens) continue;
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        value[e] = y[j][2 * half + e];
        if (bias != nullptr) value[e] += to_float(bias[column + e]);
        value[e] *= scale;
        if (dropout.active()) value[e] = dropout_keeps(dropout, row, column + e) ? value[e] * keep_scale : 0.0f;
        if (residual != nullptr) value[e] += to_float(residual[row * p.residual_row_stride + column + e]);
      }
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * p.model_dim + column) = pack<T>(value[0], value[1]);
    }
  }
}

template <class T, int M>
LWFT_DEVICE void up_product(const AdapterForward& p, int64_t first_row, T* stages, const uint32_t (&h)[M / 16][4]) {
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const auto load = [&](int chunk, T* stage) {
    const int64_t row = static_cast<int64_t>(chunk) * kChunk;
    copy_rows<kThreads>(stage, kChunk, M, static_cast<const T*>(p.up_weight) + row * p.bottleneck, p.bottleneck,
                        p.model_dim - row, p.bottleneck);
  };
  const auto use = [&](int chunk, const T* weight) {
    float y[kChunk / 8][4] = {};
#pragma unroll
    for (int k = 0; k < M / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        multiply_pair(&y[2 * j], h[k], weight + j * 16 * (M + kPad) + k * 16, M + kPad);
      }
    }
    store_chunk<T>(p, dropout, first_row, chunk * kChunk, y);
  };
  for_chunks(static_cast<int>((p.model_dim + kChunk - 1) / kChunk), stages, kStageElements<M>, load, use);
}

template <class T, int M>
LWFT_KERNEL(kThreads)
adapter_forward_kernel(AdapterForward p) {
  float* mean = reinterpret_cast<float*>(shared_memory());
  float* rstd = mean + kRows;
  T* stages = reinterpret_cast<T*>(rstd + kRows);
  const int64_t first_row = static_cast<int64_t>(block_index()) * kRows;
  // seen by the others after the barrier that follows the first copy
  if (p.norm_weight != nullptr) row_statistics<T>(p, first_row, mean, rstd);
  float z[M / 8][4] = {};
  down_product<T, M>(p, first_row, mean, rstd, stages, z);
  uint32_t h[M / 16][4];
  activate_hidden<T, M>(p, first_row, z, h);
  up_product<T, M>(p, first_row, stages, h);
}

struct Instance {
  DType dtype;
  int largest_bottleneck;
  size_t shared_bytes;
  void (*kernel)(AdapterForward);
};

const Instance kInstances[] = {
    {DType::bf16, 64, kSharedBytes<64>, adapter_forward_kernel<BFloat16, 64>},
    {DType::bf16, 128, kSharedBytes<128>, adapter_forward_kernel<BFloat16, 128>},
    {DType::bf16, 256, kSharedBytes<256>, adapter_forward_kernel<BFloat16, 256>},
    {DType::f16, 64, kSharedBytes<64>, adapter_forward_kernel<Float16, 64>},
    {DType::f16, 128, kSharedBytes<128>, adapter_forward_kernel<Float16, 128>},
    {DType::f16, 256, kSharedBytes<256>, adapter_forward_kernel<Float16, 256>},
};

}  // namespace
}  // namespace lwft::cuda

namespace lwft {

const char* adapter_cuda_declines(const AdapterForward& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "x must be bfloat16 or float16";
  if (p.param_dtype != p.dtype) return "the parameters must have the dtype of x";
  if (p.bottleneck % 8 != 0 || p.bottleneck > 256) return "the bottleneck must be a multiple of 8 and at most 256";
  if (p.model_dim % 8 != 0) return "the model dimension must be a multiple of 8";
  if (p.x_row_stride % 8 != 0) return "the rows of x must start at multiples of 16 bytes";
  if (!cuda::aligned(p.x) || !cuda::aligned(p.down_weight) || !cuda::aligned(p.up_weight)) {
    return "x and the weights must start at multiples of 16 bytes";
  }
  return nullptr;
}

int adapter_forward_cuda(const AdapterForward& p, void* stream) {
  if (p.tokens == 0) return 0;
  for (const cuda::Instance& instance : cuda::kInstances) {
    if (instance.dtype != p.dtype || p.bottleneck > instance.largest_bottleneck) continue;
    const int blocks = static_cast<int>((p.tokens + cuda::kRows - 1) / cuda::kRows);
    return cuda::launch(instance.kernel, blocks, cuda::kThreads, instance.shared_bytes, stream, p);
  }
  return 1;  // cudaErrorInvalidValue; adapter_cuda_declines has said why
}

}  // namespace lwft
