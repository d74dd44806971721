// The low-rank product forward on tensor cores, bf16 and fp16, sm_80 and later:
//
//     h = dropout(x) A^T,   out = bias + scale * h B^T   or   out += scale * h B^T
//
// Both are bound by memory: the first by reading x, the second by writing out (and by reading it, where it is added to).
// Between them lies h, which backward wants anyway and which is d / rank times smaller. A kernel of both would have to
// keep 64 tokens for all of a row, so few blocks, or read B as often as there are tiles.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "lowrank/lowrank_cuda.cuh"

namespace lwft::cuda::lowrank {
namespace {

// ---- down ----

// Columns of a slice at least: 8 stages, so that starting and adding up are small beside it.
constexpr int64_t kLeastDownChunks = 8;

template <class P, int R>
constexpr int kDownStage = (kRows + P::kParts * R) * kStride;  // x, the factor
constexpr size_t kListBytes = kRows * sizeof(int);             // the adapters of a tile
template <class P, int R>
constexpr size_t kDownShared = kListBytes + kStages * kDownStage<P, R> * sizeof(uint16_t);

template <class P, int R>
LWFT_KERNEL(kThreads)
down_kernel(Down p) {
  using T = typename P::T;
  using E = typename P::E;
  int* const list = reinterpret_cast<int*>(shared_memory());
  T* const stages = reinterpret_cast<T*>(shared_memory() + kListBytes);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const int slice = block_index() % p.slices;
  const int64_t first_row = int64_t{block_index() / p.slices} * kRows;
  const int first_chunk = slice * p.chunks_of_slice, left = static_cast<int>(ceil_div(p.width, kChunk)) - first_chunk;
  const int chunks = left < p.chunks_of_slice ? left : p.chunks_of_slice;
  const Dropout dropout = device_dropout(p.dropout, p.device_seed);
  const bool stacked = p.adapter_index != nullptr;
  const int adapters = stacked ? list_adapters(p.adapter_index, first_row, p.tokens, p.adapters, list) : 1;
  const int64_t own_row = first_row + warp * 16 + lane / 4;
  int64_t own[2] = {0, 0};  // adapters of the lane's rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (stacked) own[half] = adapter_of(p.adapter_index, own_row + 8 * half, p.tokens);
  }

  // A chunk of x is taken once for each adapter of the tile, with the rows of the others as zeros.
  const auto load = [&](int turn, T* stage) {
    const int column = (first_chunk + turn / adapters) * kChunk;
    const int64_t adapter = stacked ? list[turn % adapters] : 0;
    copy_rows<kThreads>(stage, kRows, kChunk, static_cast<const T*>(p.wide) + first_row * p.row_stride + column,
                        p.row_stride, p.tokens - first_row, p.width - column);
    copy_rows<kThreads>(stage + kRows * kStride, P::kParts * R, kChunk,
                        static_cast<const T*>(p.factor) + adapter * P::kParts * R * p.width + column, p.width,
                        P::kParts * R, p.width - column);
  };
  float total[R / 8][4] = {};
  const auto use = [&](int turn, const T* x) {
    uint32_t a[4][4];
#pragma unroll
    for (int v = 0; v < 4; ++v) ldmatrix_x4(a[v], x + (warp * 16 + lane % 16) * kStride + v * 16 + lane / 16 * 8);
    if (dropout.active()) {
      for_kept_pairs(dropout, first_row + warp * 16, (first_chunk + turn / adapters) * kChunk,
                     [&](int half, int side, int v, uint32_t mask) { a[v][half + 2 * side] &= mask; });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!stacked || own[half] == list[turn % adapters]) continue;
#pragma unroll
      for (int v = 0; v < 4; ++v) a[v][half] = a[v][half + 2] = 0;
    }
    add_product<P, R, false>(a, reinterpret_cast<const E*>(x + kRows * kStride), kStride, total);
  };
  if (adapters > 0) for_chunks(chunks * adapters, stages, kDownStage<P, R>, load, use);

  const float factor = p.scale * static_cast<float>(dropout.keep_scale);
  float* const to = p.to + slice * p.tokens * p.rank;
#pragma unroll
  for (int j = 0; j < R / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = own_row + i / 2 * 8;
      const int column = j * 8 + lane % 4 * 2 + i % 2;
      if (row >= p.tokens || column >= p.rank) continue;
      to[row * p.rank + column] = names_none(own[i / 2], p.adapters) ? quiet_nan() : factor * total[j][i];
    }
  }
}

// ---- up ----

constexpr int64_t kLeastUpChunks = 4;

struct Up {
  int64_t tokens, width, rank, adapters;
  const float* middle;           // (tokens, rank)
  const void* factor;            // packed: (adapters, parts, padded rank, width)
  const int64_t* adapter_index;  // or null
  const void* bias;              // (width) or null
  DType bias_dtype;
  float scale;
  bool accumulate;
  int slices, chunks_of_slice;
  void* out;
  int64_t out_row_stride;
};

template <class P, int R>
constexpr int kUpStage = P::kUpParts * R * kStride;
template <class P, int R>
constexpr size_t kUpShared = kListBytes + kStages * kUpStage<P, R> * sizeof(uint16_t);

// The warp's 16 rows of the middle as A fragments, in parts. Read from where it lies: once for a run of chunks.
template <class P, int R>
LWFT_DEVICE void load_middle(const Up& p, int64_t own_row, uint32_t (&m)[R / 16][P::kUpParts][4]) {
  using E = typename P::E;
  const int lane = thread_index() % kWarpLanes;
#pragma unroll
  for (int k = 0; k < R / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = own_row + i % 2 * 8;
      const int column = k * 16 + i / 2 * 8 + lane % 4 * 2;
      float value[2] = {0.0f, 0.0f};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row < p.tokens && column + e < p.rank) value[e] = p.middle[row * p.rank + column + e];
      }
#pragma unroll
      for (int part = 0; part < P::kUpParts; ++part) {
        m[k][part][i] = pack<E>(value[0], value[1]);
        value[0] -= to_float(E{static_cast<uint16_t>(m[k][part][i])});
        value[1] -= to_float(E{static_cast<uint16_t>(m[k][part][i] >> 16)});
      }
    }
  }
}

template <class P, int R>
LWFT_KERNEL(kThreads, R <= (P::kParts == 1 ? 32 : 16) ? 4 : 3)  // blocks that a multiprocessor has registers for
up_kernel(Up p) {
  using T = typename P::T;
  using E = typename P::E;
  int* const list = reinterpret_cast<int*>(shared_memory());
  E* const stages = reinterpret_cast<E*>(shared_memory() + kListBytes);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  const int slice = block_index() % p.slices;
  const int64_t first_row = int64_t{block_index() / p.slices} * kRows;
  const int first_chunk = slice * p.chunks_of_slice, left = static_cast<int>(ceil_div(p.width, kChunk)) - first_chunk;
  const int chunks = left < p.chunks_of_slice ? left : p.chunks_of_slice;
  const bool stacked = p.adapter_index != nullptr;
  const int listed = stacked ? list_adapters(p.adapter_index, first_row, p.tokens, p.adapters, list) : 1;
  const int adapters = listed > 0 ? listed : 1;  // without any, the bias is written all the same
  if (stacked && listed == 0) {
    if (thread_index() == 0) list[0] = 0;
    block_barrier();
  }
  const int64_t own_row = first_row + warp * 16 + lane / 4;
  int64_t own[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (stacked) own[half] = adapter_of(p.adapter_index, own_row + 8 * half, p.tokens);
  }
  uint32_t m[R / 16][P::kUpParts][4];
  load_middle<P, R>(p, own_row, m);

  const auto load = [&](int turn, E* stage) {
    const int column = (first_chunk + turn / adapters) * kChunk;
    const int64_t adapter = stacked ? list[turn % adapters] : 0;
    copy_rows<kThreads>(stage, P::kUpParts * R, kChunk,
                        static_cast<const E*>(p.factor) + adapter * P::kParts * R * p.width + column, p.width,
                        P::kUpParts * R, p.width - column);
  };
  float y[kChunk / 8][4] = {};
  const auto use = [&](int turn, const E* factor) {
#pragma unroll
    for (int k = 0; k < R / 16; ++k) {
      uint32_t a[P::kUpParts][4];
#pragma unroll
      for (int part = 0; part < P::kUpParts; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[part][i] = stacked && own[i % 2] != list[turn % adapters] ? 0 : m[k][part][i];
        }
      }
      add_up_product<P, R>(a, factor + k * 16 * kStride, kStride, y);
    }
    if (turn % adapters + 1 < adapters) return;

    const int first_column = (first_chunk + turn / adapters) * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      const int column = first_column + j * 8 + lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bias = p.bias != nullptr && column < p.width ? value_at(p.bias_dtype, p.bias, column + e) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& value = y[j][2 * half + e];
          value = names_none(own[half], p.adapters) ? quiet_nan() : p.scale * value + bias;
        }
      }
    }
    store_tile<T>(y, p.accumulate, p.width - first_column, [&](int half) {
      const int64_t row = own_row + 8 * half;
      return row < p.tokens ? static_cast<T*>(p.out) + row * p.out_row_stride + first_column : nullptr;
    });
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = 0.0f;
    }
  };
  for_chunks(chunks * adapters, stages, kUpStage<P, R>, load, use);
}

// ---- what is small ----

LWFT_DEVICE void pack_element(const Pack& p, int64_t i) {
  const int64_t column = i % p.width, k = i / p.width % p.padded, adapter = i / p.width / p.padded;
  const int64_t from =
      p.transposed ? (adapter * p.width + column) * p.rank + k : (adapter * p.rank + k) * p.width + column;
  set_parts(p.part_dtype, p.to + (adapter * p.parts * p.padded + k) * p.width + column, p.padded * p.width, p.parts,
            k < p.rank ? value_at(p.dtype, p.from, from) : 0.0f);
}

LWFT_KERNEL(kThreads)
pack_kernel(Pack a, Pack b) {
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (i < a.count()) return pack_element(a, i);
  if (i < a.count() + b.count()) pack_element(b, i - a.count());
}

LWFT_KERNEL(kThreads)
sum_middle_kernel(SumMiddle p) {
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  const int64_t row = i / p.padded, column = i % p.padded;
  if (row >= p.tokens) return;
  float total = 0.0f;
  const int64_t adapter = p.adapter_index != nullptr ? p.adapter_index[row] : 0;
  if (names_none(adapter, p.adapters)) total = quiet_nan();
  for (int64_t slice = 0; slice < p.slices && column < p.rank && adapter >= 0 && adapter < p.adapters; ++slice) {
    total += p.from[(slice * p.tokens + row) * p.rank + column];
  }
  if (p.to != nullptr && column < p.rank) p.to[row * p.rank + column] = total;
  if (p.parts_to != nullptr) {
    set_parts(p.part_dtype, p.parts_to + row * p.parts * p.padded + column, p.padded, p.parts, total);
  }
}

// ---- instances ----

struct Instance {
  Kind kind;
  size_t down_bytes, up_bytes;
  void (*down)(Down);
  void (*up)(Up);
};

template <class X, class Parameter, int R>
constexpr Instance instance(DType dtype) {
  using P = Operands<X, Parameter>;
  static_assert(kDownShared<P, R> <= kLargestShared && kUpShared<P, R> <= kLargestShared);
  return {Kind(dtype, P::kParts > 1, R), kDownShared<P, R>, kUpShared<P, R>, down_kernel<P, R>, up_kernel<P, R>};
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

const Instance* instance_of(const Kind& kind) {
  for (const Instance& instance : kInstances) {
    if (instance.kind == kind) return &instance;
  }
  return nullptr;  // the reason why it declines says so
}

struct ForwardSpace : PackedFactors {
  Slices slices;  // of x
  int64_t partial, floats;

  explicit ForwardSpace(const LowRankForward& p)
      : PackedFactors(p), slices(p.tokens, p.in_features, kLeastDownChunks), partial(end) {
    floats = partial + (slices.count > 1 ? slices.count * p.tokens * p.rank : 0);
  }
};

int blocks_for(int64_t elements) { return static_cast<int>(ceil_div(elements, kThreads)); }

}  // namespace

int launch_down(const Down& p, const Kind& kind, void* stream) {
  const Instance& instance = *instance_of(kind);
  const auto blocks = static_cast<int>(ceil_div(p.tokens, kRows) * p.slices);
  return launch(instance.down, blocks, kThreads, instance.down_bytes, stream, p);
}

int launch_pack(const Pack& a, const Pack& b, void* stream) {
  return launch(pack_kernel, blocks_for(a.count() + b.count()), kThreads, 0, stream, a, b);
}

int launch_sum_middle(const SumMiddle& p, void* stream) {
  return launch(sum_middle_kernel, blocks_for(p.tokens * p.padded), kThreads, 0, stream, p);
}

}  // namespace lwft::cuda::lowrank

namespace lwft {

using namespace cuda::lowrank;

const char* low_rank_cuda_declines(const LowRankForward& p) {
  if (const char* reason = declines(p)) return reason;
  if (p.out_row_stride % 8 != 0) return "the rows of the result must start at multiples of 16 bytes";
  if (!cuda::aligned(p.out)) return "the result must start at a multiple of 16 bytes";
  return nullptr;
}

int64_t low_rank_forward_workspace(const LowRankForward& p) { return ForwardSpace(p).floats; }

int low_rank_forward_cuda(const LowRankForward& p, void* stream) {
  if (p.tokens == 0) return 0;
  const ForwardSpace space(p);
  const Kind kind(p);
  float* const workspace = static_cast<float*>(p.workspace);
  float* const hidden = static_cast<float*>(p.hidden);
  if (const int error = launch_pack(p, stream)) return error;

  Down down{};
  down.tokens = p.tokens;
  down.width = p.in_features;
  down.rank = p.rank;
  down.adapters = p.adapters;
  down.wide = p.x;
  down.row_stride = p.x_row_stride;
  down.factor = workspace + space.a;
  down.adapter_index = p.adapter_index;
  down.dropout = p.dropout;
  down.device_seed = p.device_seed;
  down.scale = 1.0f;
  down.slices = static_cast<int>(space.slices.count);
  down.chunks_of_slice = static_cast<int>(space.slices.chunks);
  down.to = down.slices > 1 ? workspace + space.partial : hidden;
  if (const int error = launch_down(down, kind, stream)) return error;
  if (down.slices > 1) {
    const SumMiddle sum{down.to, down.slices, p.tokens,   p.rank,    p.adapter_index, p.adapters,
                        hidden,  nullptr,     DType::f32, kind.rank, kind.parts()};
    if (const int error = launch_sum_middle(sum, stream)) return error;
  }

  const Slices slices(p.tokens, p.out_features, kLeastUpChunks);
  Up up{};
  up.tokens = p.tokens;
  up.width = p.out_features;
  up.rank = p.rank;
  up.adapters = p.adapters;
  up.middle = hidden;
  up.factor = workspace + space.b;
  up.adapter_index = p.adapter_index;
  up.bias = p.accumulate ? nullptr : p.bias;
  up.bias_dtype = p.bias_dtype;
  up.scale = static_cast<float>(p.scale);
  up.accumulate = p.accumulate;
  up.slices = static_cast<int>(slices.count);
  up.chunks_of_slice = static_cast<int>(slices.chunks);
  up.out = p.out;
  up.out_row_stride = p.out_row_stride;
  const Instance& instance = *instance_of(kind);
  const auto blocks = static_cast<int>(ceil_div(p.tokens, kRows) * up.slices);
  return cuda::launch(instance.up, blocks, kThreads, instance.up_bytes, stream, up);
}

}  // namespace lwft
