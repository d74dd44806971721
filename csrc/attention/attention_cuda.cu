// The attention forward on tensor cores, bf16 and fp16, sm_80 and later (FlashAttention-2, Dao 2023, algorithm 1). A block
// has 4 warps with 16 or 32 rows each of one key head (attention_cuda.cuh) and walks over the tiles of keys that its rows
// see: the prefix, then keys. K and V stream through shared memory, double buffered by asynchronous copies; scores and
// weights never leave the registers, where the layout in which the tensor core leaves S is the one in which it takes P.
//
// A fragment of K or V that a warp loads serves all of its rows. With 32 the tensor cores and not the shared memory are
// what a Hopper card waits for, hence two m-tiles where the registers hold them.
//
// Not yet run on a GPU: its numbers are tested in the emulation of common/cuda, its registers and instructions by nvcc.
#include "attention/attention_forward_cuda.cuh"

namespace lwft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpLanes;

template <class T, int D, int MTiles>
LWFT_DEVICE void store_rows(const AttentionForward& p, const HeadGroup& group, const Dropout& dropout, int row,
                            const SoftmaxRows<MTiles, D>& state) {
  const int lane = thread_index() % kWarpLanes;
  const float unit = score_unit(p.rule);
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + lane / 4 + 8 * half;
      if (r >= group.rows) continue;
      const float total = state.total[m][half], inverse = inverse_of(total, dropout);
      if (lane % 4 == 0) {
        static_cast<float*>(p.lse)[group.index(r)] = log_sum_exp(state.highest[m][half], total, unit);
      }
      T* to = static_cast<T*>(p.out.data) + group.offset(p.out.stride, r);
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const int column = d * 8 + lane % 4 * 2;
        if (column >= p.shape.head_dim) continue;
        *reinterpret_cast<uint32_t*>(to + column) =
            pack<T>(state.out[m][d][2 * half] * inverse, state.out[m][d][2 * half + 1] * inverse);
      }
    }
  }
}

template <class T, int D, int MTiles, int Keys>
LWFT_KERNEL(kThreads)
attention_forward_kernel(AttentionForward p, int blocks) {
  constexpr int kRows = kWarps * 16 * MTiles;
  const Dropout dropout = device_dropout(p.rule.dropout, p.rule.device_seed);
  const HeadGroup group(p.shape, p.rule, block_index() / blocks);
  // later rows see more keys: the longest blocks begin first
  const int number = block_index() % blocks, first_row = (p.rule.causal ? blocks - 1 - number : number) * kRows;
  const KeyTiles<Keys> tiles(group, first_row, minimum(first_row + kRows, group.rows) - 1);
  T* q = reinterpret_cast<T*>(shared_memory());
  T* stages = q + kRows * (D + kPad);
  const int warp_row = thread_index() / kWarpLanes * 16 * MTiles;
  SoftmaxRows<MTiles, D> state;
  if (tiles.count > 0) {
    copy_queries<kThreads, kRows, D>(q, group, p.q, first_row);  // lands with the first tile
    for_key_tiles<kThreads, T, Keys, D>(p, group, tiles, 0, tiles.count, stages,
                                        [&](const KeyTile& tile, const T* k, const T* v) {
                                          attend<T, MTiles, Keys, D>(group, dropout, tile, first_row + warp_row, 0,
                                                                     q + warp_row * (D + kPad), k, v, state);
                                        });
  }
  state.finish();
  store_rows<T, D, MTiles>(p, group, dropout, first_row + warp_row, state);
}

struct Instance {
  DType dtype;
  int largest_head, rows;
  size_t shared_bytes;
  void (*kernel)(AttentionForward, int);
};

template <class T, int D, int MTiles, int Keys>
constexpr Instance instance(DType dtype) {
  constexpr int kRows = kWarps * 16 * MTiles;
  // The largest, of 256, takes the 99 KiB that sm_86 and sm_120 have to the last byte.
  constexpr size_t kBytes = kRows * (D + kPad) * sizeof(uint16_t) + kStagesBytes<Keys, D>;
  static_assert(kBytes <= 99 * 1024);
  return {dtype, D, kRows, kBytes, attention_forward_kernel<T, D, MTiles, Keys>};
}

// Tiles as large as the registers hold: `out` takes D / 2 of them for 16 rows, the scores Keys / 2.
const Instance kInstances[] = {
    instance<BFloat16, 64, 2, 64>(DType::bf16),  instance<BFloat16, 128, 2, 32>(DType::bf16),
    instance<BFloat16, 256, 1, 32>(DType::bf16), instance<Float16, 64, 2, 64>(DType::f16),
    instance<Float16, 128, 2, 32>(DType::f16),   instance<Float16, 256, 1, 32>(DType::f16),
};

}  // namespace
}  // namespace lwft::cuda

namespace lwft {

const char* attention_cuda_declines(const AttentionForward& p) { return cuda::inputs_decline(p); }

int64_t attention_forward_workspace(const AttentionForward& p) { return cuda::decode_workspace(p); }

int attention_forward_cuda(const AttentionForward& p, void* stream) {
  const AttentionShape& s = p.shape;
  if (s.batch * s.heads * s.queries == 0) return 0;
  if (cuda::few_rows(p)) return cuda::decode_cuda(p, stream);
  for (const cuda::Instance& instance : cuda::kInstances) {
    if (instance.dtype != s.dtype || s.head_dim > instance.largest_head) continue;
    const int64_t rows = s.heads / s.kv_heads * s.queries, blocks = (rows + instance.rows - 1) / instance.rows;
    return cuda::launch(instance.kernel, static_cast<int>(blocks * s.batch * s.kv_heads), cuda::kThreads,
                        instance.shared_bytes, stream, p, static_cast<int>(blocks));
  }
  return 1;  // cudaErrorInvalidValue; attention_cuda_declines has said why
}

}  // namespace lwft
