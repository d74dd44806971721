#include "harness/probes.h"

#include <ctime>

#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/threads.h"
#include "common/cpu/tile.h"
#include "common/cpu/vec_math.h"

namespace lwft::LWFT_ISA {
namespace {

template <class F>
void visit_arithmetic(DType type, F f) {
  if (type == DType::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

int lanes(DType type) { return type == DType::f64 ? kLanes<double> : kLanes<float>; }

template <class V>
V apply(Unary function, V x) {
  switch (function) {
    case Unary::exp: return exp(x);
    case Unary::exp2: return exp2(x);
    case Unary::tanh: return tanh(x);
    case Unary::erf: return erf(x);
    case Unary::sigmoid: return sigmoid(x);
  }
  return x;
}

void unary(DType type, Unary function, int64_t n, const void* x, void* y) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t count = minimum<int64_t>(kLanes<T>, n - i);
      store_first(static_cast<T*>(y) + i, apply(function, load_first(static_cast<const T*>(x) + i, count)), count);
    }
  });
}

void sum_and_max(DType type, const void* x, void* result) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    const Vec<T> v = load(static_cast<const T*>(x));
    static_cast<T*>(result)[0] = sum(v);
    static_cast<T*>(result)[1] = max_lane(v);
  });
}

void convert(DType from_dtype, const void* from, int64_t stride, int64_t n, DType to_dtype, void* to) {
  const bool wide = from_dtype == DType::f64 || to_dtype == DType::f64;
  visit_arithmetic(wide ? DType::f64 : DType::f32, [&](auto zero) {
    using T = decltype(zero);
    Scratch scratch;
    T* const row = scratch.take<T>(n);
    store_row(to_dtype, view_row(from_dtype, from, 0, n, row, stride), n, to, 0);
  });
}

int64_t padded_columns(DType type, int64_t n) { return type == DType::f64 ? padded<double>(n) : padded<float>(n); }

void pack(DType type, ProbeMatrix b, int64_t k, int64_t n, void* panels) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    pack_panels(b.dtype, b.data, b.row_stride, b.col_stride, k, n, static_cast<T*>(panels));
  });
}

Mode mode_of(bool accumulate) { return accumulate ? Mode::accumulate : Mode::overwrite; }

void multiply(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col,
              const void* panels, void* c, int64_t ldc, bool accumulate) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    gemm(m, n, k, static_cast<const T*>(a), a_row, a_col, static_cast<const T*>(panels), static_cast<T*>(c), ldc,
         mode_of(accumulate));
  });
}

void pack_pairs(ProbeMatrix b, int64_t k, int64_t n, void* panels) {
  pack_pair_panels(b.dtype, b.data, b.row_stride, b.col_stride, k, n, static_cast<BFloat16Pair*>(panels));
}

#if defined(__AVX512BF16__)
void multiply_pairs(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col, const void* panels,
                    float* c, int64_t ldc, bool accumulate) {
  gemm(m, n, k, static_cast<const BFloat16Pair*>(a), a_row, a_col, static_cast<const BFloat16Pair*>(panels), c, ldc,
       mode_of(accumulate));
}
#else
constexpr decltype(Probes::gemm_pairs) multiply_pairs = nullptr;
#endif

#if defined(__AMX_BF16__)
int64_t size_of_parts(int64_t k, int64_t n) { return panel_size<FloatParts>(k, n); }

void pack_parts(ProbeMatrix b, int64_t k, int64_t n, void* panels) {
  pack_part_panels(b.dtype, b.data, b.row_stride, b.col_stride, k, n, static_cast<FloatParts*>(panels));
}

void multiply_parts(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const void* panels,
                    int64_t first, int64_t packed, float* c, int64_t ldc, bool accumulate, bool split) {
  const auto* const b = static_cast<const FloatParts*>(panels);
  if (!split) return gemm_with_rows(m, n, k, a, a_row, a_col, b, first, packed, c, ldc, mode_of(accumulate));
  Scratch scratch;
  FloatParts* const left = scratch.take<FloatParts>(split_size(m, k));
  constexpr int64_t kAtOnce = 2 * kPartRows;
  for (int64_t l = 0; l < k; l += kAtOnce) {
    split_left(m, minimum(kAtOnce, k - l), a + l * a_col, a_row, a_col, left, l, k);
  }
  gemm_split(m, n, k, left, 0, k, b, c, ldc, mode_of(accumulate));
}
#else
constexpr decltype(Probes::part_panels) size_of_parts = nullptr;
constexpr decltype(Probes::pack_part_panels) pack_parts = nullptr;
constexpr decltype(Probes::gemm_parts) multiply_parts = nullptr;
#endif

void dot(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, ProbeMatrix b, void* c, int64_t ldc,
         bool accumulate) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    dot_rows(m, n, k, static_cast<const T*>(a), lda, b.dtype, b.data, b.row_stride, static_cast<T*>(c), ldc,
             mode_of(accumulate));
  });
}

void combine(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, ProbeMatrix b, void* c,
             int64_t ldc, bool accumulate) {
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    combine_rows(m, n, k, static_cast<const T*>(a), lda, b.dtype, b.data, b.row_stride, static_cast<T*>(c), ldc,
                 mode_of(accumulate));
  });
}

void multipliers(DType type, const Dropout& dropout, int64_t row, int64_t col0, int64_t n, void* out) {
  visit_arithmetic(type,
                   [&](auto zero) { dropout_multipliers(dropout, row, col0, n, static_cast<decltype(zero)*>(out)); });
}

void drop(DType type, const Dropout& dropout, int64_t row, int64_t col0, int64_t n, void* values) {
  visit_arithmetic(type, [&](auto zero) { dropout_row(dropout, row, col0, n, static_cast<decltype(zero)*>(values)); });
}

void run_numbered_tasks(int64_t tasks, bool fail, int64_t* results) {
  parallel_for(tasks, [&](int64_t task) {
    Scratch scratch;
    int64_t* const first = scratch.take<int64_t>(1 + task * 100);
    first[task * 100] = task;
    {
      Scratch inner;
      inner.take<char>(100000)[0] = 1;
      if (fail && task == tasks / 2) inner.take<double>(INT64_MAX / 8);
    }
    results[task] = first[task * 100];
  });
}

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double peak_flops(DType type, double seconds) {
  double rate = 0;
  visit_arithmetic(type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t m = kTileRows<T>, n = kPanelColumns<T>, k = 96;
    Scratch scratch;
    T* const a = scratch.take<T>(m * k);
    T* const panel = scratch.take<T>(panel_size<T>(k, n));
    T* const c = scratch.take<T>(m * n);
    for (int64_t i = 0; i < m * k; ++i) a[i] = T(0.25);
    for (int64_t i = 0; i < k * n; ++i) panel[i] = T(0.5);
    for (double start = seconds_now(), now = start, best_until = start + seconds; now < best_until;) {
      constexpr int kRepeats = 2000;
      for (int i = 0; i < kRepeats; ++i) gemm(m, n, k, a, k, 1, panel, c, n, Mode::overwrite);
      const double then = now;
      now = seconds_now();
      rate = maximum(rate, 2.0 * m * n * k * kRepeats / (now - then));
    }
  });
  return rate;
}

}  // namespace

extern const Probes probes;
const Probes probes = {lanes,         unary,      sum_and_max,         convert,    padded_columns,
                       pack,          multiply,   kMultipliesBFloat16, pack_pairs, multiply_pairs,
                       size_of_parts, pack_parts, multiply_parts,      dot,        combine,
                       multipliers,   drop,       run_numbered_tasks,  peak_flops};

}  // namespace lwft::LWFT_ISA
