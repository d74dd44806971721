// The adapter backward on tensor cores, bf16 and fp16, sm_80 and later. With g = mask * grad_out, c = scale / (1 - p) and
// n = LayerNorm(x) or x:
//
//     dz  = c (g Wu) * act'(z),      dx = dz Wd, through LayerNorm's gradient, plus grad_out where the residual is x;
//     dWu = c g^T act(z),  dWd = dz^T n,  and the sums over tokens of c g, dz, dn * (x - mean) rstd and dn, dn = dz Wd.
//
// The first kernel gives dz, kept in the workspace, and dx; a block has 64 tokens and streams chunks of 64 columns through
// shared memory, as forward does. The mask is laid over the staged chunk of grad_out as zeros; c, which 16 bits would
// round, is applied to the float32 sums. Under LayerNorm dn is needed twice, for its sums over the row and then for dx,
// and computed twice: Wd and x come from the L2 cache the second time.
//
// The second kernel gives the weights' gradients: a block has 64 columns and a range of tokens, keeps its parts of dWu and
// dWd^T in registers, and leaves them in the workspace; a third adds them up in the order of the ranges.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "adapter/adapter_cuda.cuh"

namespace lwft::cuda {
namespace {

constexpr int kStride = kChunk + kPad;
// Blocks of the weights' gradients: two for each multiprocessor of an H200. By shape and not by card, so that the sums
// have one order everywhere.
constexpr int64_t kWeightBlocks = 264;

// Where things lie in the workspace, in floats; dz comes first, in 16 bits.
struct Workspace {
  int64_t chunks, ranges, tiles_of_range;
  int64_t dz;       // floats that dz takes
  int64_t partial;  // floats of one range: dWu (d, m), dWd^T (d, m), dbu, dnw, dnb (d), dbd (m)

  explicit Workspace(const AdapterBackward& p) {
    const int64_t tiles = (p.tokens + kRows - 1) / kRows;
    chunks = (p.model_dim + kChunk - 1) / kChunk;
    const int64_t wanted = (kWeightBlocks + chunks - 1) / chunks;
    tiles_of_range = tiles == 0 ? 1 : (tiles + wanted - 1) / wanted;
    ranges = (tiles + tiles_of_range - 1) / tiles_of_range;
    dz = (p.tokens * p.bottleneck + 7) / 8 * 4;  // a multiple of 16 bytes
    partial = p.model_dim * (2 * p.bottleneck + 3) + p.bottleneck;
  }
  int64_t floats() const { return dz + ranges * partial; }
};

// The staged chunk of grad_out becomes zero where dropout drops.
template <class T>
LWFT_DEVICE void mask_chunk(const Dropout& dropout, int64_t first_row, int first_column, T* chunk) {
  // 4 columns that lie 16 apart share a call of Philox (common/philox.h)
  for (int i = thread_index(); i < kRows * kChunk / 4; i += kThreads) {
    const int r = i / (kChunk / 4), c = i % (kChunk / 4);
    const int64_t row = first_row + r;
    const PhiloxWords words = philox4x32_10(
        static_cast<uint32_t>(first_column / kPhiloxColumns * kPhiloxLanes + c), static_cast<uint32_t>(row),
        static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), static_cast<uint32_t>(dropout.offset),
        static_cast<uint32_t>(dropout.seed), static_cast<uint32_t>(dropout.seed >> 32));
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (words.word[v] < dropout.threshold) chunk[r * kStride + c + 16 * v] = T{0};
    }
  }
}
static_assert(kChunk == kPhiloxColumns && kChunk / 4 == kPhiloxLanes);

// c of the formulas, and whether anything is dropped.
LWFT_DEVICE float factor_of(const AdapterBackward& p, const Dropout& dropout) {
  return static_cast<float>(p.scale) * static_cast<float>(dropout.keep_scale);
}

template <class T>
LWFT_DEVICE void copy_tokens(T* to, const void* from, int64_t row_stride, int64_t first_row, int64_t column,
                             const AdapterBackward& p) {
  copy_rows<kThreads>(to, kRows, kChunk, static_cast<const T*>(from) + first_row * row_stride + column, row_stride,
                      p.tokens - first_row, p.model_dim - column);
}

// ---- dz and dx ----

template <int M>
constexpr int kDxStageElements = 2 * kRows * kStride + M * kStride > kRows* kStride + kChunk*(M + kPad)
                                     ? 2 * kRows * kStride + M * kStride
                                     : kRows * kStride + kChunk * (M + kPad);
template <int M>
constexpr size_t kDxSharedBytes = 2 * kRows * sizeof(float) + kStages * kDxStageElements<M> * sizeof(uint16_t);

// g Wu for the 16 rows of this warp.
template <class T, int M>
LWFT_DEVICE void up_gradient(const AdapterBackward& p, const Dropout& dropout, int64_t first_row, T* stages,
                             float (&dh)[M / 8][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const auto load = [&](int chunk, T* stage) {
    const int64_t column = static_cast<int64_t>(chunk) * kChunk;
    copy_tokens(stage, p.grad_out, p.grad_out_row_stride, first_row, column, p);
    copy_rows<kThreads>(stage + kRows * kStride, kChunk, M, static_cast<const T*>(p.up_weight) + column * p.bottleneck,
                        p.bottleneck, p.model_dim - column, p.bottleneck);
  };
  const auto use = [&](int chunk, T* stage) {
    const T* weight = stage + kRows * kStride;
    if (dropout.active()) {
      mask_chunk(dropout, first_row, chunk * kChunk, stage);
      block_barrier();
    }
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, stage + (warp * 16 + lane % 16) * kStride + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < M / 16; ++j) {
        multiply_pair_transposed(&dh[2 * j], a, weight + k * (M + kPad) + j * 16, M + kPad);
      }
    }
  };
  for_chunks(static_cast<int>((p.model_dim + kChunk - 1) / kChunk), stages, kDxStageElements<M>, load, use);
}

// dz to the workspace, and as A fragments for the next product.
template <class T, int M>
LWFT_DEVICE void activation_gradient(const AdapterBackward& p, const Dropout& dropout, int64_t first_row,
                                     const float (&dh)[M / 8][4], uint32_t (&dz)[M / 16][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const float factor = factor_of(p, dropout);
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
    const int column = j * 8 + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp * 16 + lane / 4 + half * 8;
      uint32_t pair = 0;
      if (column < p.bottleneck && row < p.tokens) {
        const int64_t at = row * p.bottleneck + column;
        const T* z = static_cast<const T*>(p.hidden) + at;
        pair = pack<T>(factor * dh[j][2 * half] * activation_slope(p.activation, to_float(z[0])),
                       factor * dh[j][2 * half + 1] * activation_slope(p.activation, to_float(z[1])));
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.workspace) + at) = pair;
      }
      dz[j / 2][j % 2 * 2 + half] = pair;
    }
  }
}

// The chunk's 8 tiles of dn = dz Wd for the 16 rows of this warp; Wd (M, 64) in shared memory.
template <class T, int M>
LWFT_DEVICE void down_gradient(const uint32_t (&dz)[M / 16][4], const T* weight, float (&dn)[kChunk / 8][4]) {
#pragma unroll
  for (int k = 0; k < M / 16; ++k) {
#pragma unroll
    for (int j = 0; j < kChunk / 16; ++j) {
      multiply_pair_transposed(&dn[2 * j], dz[k], weight + k * 16 * kStride + j * 16, kStride);
    }
  }
}

// body(half, row of the block, column of the chunk, element of the tiles) for what this lane holds of a chunk.
template <class P, class Body>
LWFT_DEVICE void for_elements(const P& p, int64_t first_row, int first_column, const Body& body) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    if (first_column + column >= p.model_dim) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp * 16 + lane / 4 + half * 8;
      if (first_row + r < p.tokens) body(j, half, r, column);
    }
  }
}

template <class T, int M>
LWFT_DEVICE void input_gradient(const AdapterBackward& p, int64_t first_row, const float* mean, const float* rstd,
                                T* stages, const uint32_t (&dz)[M / 16][4]) {
  const int chunks = static_cast<int>((p.model_dim + kChunk - 1) / kChunk);
  const bool norm = p.norm_weight != nullptr;
  const T* gamma = static_cast<const T*>(p.norm_weight);
  const auto load = [&](int chunk, T* stage) {
    const int64_t column = static_cast<int64_t>(chunk) * kChunk;
    copy_rows<kThreads>(stage, M, kChunk, static_cast<const T*>(p.down_weight) + column, p.model_dim, p.bottleneck,
                        p.model_dim - column);
    if (norm) copy_tokens(stage + M * kStride, p.x, p.x_row_stride, first_row, column, p);
    if (p.residual_is_x) {
      copy_tokens(stage + (M + kRows) * kStride, p.grad_out, p.grad_out_row_stride, first_row, column, p);
    }
  };

  // LayerNorm's gradient: dx = rstd (w - mean(w) - nh mean(w nh)), w = dn gamma, nh = (x - mean) rstd
  float mean_w[2] = {0.0f, 0.0f}, mean_wn[2] = {0.0f, 0.0f};  // of the lane's rows, 8 apart
  if (norm) {
    for_chunks(chunks, stages, kDxStageElements<M>, load, [&](int chunk, T* stage) {
      float dn[kChunk / 8][4] = {};
      down_gradient<T, M>(dz, stage, dn);
      const T* x = stage + M * kStride;
      for_elements(p, first_row, chunk * kChunk, [&](int j, int half, int r, int column) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float w = dn[j][2 * half + e] * to_float(gamma[chunk * kChunk + column + e]);
          mean_w[half] += w;
          mean_wn[half] += w * (to_float(x[r * kStride + column + e]) - mean[r]) * rstd[r];
        }
      });
    });
    const float inverse_width = 1.0f / static_cast<float>(p.model_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the 4 lanes that hold a row
      mean_w[half] += shuffle_xor(mean_w[half], 1);
      mean_w[half] = (mean_w[half] + shuffle_xor(mean_w[half], 2)) * inverse_width;
      mean_wn[half] += shuffle_xor(mean_wn[half], 1);
      mean_wn[half] = (mean_wn[half] + shuffle_xor(mean_wn[half], 2)) * inverse_width;
    }
  }
  for_chunks(chunks, stages, kDxStageElements<M>, load, [&](int chunk, T* stage) {
    float dn[kChunk / 8][4] = {};
    down_gradient<T, M>(dz, stage, dn);
    const T* x = stage + M * kStride;
    const T* grad_out = stage + (M + kRows) * kStride;
    for_elements(p, first_row, chunk * kChunk, [&](int j, int half, int r, int column) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        value[e] = dn[j][2 * half + e];
        if (norm) {
          const float normed = (to_float(x[r * kStride + column + e]) - mean[r]) * rstd[r];
          const float w = value[e] * to_float(gamma[chunk * kChunk + column + e]);
          value[e] = rstd[r] * (w - mean_w[half] - normed * mean_wn[half]);
        }
        if (p.residual_is_x) value[e] += to_float(grad_out[r * kStride + column + e]);
      }
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.dx) + (first_row + r) * p.model_dim + chunk * kChunk + column) =
          pack<T>(value[0], value[1]);
    });
  });
}

LWFT_DEVICE void load_statistics(const AdapterBackward& p, int64_t first_row, float* mean, float* rstd) {
  for (int r = thread_index(); r < kRows; r += kThreads) {
    const bool inside = p.norm_weight != nullptr && first_row + r < p.tokens;
    mean[r] = inside ? static_cast<const float*>(p.mean)[first_row + r] : 0.0f;
    rstd[r] = inside ? static_cast<const float*>(p.rstd)[first_row + r] : 0.0f;
  }
}

template <class T, int M>
LWFT_KERNEL(kThreads)
adapter_dx_kernel(AdapterBackward p) {
  float* mean = reinterpret_cast<float*>(shared_memory());
  float* rstd = mean + kRows;
  T* stages = reinterpret_cast<T*>(rstd + kRows);
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const int64_t first_row = static_cast<int64_t>(block_index()) * kRows;
  load_statistics(p, first_row, mean, rstd);  // seen by the others after the first chunk's barrier
  float dh[M / 8][4] = {};
  up_gradient<T, M>(p, dropout, first_row, stages, dh);
  uint32_t dz[M / 16][4];
  activation_gradient<T, M>(p, dropout, first_row, dh, dz);
  if (p.dx != nullptr) input_gradient<T, M>(p, first_row, mean, rstd, stages, dz);
}

// ---- the weights' gradients ----

template <int M>
constexpr int kWeightStageElements = 2 * kRows * kStride + 2 * kRows * (M + kPad);
// mean, rstd; Wd for the sums of dn; the stages. Behind the loop, 4 x 64 floats of the warps' column sums.
template <int M>
constexpr size_t kWeightSharedBytes =
    2 * kRows * sizeof(float) + (M * kStride + kStages * kWeightStageElements<M>)*sizeof(uint16_t);

// acc (16 columns of the chunk per warp, M) += G^T H over the tile's 64 tokens; G (64, 64), H (64, M) in shared memory.
template <class T, int M>
LWFT_DEVICE void add_outer(const T* g, const T* h, float (&acc)[M / 8][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll 1  // unrolled, the fragments of all turns would be loaded at once and spill
  for (int k = 0; k < kRows; k += 16) {
    uint32_t a[4];
    ldmatrix_x4_transposed(a, g + (k + lane % 8 + lane / 16 * 8) * kStride + warp * 16 + lane / 8 % 2 * 8);
#pragma unroll
    for (int j = 0; j < M / 16; ++j) multiply_pair_transposed(&acc[2 * j], a, h + k * (M + kPad) + j * 16, M + kPad);
  }
}

template <int M>
LWFT_DEVICE void store_outer(const AdapterBackward& p, int first_column, float factor, const float (&acc)[M / 8][4],
                             float* to) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_column + warp * 16 + lane / 4 + i / 2 * 8;
      const int column = j * 8 + lane % 4 * 2 + i % 2;
      if (row < p.model_dim && column < p.bottleneck) to[row * p.bottleneck + column] = factor * acc[j][i];
    }
  }
}

// dnorm_weight += dn * (x - mean) rstd and dnorm_bias += dn over the tile's tokens, for the columns that this lane holds.
template <class T, int M>
LWFT_DEVICE void norm_sums(const AdapterBackward& p, int64_t first_row, const float* mean, const float* rstd,
                           const T* x, const T* dz, const T* down_weight, float (&dnorm_weight)[kChunk / 8][2],
                           float (&dnorm_bias)[kChunk / 8][2]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {  // 16 columns at a time, for want of registers
    float dn[2][4] = {};
#pragma unroll 1
    for (int k = 0; k < M; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, dz + (warp * 16 + lane % 16) * (M + kPad) + k + lane / 16 * 8);
      multiply_pair_transposed(dn, a, down_weight + k * kStride + j * 16, kStride);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp * 16 + lane / 4 + half * 8;
      if (first_row + r >= p.tokens) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // beyond the model dimension x and Wd were staged as zeros
          const float normed = (to_float(x[r * kStride + (2 * j + i) * 8 + lane % 4 * 2 + e]) - mean[r]) * rstd[r];
          dnorm_weight[2 * j + i][e] += dn[i][2 * half + e] * normed;
          dnorm_bias[2 * j + i][e] += dn[i][2 * half + e];
        }
      }
    }
  }
}

template <class T, int M>
LWFT_KERNEL(kThreads)
adapter_weights_kernel(AdapterBackward p, Workspace space) {
  float* mean = reinterpret_cast<float*>(shared_memory());
  float* rstd = mean + kRows;
  T* down_weight = reinterpret_cast<T*>(rstd + kRows);
  T* stages = down_weight + M * kStride;
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const int chunk = block_index() % static_cast<int>(space.chunks),
            range = block_index() / static_cast<int>(space.chunks);
  const int first_column = chunk * kChunk;
  const int64_t first_tile = range * space.tiles_of_range, all_tiles = (p.tokens + kRows - 1) / kRows;
  const int64_t left = all_tiles - first_tile;
  const int tiles = static_cast<int>(left < space.tiles_of_range ? left : space.tiles_of_range);
  const bool norm = p.norm_weight != nullptr;
  const bool norm_gradients = norm && (p.dnorm_weight != nullptr || p.dnorm_bias != nullptr);

  if (norm_gradients) {
    copy_rows<kThreads>(down_weight, M, kChunk, static_cast<const T*>(p.down_weight) + first_column, p.model_dim,
                        p.bottleneck, p.model_dim - first_column);
  }
  float dup[M / 8][4] = {}, ddown[M / 8][4] = {};
  float dnorm_weight[kChunk / 8][2] = {}, dnorm_bias[kChunk / 8][2] = {};
  float column_sum = 0.0f;  // of g in the first 64 threads; of dz in the rest of the first chunk's blocks

  const auto load = [&](int tile, T* stage) {
    const int64_t first_row = (first_tile + tile) * kRows;
    copy_tokens(stage, p.grad_out, p.grad_out_row_stride, first_row, first_column, p);
    copy_tokens(stage + kRows * kStride, p.x, p.x_row_stride, first_row, first_column, p);
    T* hidden = stage + 2 * kRows * kStride;
    copy_rows<kThreads>(hidden, kRows, M, static_cast<const T*>(p.hidden) + first_row * p.bottleneck, p.bottleneck,
                        p.tokens - first_row, p.bottleneck);
    copy_rows<kThreads>(hidden + kRows * (M + kPad), kRows, M,
                        static_cast<const T*>(p.workspace) + first_row * p.bottleneck, p.bottleneck,
                        p.tokens - first_row, p.bottleneck);
  };
  const auto use = [&](int tile, T* stage) {
    const int64_t first_row = (first_tile + tile) * kRows;
    T* grad_out = stage;
    T* x = stage + kRows * kStride;
    T* hidden = stage + 2 * kRows * kStride;
    const T* dz = hidden + kRows * (M + kPad);
    if (dropout.active()) mask_chunk(dropout, first_row, first_column, grad_out);
    for (int i = thread_index(); i < kRows * M; i += kThreads) {
      const int r = i / M, c = i % M;
      const bool inside = first_row + r < p.tokens && c < p.bottleneck;  // act(0) need not be 0
      T& z = hidden[r * (M + kPad) + c];
      z = inside ? from_float<T>(activate(p.activation, to_float(z))) : T{0};
    }
    load_statistics(p, first_row, mean, rstd);
    block_barrier();
    if (norm_gradients) {
      norm_sums<T, M>(p, first_row, mean, rstd, x, dz, down_weight, dnorm_weight, dnorm_bias);
      block_barrier();  // x is about to be written
    }
    if (norm) {
      normalise(p, first_row, first_column, mean, rstd, x);
      block_barrier();
    }
    add_outer<T, M>(grad_out, hidden, dup);
    add_outer<T, M>(x, dz, ddown);
    // by one thread a column, in the order of the tokens
    if (thread_index() < kChunk) {
      for (int r = 0; r < kRows; ++r) column_sum += to_float(grad_out[r * kStride + thread_index()]);
    }
  };
  for_chunks(tiles, stages, kWeightStageElements<M>, load, use);

  float* partial = static_cast<float*>(p.workspace) + space.dz + range * space.partial;
  const int64_t d = p.model_dim, m = p.bottleneck;
  const float factor = factor_of(p, dropout);
  store_outer<M>(p, first_column, factor, dup, partial);
  store_outer<M>(p, first_column, 1.0f, ddown, partial + d * m);
  float* vectors = partial + 2 * d * m;
  const int column = first_column + thread_index();
  if (thread_index() < kChunk && column < d) vectors[column] = factor * column_sum;

  if (norm_gradients) {
    float* sums = reinterpret_cast<float*>(stages);  // (2, warps, 64)
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float weight_sum = dnorm_weight[j][e], bias_sum = dnorm_bias[j][e];
#pragma unroll
        for (int mask = 4; mask < kWarpLanes; mask *= 2) {  // the 8 lanes that hold a column
          weight_sum += shuffle_xor(weight_sum, mask);
          bias_sum += shuffle_xor(bias_sum, mask);
        }
        if (lane < 4) {
          sums[warp * kChunk + j * 8 + lane * 2 + e] = weight_sum;
          sums[(kWarps + warp) * kChunk + j * 8 + lane * 2 + e] = bias_sum;
        }
      }
    }
    block_barrier();
    for (int i = thread_index(); i < 2 * kChunk; i += kThreads) {
      const int kind = i / kChunk, c = i % kChunk;
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += sums[(kind * kWarps + w) * kChunk + c];
      if (first_column + c < d) vectors[(1 + kind) * d + first_column + c] = total;
    }
  }
}

// The sum over tokens of dz for each range, by one thread an element of the bottleneck.
template <class T>
LWFT_KERNEL(kThreads)
adapter_down_bias_kernel(AdapterBackward p, Workspace space) {
  const int64_t m = p.bottleneck;
  const int range = block_index();
  const int64_t begin = range * space.tiles_of_range * kRows, end = begin + space.tiles_of_range * kRows;
  float* to = static_cast<float*>(p.workspace) + space.dz + range * space.partial + p.model_dim * (2 * m + 3);
  for (int64_t column = thread_index(); column < m; column += kThreads) {
    float total = 0.0f;
    for (int64_t row = begin; row < end && row < p.tokens; ++row) {
      total += to_float(static_cast<const T*>(p.workspace)[row * m + column]);
    }
    to[column] = total;
  }
}

// Each gradient from its partial sums, in the order of the ranges.
template <class T>
LWFT_KERNEL(kThreads)
adapter_sum_kernel(AdapterBackward p, Workspace space) {
  const int64_t d = p.model_dim, m = p.bottleneck;
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (i >= space.partial) return;
  const float* partial = static_cast<const float*>(p.workspace) + space.dz + i;
  float total = 0.0f;
  for (int64_t range = 0; range < space.ranges; ++range) total += partial[range * space.partial];
  const auto store = [&](void* to, int64_t at) {
    if (to != nullptr) static_cast<T*>(to)[at] = from_float<T>(total);
  };
  if (i < d * m) return store(p.dup_weight, i);
  if (i < 2 * d * m) return store(p.ddown_weight, (i - d * m) % m * d + (i - d * m) / m);  // kept transposed
  const int64_t vector = i - 2 * d * m;
  if (vector < d) return store(p.dup_bias, vector);
  if (vector < 2 * d) return store(p.dnorm_weight, vector - d);
  if (vector < 3 * d) return store(p.dnorm_bias, vector - 2 * d);
  store(p.ddown_bias, vector - 3 * d);
}

struct Instance {
  DType dtype;
  int largest_bottleneck;
  size_t dx_shared_bytes, weight_shared_bytes;
  void (*dx)(AdapterBackward);
  void (*weights)(AdapterBackward, Workspace);
  void (*down_bias)(AdapterBackward, Workspace);
  void (*sum)(AdapterBackward, Workspace);
};

template <class T, int M>
constexpr Instance instance(DType dtype) {
  return {dtype,
          M,
          kDxSharedBytes<M>,
          kWeightSharedBytes<M>,
          adapter_dx_kernel<T, M>,
          adapter_weights_kernel<T, M>,
          adapter_down_bias_kernel<T>,
          adapter_sum_kernel<T>};
}

const Instance kInstances[] = {
    // the parts of dWu and dWd^T that a lane holds take 128 registers at M = 128, too many for sm_90 without spilling
    instance<BFloat16, 64>(DType::bf16),
    instance<Float16, 64>(DType::f16),
};

}  // namespace
}  // namespace lwft::cuda

namespace lwft {

const char* adapter_cuda_declines(const AdapterBackward& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "x must be bfloat16 or float16";
  if (p.param_dtype != p.dtype) return "the parameters must have the dtype of x";
  if (p.bottleneck % 8 != 0 || p.bottleneck > 64) return "the bottleneck must be a multiple of 8 and at most 64";
  if (p.model_dim % 8 != 0) return "the model dimension must be a multiple of 8";
  if (p.x_row_stride % 8 != 0 || p.grad_out_row_stride % 8 != 0) {
    return "the rows of x and grad_out must start at multiples of 16 bytes";
  }
  for (const void* pointer : {p.x, p.grad_out, p.down_weight, p.up_weight, p.hidden}) {
    if (!cuda::aligned(pointer)) return "x, grad_out, hidden and the weights must start at multiples of 16 bytes";
  }
  return nullptr;
}

int64_t adapter_backward_workspace(const AdapterBackward& p) { return cuda::Workspace(p).floats(); }

int adapter_backward_cuda(const AdapterBackward& p, void* stream) {
  const cuda::Workspace space(p);
  const cuda::Instance* instance = cuda::kInstances;
  while (instance->dtype != p.dtype || p.bottleneck > instance->largest_bottleneck) ++instance;
  if (p.tokens > 0) {
    const auto blocks = static_cast<int>((p.tokens + cuda::kRows - 1) / cuda::kRows);
    const int error = cuda::launch(instance->dx, blocks, cuda::kThreads, instance->dx_shared_bytes, stream, p);
    if (error != 0) return error;
  }
  if (!p.dup_weight && !p.ddown_weight && !p.dup_bias && !p.dnorm_weight && !p.dnorm_bias && !p.ddown_bias) return 0;
  if (p.tokens > 0) {
    int error = cuda::launch(instance->weights, static_cast<int>(space.chunks * space.ranges), cuda::kThreads,
                             instance->weight_shared_bytes, stream, p, space);
    if (error != 0) return error;
    error = cuda::launch(instance->down_bias, static_cast<int>(space.ranges), cuda::kThreads, 0, stream, p, space);
    if (error != 0) return error;
  }
  const auto blocks = static_cast<int>((space.partial + cuda::kThreads - 1) / cuda::kThreads);
  return cuda::launch(instance->sum, blocks, cuda::kThreads, 0, stream, p, space);
}

}  // namespace lwft
