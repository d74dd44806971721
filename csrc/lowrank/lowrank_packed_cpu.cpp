// Products with a weight that is packed once and for all.
//
// W^T (in_features, out_features) lies in blocks of kDepth units of inputs by kColumns outputs, each of them panels of tile.h
// ([panel][input][width]), in the order [outputs][inputs]. A vendor's product packs W anew at every call, which for few
// tokens takes longer than the product.
//
//     out += x W^T   A block is the right-hand side; the blocks of a task are one stream through memory.
//     dx += dy W     A block is the left-hand side, of (dx)^T += W^T (dy)^T: its elements are broadcast, and the vectors
//                    run over tokens. dy, small beside W, is what is transposed.
//
// Where panels are narrow, a block is gathered into rows for the second product, so that its sums run over kColumns outputs
// and not over the width of a panel. In pairs of bfloat16 the panels hold neighbours along the inputs, but the product needs pairs along the
// outputs: gathering pairs output c with output c + kLanes, which is a mask and a shift of two vectors, and dy is put into
// the same order.
//
// W is read from memory while the block before it is multiplied (Ahead). That decides the speed for few tokens.
//
// Scratch memory: for the first product kTaskRows x kColumns sums per thread, and kRows rows of x where they are not read as
// they lie; for the second kTokens rows of dy, and per thread 2 x kDepth units of inputs x kTokens sums.
#include "lowrank/lowrank_packed.h"

#include "common/cpu/operand.h"
#include "common/cpu/transpose.h"

namespace lwft::LWFT_ISA {
namespace {

// A block of W: the panel that is multiplied (64 columns) stays in the first cache while all rows of a task pass by, the
// block in the second.
constexpr int64_t kDepth = 128, kColumns = kKBlock;
// Rows of a task of the first product, whose x and sums stay in the second cache from one panel to the next.
constexpr int64_t kTaskRows = 192;
// Rows that are brought into another form at once, where they are.
constexpr int64_t kRows = 8 * kTaskRows;
// Rows of dy that are transposed at once for the second product.
constexpr int64_t kTokens = 256;
// For fewer of them the vectors run over outputs.
constexpr int64_t kFewTokens = 8;
static_assert(kColumns % kPanelColumns<float> == 0 && kColumns % kPanelColumns<double> == 0);

// Units along the outputs that a gathered block of so many columns has.
template <class E>
constexpr int64_t gathered(int64_t columns) {
  return kIsPair<E> ? ceil_div(columns, 2 * kLanes<E>) * kLanes<E> : columns;
}
// The rows of a gathered block lie so far apart: not by a power of two, which would put them into few sets of the cache.
template <class E>
constexpr int64_t kGatheredStride = gathered<E>(kColumns) + kLanes<E>;

template <class E>
struct Blocks {
  int64_t out_features, in_features;
  E* data;

  explicit Blocks(const PackedWeight& packed)
      : out_features(packed.out_features), in_features(packed.in_features), data(static_cast<E*>(packed.blocks)) {}

  int64_t depth() const { return units<E>(in_features); }
  int64_t groups() const { return ceil_div(out_features, kColumns); }  // of outputs
  int64_t steps() const { return ceil_div(depth(), kDepth); }          // of inputs
  int64_t columns(int64_t group) const { return minimum(kColumns, out_features - group * kColumns); }
  int64_t depth(int64_t step) const { return minimum(kDepth, depth() - step * kDepth); }
  int64_t inputs(int64_t step) const { return minimum(kDepth * kUnit<E>, in_features - step * kDepth * kUnit<E>); }
  E* block(int64_t group, int64_t step) const {
    return data + group * kColumns * depth() + step * kDepth * padded<E>(columns(group));
  }
  // A block, to be read next. There may be none.
  Ahead ahead(int64_t group, int64_t step) const {
    if (group == groups() || step == steps()) return {};
    return {block(group, step), depth(step) * padded<E>(columns(group)) * static_cast<int64_t>(sizeof(E))};
  }
};

// ---- W to blocks and back ----

template <class E>
void pack(const Blocks<E>& w, DType dtype, const void* weight) {
  parallel_for(w.groups() * w.steps(), [&](int64_t task) {
    const int64_t group = task / w.steps(), step = task % w.steps();
    const int64_t first = group * kColumns * w.in_features + step * kDepth * kUnit<E>;
    pack_operand(dtype, element(dtype, weight, first), 1, w.in_features, w.inputs(step), w.columns(group),
                 w.block(group, step));
  });
}

template <class E>
void unpack(const Blocks<E>& w, Element<E>* weight) {
  parallel_for(w.groups() * w.steps(), [&](int64_t task) {
    const int64_t group = task / w.steps(), step = task % w.steps(), depth = w.depth(step), inputs = w.inputs(step);
    for (int64_t j = 0; j < w.columns(group); j += kPanelColumns<E>) {
      const int64_t n = minimum(kPanelColumns<E>, w.columns(group) - j), width = padded<E>(n);
      const auto* from = elements_of(w.block(group, step) + j * depth);
      Element<E>* const to = weight + (group * kColumns + j) * w.in_features + step * kDepth * kUnit<E>;
      for (int64_t i = 0; i < inputs; ++i) {
        for (int64_t o = 0; o < n; ++o) {
          to[o * w.in_features + i] = from[(i / kUnit<E> * width + o) * kUnit<E> + i % kUnit<E>];
        }
      }
    }
  });
}

// ---- out += x W^T ----

// out's row += sums.
template <class E>
void add_row(const PackedProduct& p, int64_t row, int64_t column, const SumOf<E>* sums, int64_t n) {
  using T = SumOf<E>;
  Element<E>* const out = static_cast<Element<E>*>(p.out) + row * p.out_row_stride + column;
  for_columns<T>(n,
                 [&](auto at, int) LWFT_INLINE { store_at<T>(out, at, load_at<T>(out, at) + load_at<T>(sums, at)); });
}

// Rows first .. first + n - 1 of p.a as a left-hand side: where they lie, or in scratch.
template <class E>
Tile<E> left_rows(const PackedProduct& p, int64_t first, int64_t n, int64_t columns, Scratch& scratch) {
  using T = SumOf<E>;
  // A row of matrix registers is read from 16 rows at once, which must not fall into one set of the cache.
  constexpr int64_t kSets = 1024 / static_cast<int64_t>(sizeof(E));
  const Tile<E> there = operand_in_place<E>(p.weight.dtype, p.a, first * p.a_row_stride, p.a_row_stride, columns);
  if (there.data != nullptr && (!kIsPair<E> || there.row_stride % kSets != 0)) return there;
  const int64_t stride = units<E>(columns) + (units<E>(columns) % kSets == 0 ? kLanes<E> : 0);
  E* const rows = scratch.take<E>(n * stride);
  parallel_for(n, [&](int64_t i) {
    if (there.data != nullptr) {
      __builtin_memcpy(rows + i * stride, there.row(i), static_cast<size_t>(units<E>(columns)) * sizeof(E));
      return;
    }
    Scratch local;
    T* const row = local.take<T>(columns);
    load_row(p.weight.dtype, p.a, (first + i) * p.a_row_stride, columns, row);
    store_operand(row, columns, rows + i * stride);
  });
  return {rows, stride};
}

template <class E>
void multiply_by_transpose(const PackedProduct& p) {
  using T = SumOf<E>;
  const Blocks<E> w(p.weight);
  for (int64_t first = 0; first < p.rows; first += kRows) {
    const int64_t all = minimum(kRows, p.rows - first), chunks = ceil_div(all, kTaskRows);
    Scratch scratch;
    const Tile<E> x = left_rows<E>(p, first, all, w.in_features, scratch);
    parallel_for(w.groups() * chunks, [&](int64_t task) {
      const int64_t group = task / chunks, begin = task % chunks * kTaskRows;
      const int64_t n = w.columns(group), width = padded<E>(n), rows = minimum(kTaskRows, all - begin);
      Scratch local;
      T* const sums = local.take<T>(rows * width);
      for (int64_t step = 0; step < w.steps(); ++step) {
        gemm(rows, n, w.depth(step), x.row(begin) + step * kDepth, x.row_stride, 1, w.block(group, step), sums, width,
             step == 0 ? Mode::overwrite : Mode::accumulate, w.ahead(group, step + 1));
      }
      for (int64_t i = 0; i < rows; ++i) add_row<E>(p, first + begin + i, group * kColumns, sums + i * width, n);
    });
  }
}

// ---- dx += dy W ----

// Whether the elements of a panel are read where they lie. A narrow panel is not: the sums would go to memory too often.
template <class E>
constexpr bool kReadsPanels = !kIsPair<E> && kPanelColumns<E> >= 64;
// Inputs of a block that are gathered at once: the first cache holds them.
template <class E>
constexpr int64_t kGatheredInputs = kIsPair<E> ? 64 : 48;

// n inputs of a panel as rows of its `width` outputs; width is a constant where the panel is a whole one.
template <class E, class Width>
LWFT_INLINE inline void gather_panel(const E* from, Width width, int64_t n, E* to) {
  constexpr int64_t N = kLanes<E>, kStride = kGatheredStride<E>;
  for (int64_t i = 0; i < n; i += kUnit<E>, from += width, to += kUnit<E> * kStride) {
    if constexpr (!kIsPair<E>) {
      for (int64_t c = 0; c < width; c += N) store(to + c, load(from + c));
    } else {
      using Words = Vec<uint32_t>;
      const auto words = [](const E* at) { return bit_cast<Words>(load(reinterpret_cast<const float*>(at))); };
      const auto put = [](E* at, Words v) { store(reinterpret_cast<float*>(at), bit_cast<Vec<float>>(v)); };
      for (int64_t c = 0; c < width; c += 2 * N) {
        const Words low = words(from + c), high = c + N < width ? words(from + c + N) : Words{};
        put(to + c / 2, (low & 0xFFFFu) | (high << 16));
        // past an odd last input there is one of zeros
        put(to + kStride + c / 2, (low >> 16) | (high & 0xFFFF0000u));
      }
    }
  }
}

// Inputs begin .. begin + n - 1 of a block (begin a whole unit) as rows of outputs; `to` has room for whole units.
template <class E>
void gather(const Blocks<E>& w, int64_t group, int64_t step, int64_t begin, int64_t n, E* to) {
  for (int64_t j = 0; j < w.columns(group); j += kPanelColumns<E>) {
    const int64_t width = padded<E>(minimum(kPanelColumns<E>, w.columns(group) - j));
    const E* const from = w.block(group, step) + j * w.depth(step) + begin / kUnit<E> * width;
    if (width == kPanelColumns<E>) {
      gather_panel(from, std::integral_constant<int64_t, kPanelColumns<E>>{}, n, to + gathered<E>(j));
    } else {
      gather_panel(from, width, n, to + gathered<E>(j));
    }
  }
}

// dy, transposed by groups: a right-hand side for each product with a block, or with a panel of it.
template <class E>
class Gradient {
 public:
  Gradient(const PackedProduct& p, const Blocks<E>& blocks, int64_t first, int64_t tokens, Scratch& scratch)
      : w(blocks),
        n(tokens),
        width(padded<E>(tokens)),
        data(scratch.take<E>(w.groups() * gathered<E>(kColumns) * width)) {
    parallel_for(w.groups(), [&](int64_t group) {
      const void* const from = element(p.weight.dtype, p.a, first * p.a_row_stride + group * kColumns);
      for (int64_t j = 0; j < w.columns(group); j += kPart) {
        const int64_t columns = minimum(kPart, w.columns(group) - j);
        if constexpr (!kIsPair<E>) {
          pack_operand(p.weight.dtype, element(p.weight.dtype, from, j), 1, p.a_row_stride, columns, n, part(group, j));
        } else {
          pack_ordered(static_cast<const BFloat16*>(from), p.a_row_stride, columns, part(group, j));
        }
      }
    });
  }

  // The columns from group * kColumns + j on.
  E* part(int64_t group, int64_t j) const { return data + (group * gathered<E>(kColumns) + gathered<E>(j)) * width; }

  static constexpr int64_t kPart = kReadsPanels<E> ? kPanelColumns<E> : kColumns;

 private:
  // In the order in which gather pairs the outputs.
  void pack_ordered(const BFloat16* from, int64_t row_stride, int64_t columns, BFloat16Pair* to) const {
    constexpr int64_t N = kLanes<E>;
    const int64_t k = gathered<E>(columns);
    Scratch local;
    BFloat16* const rows = local.take<BFloat16>(n * 2 * k);
    for (int64_t i = 0; i < n; ++i) {
      const BFloat16* const row = from + i * row_stride;
      BFloat16* const ordered = rows + i * 2 * k;
      for (int64_t c = 0; c < k; ++c) {
        const int64_t low = c / N * 2 * N + c % N;
        ordered[2 * c] = low < columns ? row[low] : BFloat16{};
        ordered[2 * c + 1] = low + N < columns ? row[low + N] : BFloat16{};
      }
    }
    pack_operand(DType::bf16, rows, 1, 2 * k, 2 * k, n, to);
  }

  const Blocks<E>& w;
  const int64_t n, width;
  E* const data;
};

// sums (inputs, tokens) (+)= a block times dy, all of dy's rows.
template <class E>
void add_block(const Blocks<E>& w, int64_t group, int64_t step, const Gradient<E>& gradient, int64_t tokens,
               SumOf<E>* sums, int64_t width, Mode mode) {
  const int64_t inputs = w.inputs(step), columns = w.columns(group);
  const Ahead ahead = w.ahead(group + 1, step);
  if constexpr (kReadsPanels<E>) {
    const int64_t count = ceil_div(columns, kPanelColumns<E>);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = i * kPanelColumns<E>, n = minimum(kPanelColumns<E>, columns - j);
      gemm(inputs, tokens, n, w.block(group, step) + j * inputs, padded<E>(n), 1, gradient.part(group, j), sums, width,
           i == 0 ? mode : Mode::accumulate, ahead.share(i, count));
    }
  } else {
    Scratch scratch;
    E* const rows = scratch.take<E>(kGatheredInputs<E> * kGatheredStride<E>);
    const int64_t count = ceil_div(inputs, kGatheredInputs<E>);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * kGatheredInputs<E>, n = minimum(kGatheredInputs<E>, inputs - begin);
      gather(w, group, step, begin, n, rows);
      gemm(n, tokens, gathered<E>(columns), rows, kGatheredStride<E>, 1, gradient.part(group, 0), sums + begin * width,
           width, mode, ahead.share(i, count));
    }
  }
}

template <class E>
void multiply(const PackedProduct& p) {
  using T = SumOf<E>;
  const Blocks<E> w(p.weight);
  for (int64_t first = 0; first < p.rows; first += kTokens) {
    const int64_t tokens = minimum(kTokens, p.rows - first), width = padded<E>(tokens);
    Scratch scratch;
    const Gradient<E> gradient(p, w, first, tokens, scratch);
    parallel_for(w.steps(), [&](int64_t step) {
      const int64_t inputs = w.inputs(step), wide = padded<T>(inputs);
      Scratch local;
      T* const sums = local.take<T>(inputs * width);
      T* const turned = local.take<T>(tokens * wide);
      for (int64_t group = 0; group < w.groups(); ++group) {
        add_block(w, group, step, gradient, tokens, sums, width, group == 0 ? Mode::overwrite : Mode::accumulate);
      }
      turn(sums, width, inputs, tokens, turned, wide);
      for (int64_t i = 0; i < tokens; ++i)
        add_row<E>(p, first + i, step * kDepth * kUnit<E>, turned + i * wide, inputs);
    });
  }
}

// The same for so few tokens that vectors of them would be empty: the vectors run over outputs.
template <class T>
void multiply_few(const PackedProduct& p) {
  const Blocks<T> w(p.weight);
  parallel_for(w.steps(), [&](int64_t step) {
    const int64_t inputs = w.inputs(step);
    Scratch local;
    T* const rows = local.take<T>(kGatheredInputs<T> * kGatheredStride<T>);
    T* const sums = local.take<T>(p.rows * inputs);
    for (int64_t group = 0; group < w.groups(); ++group) {
      const T* const dy = static_cast<const T*>(p.a) + group * kColumns;
      for (int64_t begin = 0; begin < inputs; begin += kGatheredInputs<T>) {
        const int64_t n = minimum(kGatheredInputs<T>, inputs - begin);
        gather(w, group, step, begin, n, rows);
        dot_rows(p.rows, n, w.columns(group), dy, p.a_row_stride, p.weight.dtype, rows, kGatheredStride<T>,
                 sums + begin, inputs, group == 0 ? Mode::overwrite : Mode::accumulate);
      }
    }
    for (int64_t i = 0; i < p.rows; ++i) add_row<T>(p, i, step * kDepth, sums + i * inputs, inputs);
  });
}

// f(E{}) for what the products of this dtype multiply; not called where there is none.
template <class F>
void visit_operand(DType dtype, const F& f) {
  if (dtype == DType::f64) f(double{});
  if (dtype == DType::f32) f(float{});
  if constexpr (kMultipliesBFloat16) {
    if (dtype == DType::bf16) f(BFloat16Pair{});
  }
}

}  // namespace

int64_t packed_bytes(int64_t out_features, int64_t in_features, DType dtype) {
  int64_t bytes = 0;
  visit_operand(dtype, [&](auto e) {
    using E = decltype(e);
    bytes = panel_size<E>(units<E>(in_features), out_features) * static_cast<int64_t>(sizeof(E));
  });
  return bytes;
}

void pack_weight(const PackedWeight& packed, const void* weight) {
  visit_operand(packed.dtype, [&](auto e) { pack(Blocks<decltype(e)>(packed), packed.dtype, weight); });
}

void unpack_weight(const PackedWeight& packed, void* weight) {
  visit_operand(packed.dtype, [&](auto e) {
    using E = decltype(e);
    unpack(Blocks<E>(packed), static_cast<Element<E>*>(weight));
  });
}

void packed_product(const PackedProduct& p) {
  if (p.rows == 0) return;
  visit_operand(p.weight.dtype, [&](auto e) {
    using E = decltype(e);
    if (p.transpose) return multiply_by_transpose<E>(p);
    if constexpr (!kIsPair<E>) {
      if (p.rows <= kFewTokens) return multiply_few<E>(p);
    }
    multiply<E>(p);
  });
}

}  // namespace lwft::LWFT_ISA
