// What the low-rank product's CUDA kernels share. Both directions are made of three products with a factor F, which is A
// or B^T, seen as (adapters, rank, width):
//
//     down       m = scale * dropout(wide) F^T          h = dropout(x) A^T,  ds = scale * dy B          lowrank_cuda.cu
//     up         y = y or bias, + scale * (m F)         out                                             lowrank_cuda.cu
//     gradients  dF = scale * m^T dropout(wide)         dA, dB, beside them dx, ds   lowrank_backward_cuda.cu
//
// The factors are packed first (pack_kernel), a small pass over small matrices: to the padded rank of the instance, B
// transposed, and in 16 bits. A float32 factor, beside 16-bit activations, becomes the sum of three bfloat16 ones, 8 bits
// of its 24 each, so that the tensor cores multiply it and no activation is copied to float32.
//
// A tensor core rounds its sums towards zero. So a product starts from zero every 64 terms, and the sums of 64 are added
// in float32 outside.
#pragma once
#include <type_traits>

#include "common/cuda/dropout.cuh"
#include "common/cuda/tile.cuh"
#include "lowrank/lowrank.h"

namespace lwft::cuda::lowrank {

constexpr int kWarps = 4, kThreads = kWarps * kWarpLanes;
constexpr int kRows = 16 * kWarps;  // tokens of a tile, 16 (one mma tile) per warp
constexpr int kChunk = 64;          // columns of a stage: those that share their calls of Philox
constexpr int kStride = kChunk + kPad;
static_assert(kChunk == kPhiloxColumns);
// Blocks that a kernel is cut into, if the shape allows it: four for each multiprocessor of an H200, so that enough copies
// are under way at a time. By shape and not by card, so that the sums have one order everywhere.
constexpr int64_t kBlocks = 528;

constexpr size_t kLargestShared = 99 << 10;  // of sm_86 and sm_120

LWFT_HOST_DEVICE int64_t ceil_div(int64_t size, int64_t by) { return (size + by - 1) / by; }

// The operands of products for activations X beside parameters of X or of float.
template <class X, class Parameter>
struct Operands {
  using T = X;  // in memory
  using E = X;  // on the tensor cores
  // The factor and the middle are sums of so many E, X is a sum of so many, and the product that is rounded to 16 bits in
  // the end takes so many of the factor and of the middle: 16 bits of each are more than the result keeps.
  static constexpr int kParts = 1, kInputParts = 1, kUpParts = 1;
};
template <class X>
struct Operands<X, float> {
  using T = X;
  using E = BFloat16;
  static constexpr int kParts = 3, kUpParts = 2;
  static constexpr int kInputParts = std::is_same_v<X, E> ? 1 : 2;  // 11 bits of float16
};

// ---- values of a dtype known at run time, for what is small ----

LWFT_DEVICE float value_at(DType dtype, const void* from, int64_t i) {
  if (dtype == DType::bf16) return to_float(static_cast<const BFloat16*>(from)[i]);
  if (dtype == DType::f16) return to_float(static_cast<const Float16*>(from)[i]);
  return static_cast<const float*>(from)[i];
}

LWFT_DEVICE void set_value(DType dtype, void* to, int64_t i, float value) {
  if (dtype == DType::bf16) {
    static_cast<BFloat16*>(to)[i] = from_float<BFloat16>(value);
  } else if (dtype == DType::f16) {
    static_cast<Float16*>(to)[i] = from_float<Float16>(value);
  } else {
    static_cast<float*>(to)[i] = value;
  }
}

// `value` as the sum of `parts` of 16 bits, at to[0], to[step], ...
LWFT_DEVICE void set_parts(DType dtype, uint16_t* to, int64_t step, int parts, float value) {
  for (int part = 0; part < parts; ++part) {
    set_value(dtype, to, part * step, value);
    value -= value_at(dtype, to, part * step);
  }
}

// ---- the adapters of tokens ----

LWFT_DEVICE int64_t adapter_of(const int64_t* index, int64_t row, int64_t tokens) {
  return row < tokens ? index[row] : -1;
}
LWFT_DEVICE bool names_none(int64_t adapter, int64_t adapters) { return adapter < -1 || adapter >= adapters; }
LWFT_DEVICE float quiet_nan() { return from_bits(0x7FC00000u); }

// The adapters that occur in the tile of kRows tokens, in rising order; how many. Every warp finds them for itself, so
// what follows branches alike in the whole block. (Numbers below 2^24 are exact in float32.)
LWFT_DEVICE int list_adapters(const int64_t* index, int64_t first_row, int64_t tokens, int64_t adapters, int* list) {
  const int lane = thread_index() % kWarpLanes;
  const float none = static_cast<float>(adapters);
  float own[kRows / kWarpLanes];
#pragma unroll
  for (int i = 0; i < kRows / kWarpLanes; ++i) {
    own[i] = static_cast<float>(adapter_of(index, first_row + lane + i * kWarpLanes, tokens));
  }
  int count = 0;
  for (float last = -1.0f;; ++count) {
    float next = none;
#pragma unroll
    for (int i = 0; i < kRows / kWarpLanes; ++i) next = own[i] > last && own[i] < next ? own[i] : next;
#pragma unroll
    for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(next, mask);
      next = other < next ? other : next;
    }
    if (!(next < none)) break;
    if (thread_index() == 0) list[count] = static_cast<int>(next);
    last = next;
  }
  block_barrier();
  return count;
}

// Whether a token of the tile is of `adapter`, or, if `or_none`, of none at all.
LWFT_DEVICE bool tile_has(const int64_t* index, int64_t first_row, int64_t tokens, int64_t adapters, int64_t adapter,
                          bool or_none) {
  const int lane = thread_index() % kWarpLanes;
  float found = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows / kWarpLanes; ++i) {
    const int64_t row = first_row + lane + i * kWarpLanes;
    if (row >= tokens) continue;
    const int64_t own = index[row];
    if (own == adapter || (or_none && (own < 0 || own >= adapters))) found = 1.0f;
  }
  return warp_sum(found) > 0.0f;
}

// ---- dropout in the layout of fragments ----
//
// Of a 16 x 64 tile a lane holds, as A operands of the tensor core and as results of it, of the rows lane / 4 and + 8 the
// columns 16 v + 8 side + 2 (lane % 4) + e: v = 0..3 of them come from one call of Philox.

LWFT_DEVICE PhiloxWords draws(const Dropout& dropout, int64_t row, int64_t first_column, int lane16) {
  return philox4x32_10(static_cast<uint32_t>(first_column / kPhiloxColumns * kPhiloxLanes + lane16),
                       static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                       static_cast<uint32_t>(dropout.offset), static_cast<uint32_t>(dropout.seed),
                       static_cast<uint32_t>(dropout.seed >> 32));
}

// body(half, side, v, mask): the lane's pairs of a 16 x 64 tile, whose first token is `first_row`, each with the bits that
// dropout keeps of it.
template <class Body>
LWFT_DEVICE void for_kept_pairs(const Dropout& dropout, int64_t first_row, int64_t first_column, const Body& body) {
  const int lane = thread_index() % kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t row = first_row + lane / 4 + half * 8;
      const PhiloxWords low = draws(dropout, row, first_column, side * 8 + lane % 4 * 2);
      const PhiloxWords high = draws(dropout, row, first_column, side * 8 + lane % 4 * 2 + 1);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        body(
            half, side, v,
            (low.word[v] >= dropout.threshold ? 0xFFFFu : 0u) | (high.word[v] >= dropout.threshold ? 0xFFFF0000u : 0u));
      }
    }
  }
}

// ---- products ----

// A pair of X as the sum of two pairs of bfloat16.
template <class X>
LWFT_DEVICE void split_pair(uint32_t pair, uint32_t& high, uint32_t& low) {
  const float a = to_float(X{static_cast<uint16_t>(pair)}), b = to_float(X{static_cast<uint16_t>(pair >> 16)});
  const BFloat16 a_high = from_float<BFloat16>(a), b_high = from_float<BFloat16>(b);
  high = a_high.bits | static_cast<uint32_t>(b_high.bits) << 16;
  low = pack<BFloat16>(a - to_float(a_high), b - to_float(b_high));
}

// total (16, R) += A F, A (16, 64) as fragments; F in shared memory, each of its parts (R, 64), or (64, R) if
// `Transposed`, the parts below each other or beside each other.
template <class P, int R, bool Transposed>
LWFT_DEVICE void add_product(const uint32_t (&a)[4][4], const typename P::E* factor, int stride,
                             float (&total)[R / 8][4]) {
  using E = typename P::E;
  const int lane = thread_index() % kWarpLanes;
  uint32_t high[4][4], low[4][4];
  if constexpr (P::kInputParts == 2) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) split_pair<typename P::T>(a[v][i], high[v][i], low[v][i]);
    }
  }
#pragma unroll
  for (int j = 0; j < R / 16; ++j) {
    float acc[2][4] = {};
#pragma unroll 1                                         // for want of registers
    for (int part = P::kParts - 1; part >= 0; --part) {  // the smallest terms first
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        uint32_t f[4];
        if constexpr (Transposed) {
          ldmatrix_x4_transposed(
              f, factor + (v * 16 + lane % 8 + lane / 8 % 2 * 8) * stride + part * R + j * 16 + lane / 16 * 8);
        } else {
          ldmatrix_x4(f, factor + (part * R + j * 16 + lane % 8 + lane / 16 * 8) * stride + v * 16 + lane / 8 % 2 * 8);
        }
        if constexpr (P::kInputParts == 2) {
          if (part < 2) {
            mma<E>(acc[0], low[v], f[0], f[1]);
            mma<E>(acc[1], low[v], f[2], f[3]);
          }
          mma<E>(acc[0], high[v], f[0], f[1]);
          mma<E>(acc[1], high[v], f[2], f[3]);
        } else {
          mma<E>(acc[0], a[v], f[0], f[1]);
          mma<E>(acc[1], a[v], f[2], f[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[2 * j][i] += acc[0][i];
      total[2 * j + 1][i] += acc[1][i];
    }
  }
}

// y (16, 64) += m F for 16 of the rank: the parts of m as fragments, those of F below each other in shared memory, each
// R rows of 64 columns with row stride `stride`; `factor` is at the first of the 16 rows.
template <class P, int R>
LWFT_DEVICE void add_up_product(const uint32_t (&m)[P::kUpParts][4], const typename P::E* factor, int stride,
                                float (&y)[kChunk / 8][4]) {
  using E = typename P::E;
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
    if constexpr (P::kUpParts == 2) {
      multiply_pair_transposed<E>(&y[2 * j], m[1], factor + j * 16, stride);
      multiply_pair_transposed<E>(&y[2 * j], m[0], factor + R * stride + j * 16, stride);
    }
    multiply_pair_transposed<E>(&y[2 * j], m[0], factor + j * 16, stride);
  }
}

// ---- rows of 16-byte vectors from fragments ----

LWFT_DEVICE void exchange(uint32_t& first, uint32_t& second, int mask) {
  const bool upper = (thread_index() & mask) != 0;
  const uint32_t received = to_bits(shuffle_xor(from_bits(upper ? first : second), mask));
  first = upper ? received : first;
  second = upper ? second : received;
}

// Register i of lane t of four neighbours becomes register t of lane i; its own inverse. So the four pairs that a lane
// holds of four tiles become the whole row, 16 bytes, of one of them: full sectors are read and written.
LWFT_DEVICE void transpose_pairs(uint32_t (&r)[4]) {
  exchange(r[0], r[1], 1);
  exchange(r[2], r[3], 1);
  exchange(r[0], r[2], 2);
  exchange(r[1], r[3], 2);
}

struct alignas(16) Pairs {
  uint32_t pair[4];
};

// The warp's 16 x 64 tile of y into rows of T, + what lies there if `accumulate`. row_of(half) is where the lane's row
// lane / 4 + 8 half starts, at the tile's first column, or null; `columns_left` is a multiple of 8.
template <class T, class RowOf>
LWFT_DEVICE void store_tile(const float (&y)[kChunk / 8][4], bool accumulate, int64_t columns_left,
                            const RowOf& row_of) {
  const int lane = thread_index() % kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const row = row_of(half);
#pragma unroll
    for (int q = 0; q < kChunk / 32; ++q) {
      const int column = (q * 4 + lane % 4) * 8;
      const bool inside = row != nullptr && column < columns_left;
      Pairs base{};
      if (accumulate) {
        if (inside) base = *reinterpret_cast<const Pairs*>(row + column);
        transpose_pairs(base.pair);
      }
      Pairs found;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &y[q * 4 + i][2 * half];
        const T low = {static_cast<uint16_t>(base.pair[i])}, high = {static_cast<uint16_t>(base.pair[i] >> 16)};
        found.pair[i] = pack<T>(pair[0] + to_float(low), pair[1] + to_float(high));
      }
      transpose_pairs(found.pair);
      if (inside) *reinterpret_cast<Pairs*>(row + column) = found;
    }
  }
}

// ---- what the launchers share ----

// A run of chunks of columns per block, so that there are about kBlocks of them; no run shorter than `least` chunks.
struct Slices {
  int64_t count, chunks;  // how many, and the chunks of each but the last

  Slices(int64_t tokens, int64_t width, int64_t least) {
    const int64_t all = ceil_div(width, kChunk), tiles = tokens == 0 ? 1 : ceil_div(tokens, kRows);
    const int64_t wanted = ceil_div(kBlocks, tiles), most = ceil_div(all, least);
    chunks = ceil_div(all, wanted < most ? wanted : most);
    count = ceil_div(all, chunks);
  }
};

// Which instance serves a call.
struct Kind {
  DType x_dtype;
  bool float_parameters;
  int rank;  // padded

  template <class P>
  explicit Kind(const P& p) : x_dtype(p.x_dtype), float_parameters(p.param_dtype == DType::f32) {
    rank = p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : p.rank <= 64 ? 64 : 128;
  }
  int parts() const { return float_parameters ? 3 : 1; }
  DType part_dtype() const { return float_parameters ? DType::bf16 : x_dtype; }
  bool operator==(const Kind&) const = default;

  constexpr Kind(DType dtype, bool floats, int padded) : x_dtype(dtype), float_parameters(floats), rank(padded) {}
};

// Floats that 16-bit elements take, whole 16 bytes.
inline int64_t floats_of_halves(int64_t elements) { return ceil_div(elements, 8) * 4; }
inline int64_t round_to_16_bytes(int64_t floats) { return ceil_div(floats, 4) * 4; }

// Where the packed factors lie in the workspace, in floats; then what else there is.
struct PackedFactors {
  int64_t a = 0, b, end;

  template <class P>
  explicit PackedFactors(const P& p) {
    const Kind kind(p);
    const int64_t rows = p.adapters * kind.parts() * kind.rank;
    b = floats_of_halves(rows * p.in_features);
    end = b + floats_of_halves(rows * p.out_features);
  }
};

// The reason why neither direction can serve a call, or null.
template <class P>
const char* declines(const P& p) {
  if (p.x_dtype != DType::bf16 && p.x_dtype != DType::f16) return "x must be bfloat16 or float16";
  if (p.out_dtype != p.x_dtype) return "the result must have the dtype of x";
  if (p.param_dtype != p.x_dtype && p.param_dtype != DType::f32) {
    return "the factors must have the dtype of x, or be float32";
  }
  if (p.bias_dtype == DType::f64) return "the bias must not be float64";
  if (p.param_dtype == DType::f32 && p.rank > 64) return "the rank of float32 factors must be at most 64";
  if (p.rank > 128) return "the rank must be at most 128";
  if (p.in_features % 8 != 0 || p.out_features % 8 != 0) return "both feature sizes must be multiples of 8";
  if (p.x_row_stride % 8 != 0) return "the rows of x must start at multiples of 16 bytes";
  if (!aligned(p.x)) return "x must start at a multiple of 16 bytes";
  if (p.adapters > 1 << 20) return "there must be at most 1048576 adapters";
  return nullptr;
}

// ---- kernels of lowrank_cuda.cu that backward uses too ----

struct Down {
  int64_t tokens, width, rank, adapters;
  const void* wide;  // (tokens, width)
  int64_t row_stride;
  const void* factor;            // packed: (adapters, parts, padded rank, width)
  const int64_t* adapter_index;  // or null
  Dropout dropout;
  const int64_t* device_seed;
  float scale;
  int slices, chunks_of_slice;
  float* to;  // (slices, tokens, rank): sums over the columns of each slice
};
int launch_down(const Down& p, const Kind& kind, void* stream);

// A and B to where PackedFactors says.
struct Pack {
  const void* from;  // (adapters, rank, width), or (adapters, width, rank) if transposed
  bool transposed;
  DType dtype, part_dtype;
  int64_t adapters, rank, width;
  int padded, parts;
  uint16_t* to;  // (adapters, parts, padded, width)

  LWFT_HOST_DEVICE int64_t count() const { return adapters * padded * width; }
};
int launch_pack(const Pack& a, const Pack& b, void* stream);

template <class P>
int launch_pack(const P& p, void* stream) {
  const Kind kind(p);
  const PackedFactors space(p);
  float* const workspace = static_cast<float*>(p.workspace);
  const auto pack = [&](const void* from, bool transposed, int64_t width, int64_t at) {
    return Pack{from,   transposed, p.param_dtype, kind.part_dtype(), p.adapters,
                p.rank, width,      kind.rank,     kind.parts(),      reinterpret_cast<uint16_t*>(workspace + at)};
  };
  return launch_pack(pack(p.a, false, p.in_features, space.a), pack(p.b, true, p.out_features, space.b), stream);
}

// A middle from its partial sums, in the order of the slices: in float32, or as parts for the next product.
struct SumMiddle {
  const float* from;  // (slices, tokens, rank)
  int64_t slices, tokens, rank;
  const int64_t* adapter_index;  // or null; rows without adapter are not read but 0
  int64_t adapters;
  float* to;           // (tokens, rank), or null
  uint16_t* parts_to;  // (tokens, parts, padded), or null
  DType part_dtype;
  int padded, parts;
};
int launch_sum_middle(const SumMiddle& p, void* stream);

}  // namespace lwft::cuda::lowrank
