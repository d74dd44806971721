// What the forward and the backward CPU kernel share: which keys a row sees, and how q.k becomes the score
// the softmax sees. Included by attention_*cpu.cpp only: compiled once per level.
#pragma once
#include "attention/attention.h"
#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/operand.h"
#include "common/cpu/vec_math.h"

namespace lwft::LWFT_ISA {

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// Rows of a tile of scores, a multiple of kTileRows; forward and backward choose how many keys it has.
template <class E>
constexpr int64_t kScoreRows = round_up(48, kTileRows<E>);

// Up to so many rows per key head, keys are read as they lie: packing them would cost more than it saves.
constexpr int64_t kFewRows = 8;

// begin .. end - 1
struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  bool empty() const { return end <= begin; }
};

inline Range intersect(Range a, Range b) { return {maximum(a.begin, b.begin), minimum(a.end, b.end)}; }

// `total` cut into pieces of about equal size: at most `limit` each, a multiple of `multiple` but for the
// last.
struct Pieces {
  int64_t total, size, count;

  Pieces(int64_t total_in, int64_t limit, int64_t multiple) : total(total_in), size(multiple), count(0) {
    if (total <= 0) return;
    size = round_up(ceil_div(total, ceil_div(total, limit)), multiple);
    count = ceil_div(total, size);
  }
  Range operator[](int64_t i) const { return {i * size, minimum((i + 1) * size, total)}; }
};

// The G = H / Hkv query heads that share one key head of one sequence. They are worked on together, so that
// keys are read and packed once: row r is query r / G of head kv_head * G + r % G, and neighbouring rows see
// about the same keys.
struct HeadGroup {
  const AttentionShape& shape;
  const AttentionRule& rule;
  int64_t batch, kv_head, group_size;

  HeadGroup(const AttentionShape& shape_in, const AttentionRule& rule_in, int64_t number_in)
      : shape(shape_in),
        rule(rule_in),
        batch(number_in / shape_in.kv_heads),
        kv_head(number_in % shape_in.kv_heads),
        group_size(shape_in.heads / shape_in.kv_heads) {}

  static int64_t count(const AttentionShape& shape) { return shape.batch * shape.kv_heads; }
  static int64_t rows(const AttentionShape& shape) {
    return shape.kv_heads == 0 ? 0 : shape.heads / shape.kv_heads * shape.queries;
  }

  int64_t number() const { return batch * shape.kv_heads + kv_head; }
  int64_t rows() const { return group_size * shape.queries; }
  // Without shared heads no division, which for short rows of scores costs as much as the rest of their bookkeeping.
  int64_t query(int64_t row) const { return group_size == 1 ? row : row / group_size; }
  int64_t head(int64_t row) const { return group_size == 1 ? kv_head : kv_head * group_size + row % group_size; }
  // Of a row in a (B, H, S, ...) tensor.
  int64_t offset(const int64_t (&stride)[4], int64_t row) const {
    return batch * stride[0] + head(row) * stride[1] + query(row) * stride[2];
  }
  // In (B, H, S): where its lse stands, and its row in the random stream.
  int64_t index(int64_t row) const { return (batch * shape.heads + head(row)) * shape.queries + query(row); }

  // The keys a row sees, but for the mask. Neither end decreases from row to row.
  Range visible(int64_t row) const {
    Range keys{0, shape.keys};
    const int64_t position = rule.causal || rule.window > 0 ? query(row) + shape.keys - shape.queries : 0;
    if (rule.causal) keys.end = minimum(keys.end, position + 1);
    if (rule.window > 0) {
      const int64_t window = minimum(rule.window, shape.keys + shape.queries);  // more says no more, and may overflow
      keys.begin = maximum(keys.begin, position - window + 1);
      if (!rule.causal) keys.end = minimum(keys.end, position + window);
    }
    if (rule.lengths != nullptr) keys.end = minimum(keys.end, rule.lengths[batch]);
    return keys;
  }
};

// Whether floats are multiplied in parts, whose panels take longer to pack: from so many rows per key head on. And a narrow
// head is filled up to kPartRows. (32 rows on 32 keys by parts 0.8 times as fast as by vectors, 64 on 64 and on 512 as fast
// or 1.1 times; heads of 16 0.9 times, of 24 and 32 as fast.)
inline bool takes_parts(const AttentionShape& shape) {
  return kSplitsFloat && HeadGroup::rows(shape) >= 64 && shape.head_dim > 16;
}

// Keys and values of a HeadGroup: the prefix, which every row sees as it is, or the keys proper.
struct Segment {
  bool prefix;
  int64_t count, first_column;  // first_column: in the random stream, where the prefix comes first
  Strided k, v;

  template <class Params>
  Segment(const Params& p, bool prefix_in)
      : prefix(prefix_in),
        count(prefix_in ? p.shape.prefix : p.shape.keys),
        first_column(prefix_in ? 0 : p.shape.prefix),
        k(prefix_in ? p.prefix_k : p.k),
        v(prefix_in ? p.prefix_v : p.v) {}

  const void* key(const HeadGroup& group, int64_t j) const { return at(group, k, j); }
  const void* value(const HeadGroup& group, int64_t j) const { return at(group, v, j); }

  Range visible(const HeadGroup& group, int64_t row) const { return prefix ? Range{0, count} : group.visible(row); }
  // What any of these rows sees.
  Range visible(const HeadGroup& group, Range rows) const {
    return prefix ? Range{0, count} : Range{group.visible(rows.begin).begin, group.visible(rows.end - 1).end};
  }

 private:
  const void* at(const HeadGroup& group, const Strided& tensor, int64_t j) const {
    const int64_t offset = group.batch * tensor.stride[0] + group.kv_head * tensor.stride[1] + j * tensor.stride[2];
    return element(group.shape.dtype, tensor.data, offset);
  }
};

// ---- rows of scores ----
//
// A row of n scores lies in memory that may be overwritten up to one vector past its end, so that all work is
// on whole vectors; close_scores puts -inf there, which every later step leaves without effect.

template <class T>
inline void fill(T* x, int64_t begin, int64_t end, T value) {
  for (int64_t j = begin; j < end; ++j) x[j] = value;
}

// x *= factor, in whole vectors.
template <class T>
inline void scale_row(int64_t n, T* x, T factor) {
  for (int64_t j = 0; j < n; j += kLanes<T>) store(x + j, load(x + j) * factor);
}

// x = scale * x + bias
template <class T>
inline void add_bias(const AttentionRule& rule, int64_t offset, int64_t n, T scale, T* x) {
  visit_storage(rule.bias_dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const Storage* bias = static_cast<const Storage*>(rule.bias.data) + offset;
    if (rule.bias.stride[3] == 0) {
      const Vec<T> same = broadcast(load_one<T>(bias));
      for (int64_t j = 0; j < n; j += kLanes<T>) store(x + j, load(x + j) * scale + same);
      return;
    }
    int64_t j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) store(x + j, load(x + j) * scale + load_as<T>(bias + j));
    if (j < n) store(x + j, load(x + j) * scale + load_first_as<T>(bias + j, n - j));
  });
}

template <class T>
inline void apply_mask(const uint8_t* mask, int64_t stride, int64_t n, T* x) {
  if (stride == 0) {
    if (*mask == 0) fill(x, 0, n, -kInfinity<T>);
    return;
  }
  using Bytes = Lanes<uint8_t, kLanes<T>>;
  const auto masked = [](Bytes may_attend, Vec<T> scores) {
    const Mask<T> seen = __builtin_convertvector(may_attend, Vec<Unsigned<T>>) != Unsigned<T>{0};
    return select(seen, scores, broadcast(-kInfinity<T>));
  };
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    Bytes bytes;
    __builtin_memcpy(&bytes, mask + j, sizeof(bytes));
    store(x + j, masked(bytes, load(x + j)));
  }
  if (j < n) {
    Bytes bytes{};
    __builtin_memcpy(&bytes, mask + j, static_cast<size_t>(n - j));
    store(x + j, masked(bytes, load(x + j)));
  }
}

template <class T>
inline void close_scores(int64_t n, T* x) {
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  if (whole < n) store(x + whole, select(first_lanes<T>(n - whole), load(x + whole), broadcast(-kInfinity<T>)));
}

// x holds products of one row and its keys first .. first + n - 1, `scale` times which are q.k times the rule's scale;
// afterwards, but for the factor that is returned and is positive,
//     softcap * tanh(scale * x / softcap) + bias, or -inf where the mask does not let the row attend.
// slope, where it is given, gets the derivative of the softcap: 1 - tanh(scale * x / softcap)^2.
template <class T>
inline T finish_scores(const HeadGroup& group, int64_t row, bool prefix, int64_t first, int64_t n, T scale, T* x,
                       T* slope) {
  const AttentionRule& rule = group.rule;
  if (rule.softcap > 0) {
    const T cap = static_cast<T>(rule.softcap);
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> bent = tanh(load(x + j) * scale / cap);
      store(x + j, bent * cap);
      if (slope != nullptr) store(slope + j, T{1} - bent * bent);
    }
    scale = T{1};
  }
  if (!prefix && rule.bias.data != nullptr) {
    add_bias(rule, group.offset(rule.bias.stride, row) + first * rule.bias.stride[3], n, scale, x);
    scale = T{1};
  }
  if (!(scale > T{0})) {  // the largest product would not give the largest score
    scale_row(n, x, scale);
    scale = T{1};
  }
  if (!prefix && rule.mask.data != nullptr) {
    const int64_t offset = group.offset(rule.mask.stride, row) + first * rule.mask.stride[3];
    apply_mask(static_cast<const uint8_t*>(rule.mask.data) + offset, rule.mask.stride[3], n, x);
  }
  close_scores(n, x);
  return scale;
}

// ---- results ----

// Rows of sums (padded D apart), times factor(row), to where at(row) says, in elements of a tensor of the shape's dtype.
// A factor of 0 makes zeros, whatever the sums hold: a row that sees nothing has none.
template <class T, class Factor, class At>
inline void store_rows(const AttentionShape& shape, Range rows, const T* sums, const Factor& factor, void* to,
                       const At& at) {
  const int64_t d = shape.head_dim, d_padded = padded<T>(d);
  visit_storage(shape.dtype, [&](auto storage) {
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += d_padded) {
      auto* out = static_cast<decltype(storage)*>(to) + at(row);
      const T scale = factor(row);
      for_columns<T>(d, [&](auto columns, int) LWFT_INLINE {
        store_at<T>(out, columns, scale == T{0} ? Vec<T>{} : load_at<T>(sums, columns) * scale);
      });
    }
  });
}

// ---- rows of q and of grad_out as left-hand sides ----

// Row stride of D columns as a left-hand side.
template <class E>
constexpr int64_t operand_stride(int64_t d) {
  return kIsPair<E> ? units<E>(d) : padded<SumOf<E>>(d);
}

// Some rows of a (B, H, S, D) tensor, times `factor`; of floats zeros in the padding, of pairs as they are: the factor
// would have to be rounded away.
template <class L>
inline void load_operand(const HeadGroup& group, const Strided& tensor, Range rows, SumOf<L> factor, L* to) {
  const int64_t d = group.shape.head_dim, width = operand_stride<L>(d);
  if constexpr (kIsPair<L>) {
    for (int64_t row = rows.begin; row < rows.end; ++row, to += width) {
      const auto* from = static_cast<const BFloat16*>(tensor.data) + group.offset(tensor.stride, row);
      __builtin_memcpy(elements(to, d), from, static_cast<size_t>(d) * sizeof(BFloat16));
    }
  } else {
    visit_storage(group.shape.dtype, [&](auto storage) {
      for (int64_t row = rows.begin; row < rows.end; ++row, to += width) {
        const auto* from = static_cast<const decltype(storage)*>(tensor.data) + group.offset(tensor.stride, row);
        for_columns<L>(d, [&](auto at, int) LWFT_INLINE { store_at<L>(to, at, load_at<L>(from, at) * factor); });
        fill(to, d, width, L{0});
      }
    });
  }
}

// q of some rows. Floats carry the scale, so that products with keys are scores; for pairs scores_scale() is left to do.
template <class L>
inline void load_queries(const HeadGroup& group, const Strided& q, Range rows, L* to) {
  load_operand(group, q, rows, static_cast<SumOf<L>>(group.rule.scale), to);
}
template <class E>
inline SumOf<E> scores_scale(const HeadGroup& group) {
  return kIsPair<E> ? static_cast<SumOf<E>>(group.rule.scale) : SumOf<E>{1};
}

}  // namespace lwft::LWFT_ISA
