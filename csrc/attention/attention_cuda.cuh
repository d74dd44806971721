// What attention's CUDA kernels share: how the rows of one key head are numbered and where they lie, which tiles of keys
// they visit, and how a tile of products q.k becomes scores and weights.
//
// Query heads that share a key head are worked on together, as on the CPU (attention_scores.h): row r of such a group is
// query r / G of its head r % G. So grouped heads read keys once, and neighbouring rows see about the same keys. Rows,
// queries and keys are counted in 32 bits (inputs_decline), addresses in 64.
//
// A warp holds scores as mma leaves them (common/cuda/tile.cuh): x[j][i] of lane l is that of row l / 4 + i / 2 * 8 and key
// 8 j + l % 4 * 2 + i % 2.
#pragma once
#include <cmath>

#include "attention/attention.h"
#include "common/cuda/dropout.cuh"
#include "common/cuda/tile.cuh"

namespace lwft::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

LWFT_DEVICE int minimum(int a, int b) { return a < b ? a : b; }
LWFT_DEVICE int maximum(int a, int b) { return a > b ? a : b; }

// begin .. end - 1
struct KeyRange {
  int begin, end;
};

// ---- the rows of one key head of one sequence ----

struct HeadGroup {
  const AttentionShape& shape;
  const AttentionRule& rule;
  int batch, kv_head;
  int group_size, queries, rows, keys;
  int key_end;  // keys that lengths leaves valid
  float scale;  // of products; where there is a softcap, over the softcap

  LWFT_DEVICE HeadGroup(const AttentionShape& shape_in, const AttentionRule& rule_in, int number)
      : shape(shape_in),
        rule(rule_in),
        batch(number / static_cast<int>(shape_in.kv_heads)),
        kv_head(number % static_cast<int>(shape_in.kv_heads)),
        group_size(static_cast<int>(shape_in.heads) / static_cast<int>(shape_in.kv_heads)),
        queries(static_cast<int>(shape_in.queries)),
        rows(group_size * queries),
        keys(static_cast<int>(shape_in.keys)),
        key_end(keys),
        scale(static_cast<float>(rule_in.scale)) {
    if (rule.softcap > 0) scale /= static_cast<float>(rule.softcap);
    if (rule.lengths != nullptr) {
      const int64_t length = rule.lengths[batch];
      key_end = length < 0 ? 0 : length < keys ? static_cast<int>(length) : keys;
    }
  }

  LWFT_DEVICE int query(int row) const { return group_size == 1 ? row : row / group_size; }
  LWFT_DEVICE int head(int row) const { return group_size == 1 ? kv_head : kv_head * group_size + row % group_size; }
  // Of a row in a (B, H, S, ...) tensor.
  LWFT_DEVICE int64_t offset(const int64_t (&stride)[4], int row) const {
    return batch * stride[0] + head(row) * stride[1] + query(row) * stride[2];
  }
  // In (B, H, S): where its lse stands, and its row in the random stream.
  LWFT_DEVICE int64_t index(int row) const { return (batch * shape.heads + head(row)) * queries + query(row); }

  // The keys a row sees, but for the mask. Neither end decreases from row to row.
  LWFT_DEVICE KeyRange visible(int row) const {
    KeyRange seen{0, key_end};
    if (!rule.causal && rule.window == 0) return seen;
    const int position = query(row) + keys - queries;
    if (rule.causal) seen.end = minimum(seen.end, position + 1);
    if (rule.window > 0) {
      // a window of all keys and queries says no less, and more would overflow
      const int widest = keys + queries, window = rule.window < widest ? static_cast<int>(rule.window) : widest;
      seen.begin = maximum(0, position - window + 1);
      if (!rule.causal) seen.end = minimum(seen.end, position + window);
    }
    return seen;
  }
};

// Keys and values of the group's head: the prefix, or the keys proper; D elements from k + j * k_stride on.
template <class T>
struct KeyHead {
  const T *k, *v;
  int64_t k_stride, v_stride;

  template <class P>
  LWFT_DEVICE KeyHead(const P& p, const HeadGroup& group, bool prefix) {
    const Strided& keys = prefix ? p.prefix_k : p.k;
    const Strided& values = prefix ? p.prefix_v : p.v;
    k = static_cast<const T*>(keys.data) + group.batch * keys.stride[0] + group.kv_head * keys.stride[1];
    v = static_cast<const T*>(values.data) + group.batch * values.stride[0] + group.kv_head * values.stride[1];
    k_stride = keys.stride[2];
    v_stride = values.stride[2];
  }
};

// ---- tiles ----

// A tile of keys start .. start + Keys - 1; of them only 0 .. end - 1 exist.
struct KeyTile {
  bool prefix;
  bool edge;  // there may be a row that does not see all of them, the mask aside
  int start, end;
  int first_column;  // in the random stream
};

// The tiles of Keys keys that some of the rows first .. last see: those of the prefix, then those of the keys. Under
// dropout they begin at multiples of Keys of the random stream, where a call of Philox draws for 4 columns of one lane; so
// the first tile of keys may begin before key 0.
template <int Keys>
struct KeyTiles {
  int prefix, prefix_tiles, count;
  int start;  // of the first tile of keys
  int key_end;
  KeyRange full;  // what all of these rows see

  LWFT_DEVICE KeyTiles(const HeadGroup& group, int first_row, int last_row)
      : prefix(static_cast<int>(group.shape.prefix)), prefix_tiles((prefix + Keys - 1) / Keys), key_end(group.key_end) {
    const KeyRange first = group.visible(first_row), last = group.visible(last_row);
    full = {last.begin, first.end};
    const int shift = group.rule.dropout.active() ? prefix % Keys : 0;
    start = (first.begin + shift) / Keys * Keys - shift;
    count = prefix_tiles + (last.end > first.begin ? (last.end - start + Keys - 1) / Keys : 0);
  }

  LWFT_DEVICE KeyTile operator[](int i) const {
    if (i < prefix_tiles) return {true, (i + 1) * Keys > prefix, i * Keys, prefix, i * Keys};
    const int first = start + (i - prefix_tiles) * Keys;
    return {false, first < full.begin || first + Keys > full.end, first, key_end, prefix + first};
  }
};

// Starts the copy, by a block of Threads, of rows into a tile whose rows are Columns + kPad apart: row r is read from
// row(r), or zero where that is null; what lies beyond `width` columns is zero. `any` is some address.
template <int Threads, int Rows, int Columns, class T, class Row>
LWFT_DEVICE void copy_tile(T* to, int width, const T* any, const Row& row) {
  constexpr int kVectors = Columns / 8;
  for (int i = thread_index(); i < Rows * kVectors; i += Threads) {
    const int r = i / kVectors, c = i % kVectors * 8;
    const T* from = row(r);
    const bool valid = from != nullptr && c < width;
    copy_async(to + r * (Columns + kPad) + c, valid ? from + c : any, valid);
  }
}

// Rows first_row .. of a (B, H, S, D) tensor.
template <int Threads, int Rows, int Columns, class T>
LWFT_DEVICE void copy_queries(T* to, const HeadGroup& group, const Strided& tensor, int first_row) {
  const T* data = static_cast<const T*>(tensor.data);
  copy_tile<Threads, Rows, Columns>(to, static_cast<int>(group.shape.head_dim), data, [&](int r) {
    return first_row + r < group.rows ? data + group.offset(tensor.stride, first_row + r) : nullptr;
  });
}

// The keys of a tile, or its values; `data` and `stride` from KeyHead.
template <int Threads, int Keys, int Columns, class T>
LWFT_DEVICE void copy_keys(T* to, const HeadGroup& group, const KeyTile& tile, const T* data, int64_t stride) {
  copy_tile<Threads, Keys, Columns>(to, static_cast<int>(group.shape.head_dim), data, [&](int r) {
    const int key = tile.start + r;
    return key >= 0 && key < tile.end ? data + key * stride : nullptr;
  });
}

// ---- scores ----

// Whether finish_scores makes scores of products; else they stay products, times the scale that is left in score_unit.
LWFT_DEVICE bool natural_scores(const AttentionRule& rule) {
  return rule.bias.data != nullptr || rule.softcap > 0 || !(rule.scale > 0);
}

// What finish_scores' results are to be multiplied by, to be scores times log2(e): weights are powers of two. Positive.
LWFT_DEVICE float score_unit(const AttentionRule& rule) {
  return natural_scores(rule) ? kLog2e : static_cast<float>(rule.scale) * kLog2e;
}

// body(j, e, key) for what this lane holds of one row; `key` is the lane's first.
template <int N, class Body>
LWFT_DEVICE void for_keys(int key, const Body& body) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) body(j, e, key + 8 * j + e);
  }
}

template <class B, int N>
LWFT_DEVICE void add_bias(const HeadGroup& group, const KeyTile& tile, int row, int key, float (&x)[N][4]) {
  const Strided& tensor = group.rule.bias;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int existing = minimum(row + 8 * half, group.rows - 1);
    const B* bias = static_cast<const B*>(tensor.data) + group.offset(tensor.stride, existing);
    for_keys<N>(key, [&](int j, int e, int k) {
      if (k >= 0 && k < tile.end) x[j][2 * half + e] += to_float(bias[k * tensor.stride[3]]);
    });
  }
}

template <int N>
LWFT_DEVICE void apply_mask(const HeadGroup& group, const KeyTile& tile, int row, int key, float (&x)[N][4]) {
  const Strided& tensor = group.rule.mask;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int existing = minimum(row + 8 * half, group.rows - 1);
    const uint8_t* mask = static_cast<const uint8_t*>(tensor.data) + group.offset(tensor.stride, existing);
    for_keys<N>(key, [&](int j, int e, int k) {
      if (k >= 0 && k < tile.end && mask[k * tensor.stride[3]] == 0) x[j][2 * half + e] = -INFINITY;
    });
  }
}

// Products q.k of 16 rows and 8 N keys become, but for the factor score_unit,
//     softcap * tanh(scale * x / softcap) + bias, or -inf where a row does not see a key.
// `row` and `key` are this lane's first, key as numbered in the tile's tensor. slope, where it is given, gets the
// derivative of the softcap, 1 - tanh(scale * x / softcap)^2.
template <class T, int N>
LWFT_DEVICE void finish_scores(const HeadGroup& group, const KeyTile& tile, int row, int key, float (&x)[N][4],
                               float (*slope)[4] = nullptr) {
  const AttentionRule& rule = group.rule;
  if (natural_scores(rule)) {
    const float cap = static_cast<float>(rule.softcap);
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[j][i] *= group.scale;
        if (cap > 0.0f) {
          const float bent = tanhf(x[j][i]);
          if (slope != nullptr) slope[j][i] = 1.0f - bent * bent;
          x[j][i] = bent * cap;
        }
      }
    }
    if (rule.bias.data != nullptr && !tile.prefix) {
      if (rule.bias_dtype == DType::f32) {
        add_bias<float>(group, tile, row, key, x);
      } else {
        add_bias<T>(group, tile, row, key, x);
      }
    }
  }
  if (rule.mask.data != nullptr && !tile.prefix) apply_mask(group, tile, row, key, x);
  if (!tile.edge) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const KeyRange seen = tile.prefix ? KeyRange{0, tile.end} : group.visible(row + 8 * half);
    for_keys<N>(key, [&](int j, int e, int k) {
      if (k < seen.begin || k >= seen.end) x[j][2 * half + e] = -INFINITY;
    });
  }
}

// ---- dropout ----

// The draws of the 4 columns of col's block of 64 that lie a multiple of 16 from it (common/philox.h).
LWFT_DEVICE PhiloxWords draw_columns(const Dropout& dropout, int64_t row, int col) {
  return philox4x32_10(static_cast<uint32_t>(col / kPhiloxColumns * kPhiloxLanes + col % kPhiloxLanes),
                       static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                       static_cast<uint32_t>(dropout.offset), static_cast<uint32_t>(dropout.seed),
                       static_cast<uint32_t>(dropout.seed >> 32));
}

// The keys of Philox's rounds follow from the seed: 20 registers, were they held from tile to tile.
LWFT_DEVICE Dropout anew(Dropout dropout) {
  const auto low = static_cast<uint32_t>(anew(static_cast<int>(dropout.seed)));
  dropout.seed = dropout.seed >> 32 << 32 | low;
  return dropout;
}

// keep(j, i, whether dropout keeps it) for what this lane holds of 16 rows and 8 N keys. `row` is the lane's first row of
// the group, `column` its first of the random stream, whose tile begins at a multiple of 8 N.
template <int N, class Keep>
LWFT_DEVICE void for_kept(const HeadGroup& group, const Dropout& dropout, int row, int column, const Keep& keep) {
  static_assert(N == 2 || N == 4 || N == 8);
  constexpr int kWords = N / 2;
  const int first = N == 8 ? 0 : static_cast<int>(column % kPhiloxColumns / kPhiloxLanes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t index = group.index(row + 8 * half);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const PhiloxWords words = draw_columns(dropout, index, column + 8 * j + e);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          // by comparison: an index known only at run time would put the words into local memory
          uint32_t word = words.word[w];
#pragma unroll
          for (int begin = kWords; begin < 4; begin += kWords) word = first == begin ? words.word[begin + w] : word;
          keep(2 * w + j, 2 * half + e, word >= dropout.threshold);
        }
      }
    }
  }
}

// Weights become zero where dropout drops; the factor of those that stay is left to the sums.
template <int N>
LWFT_DEVICE void drop(const HeadGroup& group, const Dropout& dropout, int row, int column, float (&x)[N][4]) {
  for_kept<N>(group, dropout, row, column, [&](int j, int i, bool kept) {
    if (!kept) x[j][i] = 0.0f;
  });
}

// ---- on the host ----

inline bool rows_aligned(const Strided& tensor) {
  return aligned(tensor.data) && tensor.stride[0] % 8 == 0 && tensor.stride[1] % 8 == 0 && tensor.stride[2] % 8 == 0;
}

// Why the kernels cannot read these arguments, of forward or of backward, or null.
template <class P>
const char* inputs_decline(const P& p) {
  const AttentionShape& s = p.shape;
  constexpr int64_t kMost = int64_t{1} << 29;
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "q, k and v must be bfloat16 or float16";
  if (s.head_dim % 8 != 0 || s.head_dim > 256) return "the head size must be a multiple of 8 and at most 256";
  if (s.batch * s.heads * s.queries > kMost || s.keys > kMost || s.prefix > kMost)
    return "there are too many queries or keys";
  if (!rows_aligned(p.q) || !rows_aligned(p.k) || !rows_aligned(p.v) || !rows_aligned(p.prefix_k) ||
      !rows_aligned(p.prefix_v)) {
    return "the rows of q, k, v and the prefix must start at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace lwft::cuda
