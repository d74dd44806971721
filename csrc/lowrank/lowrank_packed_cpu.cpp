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
// For the second product a block is gathered into rows first, so that its sums run over kColumns outputs and not over the
// width of a panel. In pairs of bfloat16 the panels hold neighbours along the inputs, but the product needs pairs along the
// outputs: gathering pairs output c with output c + kLanes, which is a mask and a shift of two vectors, and dy is put into
// the same order.
//
// W is read from memory while the block before it is multiplied (Ahead). That decides the speed for few tokens.
//
// Scratch memory: for the first product kTaskRows x kColumns sums per thread (and x, where it is not read as it lies); for
// the second kTokens rows of dy, and per thread kDepth inputs x (kTokens + kColumns) numbers.
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
// Rows of dy that are transposed at once for the second product.
constexpr int64_t kTokens = 512;
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
  // A block, to be read next. There is none past the last.
  Ahead ahead(int64_t group, int64_t step) const {
    if (group == groups()) return {};
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

template <class E>
void multiply_by_transpose(const PackedProduct& p) {
  using T = SumOf<E>;
  const Blocks<E> w(p.weight);
  Scratch scratch;
  Tile<E> x = operand_in_place<E>(p.weight.dtype, p.a, 0, p.a_row_stride, w.in_features);
  if (x.data == nullptr) {
    E* const rows = scratch.take<E>(p.rows * w.depth());
    parallel_for(p.rows, [&](int64_t i) {
      Scratch local;
      T* const row = local.take<T>(w.in_features);
      load_row(p.weight.dtype, p.a, i * p.a_row_stride, w.in_features, row);
      store_operand(row, w.in_features, rows + i * w.depth());
    });
    x = {rows, w.depth()};
  }
  const int64_t chunks = ceil_div(p.rows, kTaskRows);
  parallel_for(w.groups() * chunks, [&](int64_t task) {
    const int64_t group = task / chunks, first = task % chunks * kTaskRows;
    const int64_t n = w.columns(group), width = padded<E>(n), rows = minimum(kTaskRows, p.rows - first);
    Scratch local;
    T* const sums = local.take<T>(rows * width);
    for (int64_t step = 0; step < w.steps(); ++step) {
      const Ahead ahead = step + 1 < w.steps() ? w.ahead(group, step + 1) : Ahead{};
      gemm(rows, n, w.depth(step), x.row(first) + step * kDepth, x.row_stride, 1, w.block(group, step), sums, width,
           step == 0 ? Mode::overwrite : Mode::accumulate, ahead);
    }
    for (int64_t i = 0; i < rows; ++i) add_row<E>(p, first + i, group * kColumns, sums + i * width, n);
  });
}

// ---- dx += dy W ----

// A block of W as rows of outputs, one for each input.
template <class E>
void gather(const Blocks<E>& w, int64_t group, int64_t step, E* to) {
  constexpr int64_t N = kLanes<E>;
  constexpr int64_t kStride = kGatheredStride<E>;
  const int64_t inputs = w.inputs(step), depth = w.depth(step);
  const E* from = w.block(group, step);
  for (int64_t j = 0; j < w.columns(group); j += kPanelColumns<E>) {
    const int64_t width = padded<E>(minimum(kPanelColumns<E>, w.columns(group) - j));
    for (int64_t i = 0; i < depth; ++i, from += width) {
      if constexpr (!kIsPair<E>) {
        for (int64_t c = 0; c < width; c += N) store(to + i * kStride + j + c, load(from + c));
      } else {
        using Words = Vec<uint32_t>;
        const auto words = [](const E* at) { return bit_cast<Words>(load(reinterpret_cast<const float*>(at))); };
        const auto put = [](E* at, Words v) { store(reinterpret_cast<float*>(at), bit_cast<Vec<float>>(v)); };
        E* const row = to + 2 * i * kStride + j / 2;
        for (int64_t c = 0; c < width; c += 2 * N) {
          const Words low = words(from + c), high = c + N < width ? words(from + c + N) : Words{};
          put(row + c / 2, (low & 0xFFFFu) | (high << 16));
          if (2 * i + 1 < inputs) put(row + kStride + c / 2, (low >> 16) | (high & 0xFFFF0000u));
        }
      }
    }
  }
}

// The columns of a group of rows first .. first + n - 1 of dy, transposed, as the right-hand side to a gathered block.
template <class E>
void pack_gradient(const PackedProduct& p, const Blocks<E>& w, int64_t group, int64_t first, int64_t n, E* to) {
  const int64_t columns = w.columns(group), k = gathered<E>(columns);
  const void* const from = element(p.weight.dtype, p.a, first * p.a_row_stride + group * kColumns);
  if constexpr (!kIsPair<E>) {
    pack_operand(p.weight.dtype, from, 1, p.a_row_stride, k, n, to);
  } else {
    constexpr int64_t N = kLanes<E>;
    Scratch local;
    BFloat16* const rows = local.take<BFloat16>(n * 2 * k);
    for (int64_t i = 0; i < n; ++i) {
      const BFloat16* const row = static_cast<const BFloat16*>(from) + i * p.a_row_stride;
      BFloat16* const ordered = rows + i * 2 * k;
      for (int64_t c = 0; c < k; ++c) {
        const int64_t low = c / N * 2 * N + c % N;
        ordered[2 * c] = low < columns ? row[low] : BFloat16{};
        ordered[2 * c + 1] = low + N < columns ? row[low + N] : BFloat16{};
      }
    }
    pack_operand(DType::bf16, rows, 1, 2 * k, 2 * k, n, to);
  }
}

template <class E>
void multiply(const PackedProduct& p) {
  using T = SumOf<E>;
  const Blocks<E> w(p.weight);
  const bool few = !kIsPair<E> && p.rows <= kFewTokens;
  for (int64_t first = 0; first < p.rows; first += kTokens) {
    const int64_t tokens = minimum(kTokens, p.rows - first), width = padded<E>(tokens);
    Scratch scratch;
    E* gradient = nullptr;
    if (!few) {
      gradient = scratch.take<E>(w.groups() * gathered<E>(kColumns) * width);
      parallel_for(w.groups(), [&](int64_t group) {
        pack_gradient(p, w, group, first, tokens, gradient + group * gathered<E>(kColumns) * width);
      });
    }
    parallel_for(w.steps(), [&](int64_t step) {
      const int64_t inputs = w.inputs(step), input = step * kDepth * kUnit<E>, wide = padded<T>(inputs);
      Scratch local;
      E* const rows = local.take<E>(inputs * kGatheredStride<E>);
      T* const sums = local.take<T>(inputs * width + tokens * wide);
      T* const result = sums + inputs * width;
      for (int64_t group = 0; group < w.groups(); ++group) {
        const int64_t k = gathered<E>(w.columns(group));
        const Mode mode = group == 0 ? Mode::overwrite : Mode::accumulate;
        gather(w, group, step, rows);
        if constexpr (!kIsPair<E>) {
          if (few) {
            const E* const dy = static_cast<const E*>(p.a) + first * p.a_row_stride + group * kColumns;
            dot_rows(tokens, inputs, k, dy, p.a_row_stride, p.weight.dtype, rows, kGatheredStride<E>, result, wide,
                     mode);
            continue;
          }
        }
        gemm(inputs, tokens, k, rows, kGatheredStride<E>, 1, gradient + group * gathered<E>(kColumns) * width, sums,
             width, mode, w.ahead(group + 1, step));
      }
      for (int64_t i = 0; !few && i < inputs; i += kLanes<T>) {
        pack_transposed(sums + i * width, width, tokens, minimum<int64_t>(kLanes<T>, inputs - i), result + i, wide);
      }
      for (int64_t i = 0; i < tokens; ++i) add_row<E>(p, first + i, input, result + i * wide, inputs);
    });
  }
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
    p.transpose ? multiply_by_transpose<E>(p) : multiply<E>(p);
  });
}

}  // namespace lwft::LWFT_ISA
