// One tile of keys joins the softmax of a warp's rows (online softmax: Milakov & Gimelshein 2018; FlashAttention-2, Dao
// 2023, algorithm 1). The forward kernels differ in who works on which rows and keys.
#pragma once
#include "attention/attention_cuda.cuh"

namespace lwft::cuda {

// 16 MTiles rows of a warp, heads of at most D elements. Lane l holds of m-tile m the rows l / 4 and l / 4 + 8, as halves.
template <int MTiles, int D>
struct SoftmaxRows {
  float out[MTiles][D / 8][4] = {};  // sum of weights * v
  float highest[MTiles][2];          // score; the same on the 4 lanes of a row
  float total[MTiles][2] = {};       // sum of weights, of this lane's keys alone until finish()
  // Where tiles have 32 keys: which of the 64 columns of block `drawn` dropout keeps, bit 4 j + i for x[j][i].
  uint32_t kept[MTiles] = {};
  int drawn = -1;

  LWFT_DEVICE SoftmaxRows() {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) highest[m][0] = highest[m][1] = -INFINITY;
  }

  LWFT_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[m][half] += shuffle_xor(total[m][half], 1);
        total[m][half] += shuffle_xor(total[m][half], 2);
      }
    }
  }
};

// What is subtracted from the scores of a row: 0 where all so far are -inf, since -inf minus -inf would be NaN.
LWFT_DEVICE float shift_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// Scores of one m-tile become weights; what was summed before is scaled to the new highest scores.
template <int N, int D8>
LWFT_DEVICE void weigh(float unit, float (&x)[N][4], float (&highest)[2], float (&total)[2], float (&out)[D8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = highest[half];
#pragma unroll
    for (int j = 0; j < N; ++j) largest = fmaxf(largest, fmaxf(x[j][2 * half], x[j][2 * half + 1]));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    // the difference first: where the highest stays the same the factor is 1, in a thousand tiles too
    const float shift = shift_of(largest) * unit, factor = exp2_fast((highest[half] - shift_of(largest)) * unit);
    highest[half] = largest;
    float sum = total[half] * factor;
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[j][2 * half + e] = exp2_fast(x[j][2 * half + e] * unit - shift);
        sum += x[j][2 * half + e];
      }
    }
    total[half] = sum;
#pragma unroll
    for (int d = 0; d < D8; ++d) {
      out[d][2 * half] *= factor;
      out[d][2 * half + 1] *= factor;
    }
  }
}

// Weights of the tile become zero where dropout drops. A call of Philox draws for 4 columns out of 64: what it draws for
// the other half of them is kept for the next tile.
template <int MTiles, int D>
LWFT_DEVICE void drop_half(const HeadGroup& group, const Dropout& dropout, int row, int column,
                           float (&x)[MTiles][4][4], SoftmaxRows<MTiles, D>& state) {
  const int block = column / static_cast<int>(kPhiloxColumns);
  if (block != state.drawn) {
    state.drawn = block;
    const int begin = block * static_cast<int>(kPhiloxColumns) + column % 32;
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      uint32_t bits = 0;
      for_kept<8>(group, dropout, row + 16 * m, begin, [&](int j, int i, bool kept) {
        if (kept) bits |= 1u << (4 * j + i);
      });
      state.kept[m] = bits;
    }
  }
  const int shift = column % static_cast<int>(kPhiloxColumns) / 32 * 16;
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
    const uint32_t bits = state.kept[m] >> shift;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((bits >> (4 * j + i) & 1) == 0) x[m][j][i] = 0.0f;
      }
    }
  }
}

// Keys keys of the tile join, from `first` on: q (the warp's rows), k and v (the warp's keys) in shared memory, D + kPad
// apart; `row` is the warp's first of the group.
template <class T, int MTiles, int Keys, int D>
LWFT_DEVICE void attend(const HeadGroup& group, const Dropout& dropout, const KeyTile& tile, int row, int first,
                        const T* q, const T* k, const T* v, SoftmaxRows<MTiles, D>& state) {
  constexpr int kStride = D + kPad, kN = Keys / 8;
  const int lane = thread_index() % kWarpLanes;
  float x[MTiles][kN][4] = {};
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t a[MTiles][4];
#pragma unroll
    for (int m = 0; m < MTiles; ++m) load_rows(a[m], q + 16 * m * kStride + d, kStride);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t b[4];
      load_pair(b, k + 8 * j * kStride + d, kStride);
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        mma<T>(x[m][j], a[m], b[0], b[1]);
        mma<T>(x[m][j + 1], a[m], b[2], b[3]);
      }
    }
  }
  const float unit = score_unit(group.rule);
  // Where a row's bias, mask and draws lie is cheap to compute beside a tile, and too much to hold from tile to tile.
  row = anew(row);
  const int key = tile.start + first + lane % 4 * 2, column = tile.first_column + first + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
    const int lane_row = row + 16 * m + lane / 4;
    finish_scores<T>(group, tile, lane_row, key, x[m]);
    weigh(unit, x[m], state.highest[m], state.total[m], state.out[m]);
    if (Keys != 32 && dropout.active()) drop(group, anew(dropout), lane_row, column, x[m]);
  }
  if constexpr (Keys == 32) {
    if (dropout.active()) drop_half(group, anew(dropout), row + lane / 4, column, x, state);
  }
#pragma unroll
  for (int j = 0; j < kN; j += 2) {
    uint32_t weights[MTiles][4];
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[m][i] = pack<T>(x[m][j + i / 2][i % 2 * 2], x[m][j + i / 2][i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      uint32_t b[4];
      load_pair_transposed(b, v + 8 * j * kStride + 8 * d, kStride);
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        mma<T>(state.out[m][d], weights[m], b[0], b[1]);
        mma<T>(state.out[m][d + 1], weights[m], b[2], b[3]);
      }
    }
  }
}

// Walks tiles begin .. end - 1, their keys and values double buffered in `stages`: use(tile, keys, values).
template <int Threads, class T, int Keys, int D, class Use>
LWFT_DEVICE void for_key_tiles(const AttentionForward& p, const HeadGroup& group, const KeyTiles<Keys>& tiles,
                               int begin, int end, T* stages, const Use& use) {
  constexpr int kTile = Keys * (D + kPad);
  const auto load = [&](int chunk, T* stage) {
    const KeyTile tile = tiles[begin + chunk];
    const KeyHead<T> head(p, group, tile.prefix);
    copy_keys<Threads, Keys, D>(stage, group, tile, head.k, head.k_stride);
    copy_keys<Threads, Keys, D>(stage + kTile, group, tile, head.v, head.v_stride);
  };
  for_chunks(end - begin, stages, 2 * kTile, load,
             [&](int chunk, const T* stage) { use(tiles[begin + chunk], stage, stage + kTile); });
}

template <int Keys, int D>
constexpr size_t kStagesBytes = kStages * 2 * Keys * (D + kPad) * sizeof(uint16_t);

// What the sum of a row is to be multiplied by, and its logarithm of the sum of exponentials; 0 and -inf for a row that
// sees nothing.
LWFT_DEVICE float inverse_of(float total, const Dropout& dropout) {
  return total == 0.0f ? 0.0f : static_cast<float>(dropout.keep_scale) / total;
}
LWFT_DEVICE float log_sum_exp(float highest, float total, float unit) {
  return total == 0.0f ? -INFINITY : highest * unit * kLn2 + logf(total);
}

// The forward for few rows before many keys (attention_decode_cuda.cu), and the floats of workspace it needs.
bool few_rows(const AttentionForward& p);
int decode_cuda(const AttentionForward& p, void* stream);
int64_t decode_workspace(const AttentionForward& p);

}  // namespace lwft::cuda
