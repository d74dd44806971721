// What the kernels of the attention backward share: how the work is cut, and how a tile of products becomes P and dS. With
// S the scores, Z the dropout multipliers, and three statistics kept for each row (a query of a head),
//
//     P = exp(S - shift) * factor,   dS = P * (Z * dP - delta),   dP = dO V^T,   dR = dS * (derivative of the softcap).
//
// A block owns what it sums, so every sum has one order and there are no atomics: rows of dQ (attention_dq_cuda.cu), keys
// of dK and dV (attention_dkv_cuda.cu) or a tile of dbias (attention_dbias_cuda.cu). Each computes S and dP anew: that
// costs products, but no matrix of size (S, L) is stored. Where a sum would leave too few blocks, its terms are cut into
// parts that are left in the workspace and added in their order.
//
// Not yet run on a GPU: numbers are tested in the emulation of common/cuda, registers and instructions by nvcc.
#pragma once
#include "attention/attention_cuda.cuh"

namespace lwft::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarpLanes;
constexpr int kTile = 16 * kWarps;  // rows, or keys, that a block owns: 16 (one mma tile) per warp
static_assert(kTile == kPhiloxColumns);
// What it walks over at a time: the sums that a lane holds take the registers that a longer step would need, and two stages
// of it must fit the 99 KiB of shared memory that the smaller cards have.
constexpr int kStep = 32;

// From the shape alone and not by card, so that sums have one order everywhere: two blocks for each multiprocessor of an
// H200.
constexpr int64_t kEnoughBlocks = 264;

struct AttentionBackwardPlan {
  bool exact;  // statistics from all scores of a row rather than from lse and out
  int early;   // owned tiles of keys begin so much before key 0 that they lie as the random stream's 64 columns do
  float scale, softcap, keep_scale;
  float inner;                             // scale / softcap
  int64_t groups;                          // B * Hkv
  int row_tiles, key_tiles, prefix_tiles;  // of a group, of a key head
  float *shift, *factor, *delta;           // (B, H, S)
  int prefix_parts;
  float *dprefix_k, *dprefix_v;  // (parts, prefix_batch, Hkv, P, D); null when not wanted
  // dbias: its dimensions that are the full ones; the tiles of the others, in the order (batch, head, rows, keys), are
  // summed.
  bool own_batch, own_head, own_rows, own_keys;
  int query_tiles;  // of one head
  int64_t bias_blocks, bias_parts, bias_elements;
  float* dbias;  // (parts, bias) where there are several parts
  int64_t floats;

  explicit AttentionBackwardPlan(const AttentionBackward& p);
};

// The other files' kernels; they return a cudaError_t.
int attention_dq_cuda(const AttentionBackward&, const AttentionBackwardPlan&, void* stream);
int attention_dkv_cuda(const AttentionBackward&, const AttentionBackwardPlan&, void* stream);
int attention_dbias_cuda(const AttentionBackward&, const AttentionBackwardPlan&, void* stream);

// ---- rows ----

struct RowState {
  float shift, factor, delta;
  int begin, end;      // keys that it sees, but for the mask
  int64_t bias, mask;  // where its row of them begins
};

// Of a row of a group; of one that does not exist, statistics with which P = 0.
LWFT_DEVICE RowState row_state(const AttentionBackward& p, const AttentionBackwardPlan& plan, const HeadGroup& group,
                               int row) {
  const int existing = minimum(row, group.rows - 1);
  const KeyRange seen = group.visible(existing);
  RowState state{INFINITY,
                 0.0f,
                 0.0f,
                 seen.begin,
                 seen.end,
                 group.offset(p.rule.bias.stride, existing),
                 group.offset(p.rule.mask.stride, existing)};
  if (row == existing) {
    const int64_t index = group.index(row);
    state.shift = plan.shift[index];
    state.factor = plan.factor[index];
    state.delta = plan.delta[index];
  }
  return state;
}

// ---- elements ----
//
// One at a time, as finish_scores (attention_cuda.cuh) does for whole tiles: here rows may run along the lanes' columns, and
// an array of the softcap's derivatives would take registers that there are not.

// The score of a row and a key from their product, -inf where it is not seen; and the softcap's derivative there.
template <class T>
LWFT_DEVICE float score_of(const AttentionBackward& p, const AttentionBackwardPlan& plan, const RowState& row,
                           const KeyTile& tile, int key, float product, float& slope) {
  float score = product * plan.scale;
  slope = 1.0f;
  if (plan.softcap > 0.0f) {
    const float bent = tanhf(product * plan.inner);
    score = bent * plan.softcap;
    slope = 1.0f - bent * bent;
  }
  if (tile.prefix) return tile.edge && key >= tile.end ? -INFINITY : score;
  if (tile.edge && (key < row.begin || key >= row.end)) return -INFINITY;
  const Strided &bias = p.rule.bias, &mask = p.rule.mask;
  if (bias.data != nullptr) {
    const int64_t at = row.bias + key * bias.stride[3];
    score += p.rule.bias_dtype == DType::f32 ? static_cast<const float*>(bias.data)[at]
                                             : to_float(static_cast<const T*>(bias.data)[at]);
  }
  if (mask.data != nullptr && static_cast<const uint8_t*>(mask.data)[row.mask + key * mask.stride[3]] == 0) {
    score = -INFINITY;
  }
  return score;
}

// From the products q.k and dO.v: P * Z but for the keep scale; dS; dR.
struct Gradients {
  float dropped, dscore, dproduct;
};

template <class T>
LWFT_DEVICE Gradients gradients_of(const AttentionBackward& p, const AttentionBackwardPlan& plan, const RowState& row,
                                   const KeyTile& tile, int key, float product, float dweight, bool keep) {
  float slope;
  const float score = score_of<T>(p, plan, row, tile, key, product, slope);
  const float weight = exp2_fast((score - row.shift) * kLog2e) * row.factor;
  const float dscore = weight * ((keep ? dweight * plan.keep_scale : 0.0f) - row.delta);
  return {keep ? weight : 0.0f, dscore, dscore * slope};
}

// body(row of the tile, column, tile of 8 columns, element of it) for what this lane holds of the warp's 16 rows.
template <int Columns, class Body>
LWFT_DEVICE void for_elements(const Body& body) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int n = 0; n < Columns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) body(warp * 16 + lane / 4 + e / 2 * 8, n * 8 + lane % 4 * 2 + e % 2, n, e);
  }
}

// ---- products ----

// Two at once, for the 16 rows of this warp: x += A B^T and y += C E^T; all tiles of rows of D.
template <class T, int D, int Columns>
LWFT_DEVICE void multiply_tiles(const T* a, const T* b, float (&x)[Columns / 8][4], const T* c, const T* e,
                                float (&y)[Columns / 8][4]) {
  constexpr int kStride = D + kPad;
  const int first = thread_index() / kWarpLanes * 16 * kStride;
#pragma unroll 2  // the fragments of more at once would not fit the registers
  for (int k = 0; k < D; k += 16) {
    uint32_t fragment[4];
    load_rows(fragment, a + first + k, kStride);
#pragma unroll
    for (int j = 0; j < Columns / 16; ++j) multiply_pair(&x[2 * j], fragment, b + j * 16 * kStride + k, kStride);
    load_rows(fragment, c + first + k, kStride);
#pragma unroll
    for (int j = 0; j < Columns / 16; ++j) multiply_pair(&y[2 * j], fragment, e + j * 16 * kStride + k, kStride);
  }
}

// acc (the warp's 16 rows, D) += x B: x (16, Columns) as products leave it, B (Columns, D) a tile.
template <class T, int D, int Columns>
LWFT_DEVICE void multiply_by_tile(const float (&x)[Columns / 8][4], const T* b, float (&acc)[D / 8][4]) {
  constexpr int kStride = D + kPad;
#pragma unroll
  for (int k = 0; k < Columns / 16; ++k) {
    uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = pack<T>(x[2 * k + i / 2][i % 2 * 2], x[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      multiply_pair_transposed(&acc[2 * j], fragment, b + k * 16 * kStride + j * 16, kStride);
    }
  }
}

// A warp's sums (16, D), times factor, as 16-bit pairs: at(row of the tile) is where the row begins, or null.
template <class T, int D, class At>
LWFT_DEVICE void store_rows(const float (&acc)[D / 8][4], float factor, int64_t head_dim, const At& at) {
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* to = at(warp * 16 + lane / 4 + half * 8);
    if (to == nullptr) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column >= head_dim) continue;
      const float low = acc[n][2 * half] * factor, high = acc[n][2 * half + 1] * factor;
      *reinterpret_cast<uint32_t*>(to + column) = pack<T>(low, high);
    }
  }
}

// ---- dropout ----

constexpr int kKeepBytes = kPhiloxLanes;  // of a row and the 64 columns of its draws

// For Rows rows of a group and the 64 columns of the random stream around `column`: bit w of byte c says whether dropout
// keeps column 16 w + c. Each call of Philox gives 4 of them, and is made once for the whole block: a warp that holds 16
// keys rather than rows would use one of the four.
template <int Rows>
LWFT_DEVICE void draw_block(const HeadGroup& group, const Dropout& dropout, int first_row, int column, uint8_t* keep) {
  for (int i = thread_index(); i < Rows * kKeepBytes; i += kThreads) {
    const int row = minimum(first_row + i / kKeepBytes, group.rows - 1);
    const PhiloxWords words =
        draw_columns(dropout, group.index(row), column / kPhiloxColumns * kPhiloxColumns + i % kKeepBytes);
    uint32_t bits = 0;  // not the comparison's result << w, of which g++ 12 makes something else under its sanitizers
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= words.word[w] >= dropout.threshold ? 1u << w : 0u;
    keep[i] = static_cast<uint8_t>(bits);
  }
}
LWFT_DEVICE bool kept(const uint8_t* keep, int row, int column) {
  return keep[row * kKeepBytes + column % kKeepBytes] >> column / kKeepBytes & 1;
}

template <int D>
constexpr int kOwnedElements = kTile * (D + kPad);  // of a tile that a block owns

// One row of kInstances in the kernels' files.
template <class Instance>
const Instance& instance_for(const Instance* instances, const AttentionShape& shape) {
  while (instances->dtype != shape.dtype || shape.head_dim > instances->largest_head_dim) ++instances;
  return *instances;
}

}  // namespace lwft::cuda
