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
// Two kernels give the weights' gradients, since they read nothing in common: grad_out and z for dWu, x and dz for the
// rest. A block has 64 columns and a range of tokens, keeps its part in registers, and leaves it in the workspace; the last
// kernel adds the parts up in the order of the ranges. With nh = (x - mean) rstd, n = nh gamma + beta and dn = dz Wd, what
// LayerNorm wants are no sums over tokens of their own, which would want dn again: from G = dz^T nh and dbd come
//
//     dWd = G gamma + dbd beta^T,   dgamma = sum_t dn nh = sum_m Wd G,   dbeta = sum_t dn = sum_m Wd dbd.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "adapter/adapter_cuda.cuh"

namespace lwft::cuda {
namespace {

constexpr int kStride = kChunk + kPad;
// Blocks of each kernel of the weights' gradients: two for each multiprocessor of an H200. By shape and not by card, so that the sums
// have one order everywhere.
constexpr int64_t kWeightBlocks = 264;

// Where things lie in the workspace, in floats; dz comes first, in 16 bits.
struct Workspace {
  int64_t chunks, ranges, tiles_of_range;
  int64_t dz;       // floats that dz takes
  int64_t partial;  // floats of one range: dWu (d, m), G^T (d, m), dbu (d), dbd (m)

  explicit Workspace(const AdapterBackward& p) {
    const int64_t tiles = (p.tokens + kRows - 1) / kRows;
    chunks = (p.model_dim + kChunk - 1) / kChunk;
    const int64_t wanted = (kWeightBlocks + chunks - 1) / chunks;
    tiles_of_range = tiles == 0 ? 1 : (tiles + wanted - 1) / wanted;
    ranges = (tiles + tiles_of_range - 1) / tiles_of_range;
    dz = (p.tokens * p.bottleneck + 7) / 8 * 4;  // a multiple of 16 bytes
    partial = p.model_dim * (2 * p.bottleneck + 1) + p.bottleneck;
  }
  int64_t floats() const { return dz + ranges * partial; }
};

// Whether anything is wanted that comes from G.
LWFT_DEVICE bool wants_down(const AdapterBackward& p) {
  return p.ddown_weight != nullptr || p.dnorm_weight != nullptr || p.dnorm_bias != nullptr;
}

// The staged chunk of grad_out becomes zero where dropout drops.
template <class T>
LWFT_DEVICE void mask_chunk(const Dropout& dropout, int64_t first_row, int first_column, T* chunk) {
  // 4 columns that lie 16 apart share a call of Philox (common/philox.h)
#pragma unroll 1
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
static_assert(3 * kRows * (128 + kPad) <= kStages * kDxStageElements<128>,
              "the tiles of dh and dz lie where the stages are");
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

// dz to the workspace, and as A fragments for the next product. As in forward, act' is computed in a loop over shared
// memory: dh as float32 goes in, dz comes out behind it.
template <class T, int M>
LWFT_DEVICE void activation_gradient(const AdapterBackward& p, const Dropout& dropout, int64_t first_row,
                                     const float (&dh)[M / 8][4], T* stages, uint32_t (&dz)[M / 16][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const float factor = factor_of(p, dropout);
  float* dh_tile = reinterpret_cast<float*>(stages);
  T* dz_tile = stages + 2 * kRows * (M + kPad);
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = warp * 16 + lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
      dh_tile[r * (M + kPad) + column] = factor * dh[j][i];
    }
  }
  block_barrier();
#pragma unroll 1
  for (int i = thread_index(); i < kRows * M / 8; i += kThreads) {
    const int r = i / (M / 8), c = i % (M / 8) * 8;
    float value[8] = {};
    if (first_row + r < p.tokens && c < p.bottleneck) {
      const int64_t at = (first_row + r) * p.bottleneck + c;
      load(static_cast<const T*>(p.hidden) + at, value);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        value[e] = dh_tile[r * (M + kPad) + c + e] * activation_slope(p.activation, value[e]);
      }
      store(static_cast<T*>(p.workspace) + at, value);
    }
    store(dz_tile + r * (M + kPad) + c, value);
  }
  block_barrier();
  load_fragments<T, M>(dz_tile, dz);
  block_barrier();  // the tiles' place is taken by the stages of the next product
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
  activation_gradient<T, M>(p, dropout, first_row, dh, stages, dz);
  if (p.dx != nullptr) input_gradient<T, M>(p, first_row, mean, rstd, stages, dz);
}

// ---- the weights' gradients ----

// What a block of them works on: a chunk of columns and a range of tiles of tokens.
struct Part {
  int64_t range, first_tile;
  int first_column, tiles;

  LWFT_DEVICE Part(const AdapterBackward& p, const Workspace& space) {
    range = block_index() / space.chunks;
    first_column = static_cast<int>(block_index() % space.chunks) * kChunk;
    first_tile = range * space.tiles_of_range;
    const int64_t left = (p.tokens + kRows - 1) / kRows - first_tile;
    tiles = static_cast<int>(left < space.tiles_of_range ? left : space.tiles_of_range);
  }
  LWFT_DEVICE int64_t row_of(int tile) const { return (first_tile + tile) * kRows; }
  LWFT_DEVICE float* partial(const AdapterBackward& p, const Workspace& space) const {
    return static_cast<float*>(p.workspace) + space.dz + range * space.partial;
  }
};

template <int M>
constexpr int kWeightStageElements = kRows * kStride + kRows * (M + kPad);
template <int M>
constexpr size_t kUpSharedBytes = kStages * kWeightStageElements<M> * sizeof(uint16_t);
template <int M>
constexpr size_t kDownSharedBytes = 2 * kRows * sizeof(float) + kUpSharedBytes<M>;  // mean and rstd in front

// Starts the copies of a tile's tokens: columns of grad_out or x, and the bottleneck's of z or dz behind them.
template <class T, int M>
LWFT_DEVICE void copy_operands(const AdapterBackward& p, const Part& part, int tile, const void* wide,
                               int64_t row_stride, const void* narrow, T* stage) {
  const int64_t row = part.row_of(tile);
  copy_tokens(stage, wide, row_stride, row, part.first_column, p);
  copy_rows<kThreads>(stage + kRows * kStride, kRows, M, static_cast<const T*>(narrow) + row * p.bottleneck,
                      p.bottleneck, p.tokens - row, p.bottleneck);
}

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

// dWu = c g^T act(z), and the sums of c g.
template <class T, int M>
LWFT_KERNEL(kThreads)
adapter_up_weight_kernel(AdapterBackward p, Workspace space) {
  T* stages = reinterpret_cast<T*>(shared_memory());
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const Part part(p, space);
  float dup[M / 8][4] = {};
  float column_sum = 0.0f;  // of g in the first 64 threads

  const auto load = [&](int tile, T* stage) {
    copy_operands<T, M>(p, part, tile, p.grad_out, p.grad_out_row_stride, p.hidden, stage);
  };
  const auto use = [&](int tile, T* grad_out) {
    const int64_t first_row = part.row_of(tile);
    T* hidden = grad_out + kRows * kStride;
    if (dropout.active()) mask_chunk(dropout, first_row, part.first_column, grad_out);
#pragma unroll 1
    for (int i = thread_index(); i < kRows * M / 8; i += kThreads) {
      const int r = i / (M / 8), c = i % (M / 8) * 8;
      const bool inside = first_row + r < p.tokens && c < p.bottleneck;  // act(0) need not be 0
      if (inside) activate(p.activation, *reinterpret_cast<Vector8<T>*>(hidden + r * (M + kPad) + c));
    }
    block_barrier();
    add_outer<T, M>(grad_out, hidden, dup);
    // by one thread a column, in the order of the tokens
    if (thread_index() < kChunk) {
      for (int r = 0; r < kRows; ++r) column_sum += to_float(grad_out[r * kStride + thread_index()]);
    }
  };
  for_chunks(part.tiles, stages, kWeightStageElements<M>, load, use);

  float* partial = part.partial(p, space);
  const float factor = factor_of(p, dropout);
  store_outer<M>(p, part.first_column, factor, dup, partial);
  const int column = part.first_column + thread_index();
  if (thread_index() < kChunk && column < p.model_dim) {
    partial[2 * p.model_dim * p.bottleneck + column] = factor * column_sum;
  }
}

// G^T = nh^T dz, or x^T dz where there is no LayerNorm.
template <class T, int M>
LWFT_KERNEL(kThreads)
adapter_down_weight_kernel(AdapterBackward p, Workspace space) {
  float* mean = reinterpret_cast<float*>(shared_memory());
  float* rstd = mean + kRows;
  const Part part(p, space);
  float ddown[M / 8][4] = {};

  const auto load = [&](int tile, T* stage) {
    copy_operands<T, M>(p, part, tile, p.x, p.x_row_stride, p.workspace, stage);
  };
  const auto use = [&](int tile, T* x) {
    if (p.norm_weight != nullptr) {
      load_statistics(p, part.row_of(tile), mean, rstd);
      block_barrier();
      normalise<T>(p, part.row_of(tile), part.first_column, mean, rstd, nullptr, nullptr, x);
      block_barrier();  // all of nh is there
    }
    add_outer<T, M>(x, x + kRows * kStride, ddown);
  };
  for_chunks(part.tiles, reinterpret_cast<T*>(rstd + kRows), kWeightStageElements<M>, load, use);
  store_outer<M>(p, part.first_column, 1.0f, ddown, part.partial(p, space) + p.model_dim * p.bottleneck);
}

// The sum over tokens of dz for each range, by one thread an element of the bottleneck.
template <class T>
LWFT_KERNEL(kThreads)
adapter_down_bias_kernel(AdapterBackward p, Workspace space) {
  const int64_t m = p.bottleneck;
  const int range = block_index();
  const int64_t begin = range * space.tiles_of_range * kRows, end = begin + space.tiles_of_range * kRows;
  float* to = static_cast<float*>(p.workspace) + space.dz + range * space.partial + p.model_dim * (2 * m + 1);
  for (int64_t column = thread_index(); column < m; column += kThreads) {
    float total = 0.0f;
    for (int64_t row = begin; row < end && row < p.tokens; ++row) {
      total += to_float(static_cast<const T*>(p.workspace)[row * m + column]);
    }
    to[column] = total;
  }
}

// Each gradient that is wanted from its partial sums, in the order of the ranges: a warp for the row of dWu, the column of
// dWd and the elements of the vectors that belong to one column of x; one warp more for dbd.
template <class T>
LWFT_KERNEL(kThreads)
adapter_sum_kernel(AdapterBackward p, Workspace space) {
  const int lane = thread_index() % kWarpLanes;
  const int64_t column = static_cast<int64_t>(block_index()) * kWarps + thread_index() / kWarpLanes;
  const int64_t d = p.model_dim, m = p.bottleneck;
  if (column > d) return;  // the same for all lanes of the warp
  const auto sum = [&](int64_t at) {
    const float* partial = static_cast<const float*>(p.workspace) + space.dz + at;
    float total = 0.0f;
    for (int64_t range = 0; range < space.ranges; ++range) total += partial[range * space.partial];
    return total;
  };
  const auto store = [](void* to, int64_t at, float value) { static_cast<T*>(to)[at] = from_float<T>(value); };
  const auto element = [](const void* from, int64_t at) { return to_float(static_cast<const T*>(from)[at]); };

  if (column == d) {
    if (p.ddown_bias == nullptr) return;
    for (int64_t j = lane; j < m; j += kWarpLanes) store(p.ddown_bias, j, sum(2 * d * m + d + j));
    return;
  }
  const bool norm = p.norm_weight != nullptr;
  const float gamma = norm ? element(p.norm_weight, column) : 1.0f;
  const float beta = norm && p.norm_bias != nullptr ? element(p.norm_bias, column) : 0.0f;
  float dgamma = 0.0f, dbeta = 0.0f;
  for (int64_t j = lane; j < m; j += kWarpLanes) {
    if (p.dup_weight != nullptr) store(p.dup_weight, column * m + j, sum(column * m + j));
    if (!wants_down(p)) continue;
    const float g = sum(d * m + column * m + j), dbd = norm ? sum(2 * d * m + d + j) : 0.0f;
    if (p.ddown_weight != nullptr) store(p.ddown_weight, j * d + column, g * gamma + dbd * beta);
    const float weight = norm ? element(p.down_weight, j * d + column) : 0.0f;
    dgamma += weight * g;
    dbeta += weight * dbd;
  }
  dgamma = warp_sum(dgamma);
  dbeta = warp_sum(dbeta);
  if (lane != 0) return;
  if (p.dup_bias != nullptr) store(p.dup_bias, column, sum(2 * d * m + column));
  if (p.dnorm_weight != nullptr) store(p.dnorm_weight, column, dgamma);
  if (p.dnorm_bias != nullptr) store(p.dnorm_bias, column, dbeta);
}

struct Instance {
  DType dtype;
  int largest_bottleneck;
  size_t dx_shared_bytes, up_shared_bytes, down_shared_bytes;
  void (*dx)(AdapterBackward);
  void (*up_weight)(AdapterBackward, Workspace);
  void (*down_weight)(AdapterBackward, Workspace);
  void (*down_bias)(AdapterBackward, Workspace);
  void (*sum)(AdapterBackward, Workspace);
};

template <class T, int M>
constexpr Instance instance(DType dtype) {
  return {dtype,
          M,
          kDxSharedBytes<M>,
          kUpSharedBytes<M>,
          kDownSharedBytes<M>,
          adapter_dx_kernel<T, M>,
          adapter_up_weight_kernel<T, M>,
          adapter_down_weight_kernel<T, M>,
          adapter_down_bias_kernel<T>,
          adapter_sum_kernel<T>};
}

const Instance kInstances[] = {
    instance<BFloat16, 64>(DType::bf16),
    instance<BFloat16, 128>(DType::bf16),
    instance<Float16, 64>(DType::f16),
    instance<Float16, 128>(DType::f16),
};

}  // namespace
}  // namespace lwft::cuda

namespace lwft {

const char* adapter_cuda_declines(const AdapterBackward& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "x must be bfloat16 or float16";
  if (p.param_dtype != p.dtype) return "the parameters must have the dtype of x";
  if (p.bottleneck % 8 != 0 || p.bottleneck > 128) return "the bottleneck must be a multiple of 8 and at most 128";
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
  const bool up = p.dup_weight || p.dup_bias, down = p.ddown_weight || p.dnorm_weight || p.dnorm_bias;
  const bool down_bias = p.ddown_bias || (down && p.norm_weight);
  if (!up && !down && !down_bias) return 0;
  const auto launch = [&](bool wanted, auto kernel, int64_t blocks, size_t shared_bytes) {
    if (!wanted || blocks == 0) return 0;
    return cuda::launch(kernel, static_cast<int>(blocks), cuda::kThreads, shared_bytes, stream, p, space);
  };
  int error = launch(up, instance->up_weight, space.chunks * space.ranges, instance->up_shared_bytes);
  if (error == 0) {
    error = launch(down, instance->down_weight, space.chunks * space.ranges, instance->down_shared_bytes);
  }
  if (error == 0) error = launch(down_bias, instance->down_bias, space.ranges, 0);
  if (error != 0) return error;
  return launch(true, instance->sum, p.model_dim / cuda::kWarps + 1, 0);
}

}  // namespace lwft
