// The low-rank product backward on tensor cores, bf16 and fp16, sm_80 and later. With h = dropout(x) A^T from forward:
//
//     ds = scale * dy B,   dB = scale * dy^T h,   dbias = sum of dy;      dA = ds^T dropout(x),   dx = mask * (ds A)
//
// One kernel goes through dy and then through x. A block owns some columns and a range of tokens: its part of dF = m^T
// wide stays in registers, and is added to those of the other ranges by a second kernel, in their order. From the tile
// that lies in shared memory for it, the block also makes
//
//   of dy  its columns' part of ds, for ranks up to 32 (and not for float16 beside float32), and the sum of dy. Parts of ds are summed up by another kernel; at
//          higher ranks they would be more to write and read than dy, which is then read a second time (launch_down).
//   of x   the mask, drawn once for dA and dx: bits in the registers of the lanes that hold the same elements of dx. They
//          put zeros into the tile for dA.
//
// h and ds come as 16-bit parts (SumMiddle). With stacked adapters a block is of one adapter, and reads its rows alone.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "lowrank/lowrank_cuda.cuh"

namespace lwft::cuda::lowrank {
namespace {

struct Gradients {
  int64_t tokens, width, rank, adapters;
  const void* wide;  // (tokens, width): dy or x
  int64_t row_stride;
  const void* middle;            // (tokens, parts, padded rank): h or ds
  const void* factor;            // packed: (adapters, parts, padded rank, width)
  const int64_t* adapter_index;  // or null
  Dropout dropout;
  const int64_t* device_seed;
  float scale;
  int slices, ranges, tiles_of_range;
  float* gradient;  // (ranges, adapters, width, rank) or null
  // of dy, or null
  float* middle_to;   // (slices, tokens, rank): scale * dy F^T over the columns of a slice
  float* column_sum;  // (ranges, width)
  // of x, or null
  void* dx;  // (tokens, width)
};

// Columns of a block: as many as leave room in registers for their sums over the rank.
template <class P, int R>
constexpr int kColumns = R <= 32 && P::kInputParts == 1 ? 2 * kChunk : kChunk;
template <class P, int R>
constexpr int kTileStride = kColumns<P, R> + kPad;
// Columns of dF that a warp sums up, in mma tiles of 16.
template <class P, int R>
constexpr int kOwnTiles = kColumns<P, R> / kWarps / 16;
// Whether the pass over dy gives ds too.
template <class P, int R>
constexpr bool kGivesMiddle = kColumns<P, R> == 2 * kChunk;

template <class P, int R>
constexpr int kMiddleStride = P::kParts * R + kPad;
template <class P, int R>
constexpr int kStage = kRows * (kTileStride<P, R> + kMiddleStride<P, R>);
// Rows of the factor that stay in shared memory: for dx as many parts as its product takes, for ds all.
template <class P, int R, bool OfX>
constexpr int kFactorRows = OfX                  ? P::kUpParts * R
                            : kGivesMiddle<P, R> ? P::kParts * R
                                                 : 0;
template <class P, int R, bool OfX>
constexpr size_t kGradientsShared =
    (kFactorRows<P, R, OfX> * kTileStride<P, R> + kStages * kStage<P, R>)*sizeof(uint16_t);

// As copy_rows; the rows of other adapters become zero.
template <int Columns, class T>
LWFT_DEVICE void copy_tokens(T* to, const void* from, int64_t row_stride, int64_t first_row, int64_t column,
                             int64_t columns_left, const Gradients& p, int64_t adapter) {
  if (p.adapter_index == nullptr) {
    return copy_rows<kThreads>(to, kRows, Columns, static_cast<const T*>(from) + first_row * row_stride + column,
                               row_stride, p.tokens - first_row, columns_left);
  }
  for (int i = thread_index(); i < kRows * Columns / 8; i += kThreads) {
    const int r = i / (Columns / 8), c = i % (Columns / 8) * 8;
    const int64_t row = first_row + r;
    const bool valid = c < columns_left && adapter_of(p.adapter_index, row, p.tokens) == adapter;
    copy_async(to + r * (Columns + kPad) + c,
               valid ? static_cast<const T*>(from) + row * row_stride + column + c : from, valid);
  }
}

// Zeros for what dropout drops of the warp's 16 rows of the tile. Of a block of 64 columns, `kept` gets a bit for each
// element that the lane holds, at ((tile of 8 columns) * 2 + half) * 2 + element.
template <class P, int R>
LWFT_DEVICE void mask_tile(const Dropout& dropout, int64_t first_row, int64_t first_column, typename P::T* x,
                           uint32_t (&kept)[kColumns<P, R> / kChunk]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int b = 0; b < kColumns<P, R> / kChunk; ++b) {
    kept[b] = 0;
    typename P::T* const own = x + (warp * 16 + lane / 4) * kTileStride<P, R> + b * kChunk + lane % 4 * 2;
    for_kept_pairs(
        dropout, first_row + warp * 16, first_column + b * kChunk, [&](int half, int side, int v, uint32_t mask) {
          uint32_t* const pair = reinterpret_cast<uint32_t*>(own + half * 8 * kTileStride<P, R> + (2 * v + side) * 8);
          *pair &= mask;
          kept[b] |= ((mask & 1u) | (mask >> 30 & 2u)) << (((2 * v + side) * 2 + half) * 2);
        });
  }
}

// The warp's 16 rows of 64 columns of the tile as A fragments.
template <class P, int R>
LWFT_DEVICE void load_rows(const typename P::T* tile, int block, uint32_t (&a)[4][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    ldmatrix_x4(a[v], tile + (warp * 16 + lane % 16) * kTileStride<P, R> + block * kChunk + v * 16 + lane / 16 * 8);
  }
}

// dF += wide^T m for the warp's columns, over the tile's 64 tokens.
template <class P, int R>
LWFT_DEVICE void add_gradient(const typename P::T* tile, const typename P::E* middle,
                              float (&total)[kOwnTiles<P, R>][R / 8][4]) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int m = 0; m < kOwnTiles<P, R>; ++m) {
    uint32_t a[4][4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      ldmatrix_x4_transposed(a[v], tile + (v * 16 + lane % 8 + lane / 16 * 8) * kTileStride<P, R> +
                                       (warp * kOwnTiles<P, R> + m) * 16 + lane / 8 % 2 * 8);
    }
    add_product<P, R, true>(a, middle, kMiddleStride<P, R>, total[m]);
  }
}

// Blocks that a multiprocessor has registers for, without spilling on any architecture. (Left to itself, the compiler
// spills a few for one block more.)
template <class P, int R>
constexpr int kLeastBlocks = P::kParts == 1 && (R == 16 || R == 64) ? 3 : 2;

template <class P, int R, bool OfX>
LWFT_KERNEL(kThreads, kLeastBlocks<P, R>)
gradients_kernel(Gradients p) {
  using T = typename P::T;
  using E = typename P::E;
  constexpr int kBlocksOfColumns = kColumns<P, R> / kChunk;
  constexpr bool kHasMiddle = !OfX && kGivesMiddle<P, R>;
  E* const factor = reinterpret_cast<E*>(shared_memory());
  T* const stages = reinterpret_cast<T*>(factor + kFactorRows<P, R, OfX> * kTileStride<P, R>);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  // in 32 bits what lives throughout: registers are few
  const int slice = block_index() % p.slices, range = block_index() / p.slices % p.ranges;
  const int adapter = block_index() / p.slices / p.ranges;
  const int first_column = slice * kColumns<P, R>, columns_left = static_cast<int>(p.width) - first_column;
  const int first_tile = range * p.tiles_of_range, left = static_cast<int>(ceil_div(p.tokens, kRows)) - first_tile;
  const int tiles = left < p.tiles_of_range ? left : p.tiles_of_range;
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const float scale = p.scale * static_cast<float>(dropout.keep_scale);
  const bool stacked = p.adapter_index != nullptr;
  const bool wants_middle = kHasMiddle && p.middle_to != nullptr, wants_sum = !OfX && p.column_sum != nullptr;
  const bool wants_dx = OfX && p.dx != nullptr, wants_gradient = p.gradient != nullptr;
  const bool wants_wide = wants_gradient || wants_middle || wants_sum;

  if (wants_middle || wants_dx) {
    copy_rows<kThreads>(factor, kFactorRows<P, R, OfX>, kColumns<P, R>,
                        static_cast<const E*>(p.factor) + int64_t{adapter} * P::kParts * R * p.width + first_column,
                        p.width, kFactorRows<P, R, OfX>, columns_left);
  }
  float gradient[kOwnTiles<P, R>][R / 8][4] = {};
  float sum[2] = {0.0f, 0.0f};  // of the columns 2 thread_index(), + 1

  const auto first_row_of = [&](int tile) { return static_cast<int64_t>(first_tile + tile) * kRows; };
  // the rows of no adapter are written by the blocks of the first
  const auto concerns = [&](int tile) {
    return !stacked ||
           tile_has(p.adapter_index, first_row_of(tile), p.tokens, p.adapters, adapter, wants_dx && adapter == 0);
  };
  const auto load = [&](int tile, T* stage) {
    if (!concerns(tile)) return;
    const int64_t first_row = first_row_of(tile);
    if (wants_wide) {
      copy_tokens<kColumns<P, R>>(stage, p.wide, p.row_stride, first_row, first_column, columns_left, p, adapter);
    }
    copy_tokens<P::kParts * R>(reinterpret_cast<E*>(stage + kRows * kTileStride<P, R>), p.middle, P::kParts * R,
                               first_row, 0, P::kParts * R, p, adapter);
  };
  const auto use = [&](int tile, T* wide) {
    if (!concerns(tile)) return;
    const E* const middle = reinterpret_cast<const E*>(wide + kRows * kTileStride<P, R>);
    const int64_t first_row = first_row_of(tile), own_row = first_row + warp * 16 + lane / 4;
    uint32_t kept[kBlocksOfColumns] = {};
    if constexpr (OfX) {
      if (dropout.active()) {
        mask_tile<P, R>(dropout, first_row, first_column, wide, kept);
        block_barrier();  // other warps read these rows
      }
    }
    if (wants_gradient) add_gradient<P, R>(wide, middle, gradient);
    if constexpr (kHasMiddle) {
      if (wants_middle) {
        float found[R / 8][4] = {};
#pragma unroll P::kParts == 1 ? 2 : 1
        for (int b = 0; b < kBlocksOfColumns; ++b) {
          uint32_t a[4][4];
          load_rows<P, R>(wide, b, a);
          add_product<P, R, false>(a, factor + b * kChunk, kTileStride<P, R>, found);
        }
        float* const to = p.middle_to + slice * p.tokens * p.rank;
#pragma unroll
        for (int j = 0; j < R / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t row = own_row + i / 2 * 8;
            const int column = j * 8 + lane % 4 * 2 + i % 2;
            if (row >= p.tokens || column >= p.rank || (stacked && p.adapter_index[row] != adapter)) continue;
            to[row * p.rank + column] = scale * found[j][i];
          }
        }
      }
    }
    if (wants_sum && thread_index() < kColumns<P, R> / 2) {
      for (int r = 0; r < kRows; ++r) {
        const T* const pair = wide + r * kTileStride<P, R> + 2 * thread_index();
        sum[0] += to_float(pair[0]);
        sum[1] += to_float(pair[1]);
      }
    }
    if constexpr (OfX) {
      if (!wants_dx) return;
#pragma unroll
      for (int b = 0; b < kBlocksOfColumns; ++b) {
        float y[kChunk / 8][4] = {};
#pragma unroll
        for (int k = 0; k < R / 16; ++k) {
          uint32_t m[P::kUpParts][4];
#pragma unroll
          for (int part = 0; part < P::kUpParts; ++part) {
            ldmatrix_x4(m[part],
                        middle + (warp * 16 + lane % 16) * kMiddleStride<P, R> + part * R + k * 16 + lane / 16 * 8);
          }
          add_up_product<P, R>(m, factor + k * 16 * kTileStride<P, R> + b * kChunk, kTileStride<P, R>, y);
        }
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool keep = !dropout.active() || (kept[b] >> (j * 4 + i) & 1u) != 0;
            y[j][i] = keep ? scale * y[j][i] : 0.0f;
          }
        }
        bool writes[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = own_row + 8 * half;
          writes[half] = row < p.tokens;
          if (!stacked || !writes[half]) continue;
          const int64_t own = p.adapter_index[row];
          const bool none = own < 0 || own >= p.adapters;
          writes[half] = own == adapter || (none && adapter == 0);
          if (!none) continue;
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
            y[j][2 * half] = y[j][2 * half + 1] = names_none(own, p.adapters) ? quiet_nan() : 0.0f;
          }
        }
        const int64_t column = first_column + b * kChunk;
        store_tile<T>(y, false, p.width - column, [&](int half) {
          return writes[half] ? static_cast<T*>(p.dx) + (own_row + 8 * half) * p.width + column : nullptr;
        });
      }
    }
  };
  for_chunks(tiles, stages, kStage<P, R>, load, use);

  if (wants_gradient) {
    float* const to = p.gradient + (int64_t{range} * p.adapters + adapter) * p.width * p.rank;
#pragma unroll
    for (int m = 0; m < kOwnTiles<P, R>; ++m) {
#pragma unroll
      for (int j = 0; j < R / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first_column + (warp * kOwnTiles<P, R> + m) * 16 + lane / 4 + i / 2 * 8;
          const int column = j * 8 + lane % 4 * 2 + i % 2;
          if (row < p.width && column < p.rank) to[row * p.rank + column] = scale * gradient[m][j][i];
        }
      }
    }
  }
  if (wants_sum && 2 * thread_index() < kColumns<P, R> && 2 * thread_index() < columns_left) {
    float* const to = p.column_sum + range * p.width + first_column + 2 * thread_index();
    to[0] = sum[0];
    to[1] = sum[1];
  }
}

// to = the sum of the partial sums, in their order. Where it is A that they are of, they lie transposed.
struct SumPartials {
  const float* from;  // (count, size)
  int64_t count, size;
  bool transposed;  // (adapters, width, rank) to (adapters, rank, width)
  int64_t width, rank;
  DType dtype;
  void* to;
};

LWFT_KERNEL(kThreads)
sum_partials_kernel(SumPartials p) {
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (i >= p.size) return;
  float total = 0.0f;
  for (int64_t part = 0; part < p.count; ++part) total += p.from[part * p.size + i];
  const int64_t k = i % p.rank, column = i / p.rank % p.width, adapter = i / p.rank / p.width;
  set_value(p.dtype, p.to, p.transposed ? (adapter * p.rank + k) * p.width + column : i, total);
}

int launch_sum_partials(const SumPartials& p, void* stream) {
  return launch(sum_partials_kernel, static_cast<int>(ceil_div(p.size, kThreads)), kThreads, 0, stream, p);
}

// ---- instances ----

struct Instance {
  Kind kind;
  int columns;
  bool gives_middle;
  size_t of_x_bytes, of_grad_bytes;
  void (*of_x)(Gradients);
  void (*of_grad)(Gradients);
};

template <class X, class Parameter, int R>
constexpr Instance instance(DType dtype) {
  using P = Operands<X, Parameter>;
  static_assert(kGradientsShared<P, R, true> <= kLargestShared && kGradientsShared<P, R, false> <= kLargestShared);
  return {Kind(dtype, P::kParts > 1, R),
          kColumns<P, R>,
          kGivesMiddle<P, R>,
          kGradientsShared<P, R, true>,
          kGradientsShared<P, R, false>,
          gradients_kernel<P, R, true>,
          gradients_kernel<P, R, false>};
}

const Instance kInstances[] = {
    instance<BFloat16, BFloat16, 16>(DType::bf16), instance<BFloat16, BFloat16, 32>(DType::bf16),
    instance<BFloat16, BFloat16, 64>(DType::bf16), instance<BFloat16, BFloat16, 128>(DType::bf16),
    instance<Float16, Float16, 16>(DType::f16),    instance<Float16, Float16, 32>(DType::f16),
    instance<Float16, Float16, 64>(DType::f16),    instance<Float16, Float16, 128>(DType::f16),
    instance<BFloat16, float, 16>(DType::bf16),    instance<BFloat16, float, 32>(DType::bf16),
    instance<BFloat16, float, 64>(DType::bf16),    instance<Float16, float, 16>(DType::f16),
    instance<Float16, float, 32>(DType::f16),      instance<Float16, float, 64>(DType::f16),
};

const Instance& instance_of(const Kind& kind) {
  const Instance* found = kInstances;
  while (!(found->kind == kind)) ++found;  // low_rank_cuda_declines has seen to it that there is one
  return *found;
}

// A pass over a (tokens, width) matrix.
struct Pass {
  int64_t slices, ranges, tiles_of_range;

  Pass(int64_t tokens, int64_t width, int64_t adapters, int columns) : slices(ceil_div(width, columns)) {
    const int64_t tiles = ceil_div(tokens, kRows), wanted = ceil_div(kBlocks, slices * adapters);
    tiles_of_range = tiles == 0 ? 1 : ceil_div(tiles, wanted);
    ranges = ceil_div(tiles, tiles_of_range);
  }
  int blocks(int64_t adapters) const { return static_cast<int>(slices * ranges * adapters); }
};

// Whether ds comes from the pass that gives dB; else from one of its own.
bool middle_with_gradient(const LowRankBackward& p) { return p.db != nullptr && instance_of(Kind(p)).gives_middle; }
bool wants_middle(const LowRankBackward& p) { return p.dx != nullptr || p.da != nullptr; }

struct BackwardSpace : PackedFactors {
  Pass of_grad, of_x;
  Slices down;                     // of dy, in the pass of its own
  int64_t middle_slices;           // parts of ds
  int64_t hidden, middle;          // in 16-bit parts
  int64_t middle_sums, gradients;  // partial sums; of dB and of dA, one after the other, in one place
  int64_t column_sums, floats;

  explicit BackwardSpace(const LowRankBackward& p)
      : PackedFactors(p),
        of_grad(p.tokens, p.out_features, p.adapters, instance_of(Kind(p)).columns),
        of_x(p.tokens, p.in_features, p.adapters, instance_of(Kind(p)).columns),
        down(p.tokens, p.out_features, 8) {
    const Kind kind(p);
    const int64_t parts = floats_of_halves(p.tokens * kind.parts() * kind.rank);
    middle_slices = middle_with_gradient(p) ? of_grad.slices : down.count;
    hidden = end;
    middle = hidden + (p.db != nullptr ? parts : 0);
    middle_sums = middle + (wants_middle(p) ? parts : 0);
    gradients = middle_sums + (wants_middle(p) ? round_to_16_bytes(middle_slices * p.tokens * p.rank) : 0);
    const int64_t of_b = p.db != nullptr ? of_grad.ranges * p.out_features : 0;
    const int64_t of_a = p.da != nullptr ? of_x.ranges * p.in_features : 0;
    column_sums = gradients + (of_a > of_b ? of_a : of_b) * p.adapters * p.rank;
    floats = column_sums + (p.dbias != nullptr ? of_grad.ranges * p.out_features : 0);
  }
};

Gradients pass_over(const LowRankBackward& p, const Pass& pass) {
  Gradients g{};
  g.tokens = p.tokens;
  g.rank = p.rank;
  g.adapters = p.adapters;
  g.adapter_index = p.adapter_index;
  g.slices = static_cast<int>(pass.slices);
  g.ranges = static_cast<int>(pass.ranges);
  g.tiles_of_range = static_cast<int>(pass.tiles_of_range);
  return g;
}

// dB, dbias and, with them or alone, ds in parts.
int enqueue_of_grad(const LowRankBackward& p, const BackwardSpace& space, float* workspace, void* stream) {
  const Kind kind(p);
  const Instance& instance = instance_of(kind);
  const bool with_gradient = wants_middle(p) && middle_with_gradient(p);
  if (p.db != nullptr) {
    SumMiddle parts{};
    parts.from = static_cast<const float*>(p.hidden);
    parts.slices = 1;
    parts.tokens = p.tokens;
    parts.rank = p.rank;
    parts.adapters = p.adapters;
    parts.parts_to = reinterpret_cast<uint16_t*>(workspace + space.hidden);
    parts.part_dtype = kind.part_dtype();
    parts.padded = kind.rank;
    parts.parts = kind.parts();
    if (const int error = launch_sum_middle(parts, stream)) return error;
  }
  if (p.db != nullptr || p.dbias != nullptr) {
    Gradients g = pass_over(p, space.of_grad);
    g.width = p.out_features;
    g.wide = p.grad_out;
    g.row_stride = p.grad_out_row_stride;
    g.middle = workspace + space.hidden;
    g.factor = workspace + space.b;
    g.scale = static_cast<float>(p.scale);
    g.gradient = p.db != nullptr ? workspace + space.gradients : nullptr;
    g.middle_to = with_gradient ? workspace + space.middle_sums : nullptr;
    g.column_sum = p.dbias != nullptr ? workspace + space.column_sums : nullptr;
    if (const int error =
            launch(instance.of_grad, space.of_grad.blocks(p.adapters), kThreads, instance.of_grad_bytes, stream, g)) {
      return error;
    }
  }
  if (!wants_middle(p)) return 0;
  if (!with_gradient) {
    Down down{};
    down.tokens = p.tokens;
    down.width = p.out_features;
    down.rank = p.rank;
    down.adapters = p.adapters;
    down.wide = p.grad_out;
    down.row_stride = p.grad_out_row_stride;
    down.factor = workspace + space.b;
    down.adapter_index = p.adapter_index;
    down.scale = static_cast<float>(p.scale);
    down.slices = static_cast<int>(space.down.count);
    down.chunks_of_slice = static_cast<int>(space.down.chunks);
    down.to = workspace + space.middle_sums;
    if (const int error = launch_down(down, kind, stream)) return error;
  }
  const SumMiddle sum{workspace + space.middle_sums,
                      space.middle_slices,
                      p.tokens,
                      p.rank,
                      p.adapter_index,
                      p.adapters,
                      nullptr,
                      reinterpret_cast<uint16_t*>(workspace + space.middle),
                      kind.part_dtype(),
                      kind.rank,
                      kind.parts()};
  return launch_sum_middle(sum, stream);
}

// dA and dx from ds.
int enqueue_of_x(const LowRankBackward& p, const BackwardSpace& space, float* workspace, void* stream) {
  const Instance& instance = instance_of(Kind(p));
  Gradients g = pass_over(p, space.of_x);
  g.width = p.in_features;
  g.wide = p.x;
  g.row_stride = p.x_row_stride;
  g.middle = workspace + space.middle;
  g.factor = workspace + space.a;
  g.dropout = p.dropout;
  g.device_seed = p.device_seed;
  g.scale = 1.0f;
  g.gradient = p.da != nullptr ? workspace + space.gradients : nullptr;
  g.dx = p.dx;
  return launch(instance.of_x, space.of_x.blocks(p.adapters), kThreads, instance.of_x_bytes, stream, g);
}

}  // namespace
}  // namespace lwft::cuda::lowrank

namespace lwft {

using namespace cuda::lowrank;

const char* low_rank_cuda_declines(const LowRankBackward& p) {
  if (const char* reason = declines(p)) return reason;
  if (p.adapter_index != nullptr && p.dbias != nullptr) return "the gradient of the bias beside stacked adapters";
  if (p.grad_out_row_stride % 8 != 0) return "the rows of grad_out must start at multiples of 16 bytes";
  if (!cuda::aligned(p.grad_out)) return "grad_out must start at a multiple of 16 bytes";
  return nullptr;
}

int64_t low_rank_backward_workspace(const LowRankBackward& p) { return BackwardSpace(p).floats; }

int low_rank_backward_cuda(const LowRankBackward& p, void* stream) {
  const BackwardSpace space(p);
  float* const workspace = static_cast<float*>(p.workspace);
  if (p.tokens > 0) {
    if (const int error = launch_pack(p, stream)) return error;
    if (const int error = enqueue_of_grad(p, space, workspace, stream)) return error;
  }
  const int64_t rank = p.rank;
  if (p.db != nullptr) {  // before dA, whose partial sums lie in the same place
    const int64_t size = p.adapters * p.out_features * rank;
    const SumPartials sum{
        workspace + space.gradients, space.of_grad.ranges, size, false, p.out_features, rank, p.param_dtype, p.db};
    if (const int error = launch_sum_partials(sum, stream)) return error;
  }
  if (p.dbias != nullptr) {
    const SumPartials sum{workspace + space.column_sums,
                          space.of_grad.ranges,
                          p.out_features,
                          false,
                          p.out_features,
                          1,
                          p.bias_dtype,
                          p.dbias};
    if (const int error = launch_sum_partials(sum, stream)) return error;
  }
  if (!wants_middle(p)) return 0;
  if (p.tokens > 0) {
    if (const int error = enqueue_of_x(p, space, workspace, stream)) return error;
  }
  if (p.da == nullptr) return 0;
  const int64_t size = p.adapters * p.in_features * rank;
  const SumPartials sum{
      workspace + space.gradients, space.of_x.ranges, size, true, p.in_features, rank, p.param_dtype, p.da};
  return launch_sum_partials(sum, stream);
}

}  // namespace lwft
