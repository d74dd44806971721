// The CPU foundation on every level this machine runs, with buffers of the exact size, so that
// AddressSanitizer sees a step too far; and real threads, for ThreadSanitizer. The numbers are tested in
// depth by python_tests/common.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "common/cpu/dispatch.h"
#include "common/cpu/threads.h"
#include "harness/probes.h"

namespace {

int failures = 0;

void check(bool holds, const char* isa, const char* what, int64_t m = 0, int64_t n = 0, int64_t k = 0) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED on %s: %s (%ld, %ld, %ld)\n", isa, what, static_cast<long>(m), static_cast<long>(n),
               static_cast<long>(k));
}

// Small whole numbers: exact in every type, and so are their sums.
template <class T>
std::vector<T> whole_numbers(int64_t count, uint32_t seed) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<T>(static_cast<int>(seed >> 28) - 8);
  }
  return values;
}

template <class T>
constexpr lwft::DType kType = sizeof(T) == 8 ? lwft::DType::f64 : lwft::DType::f32;

template <class T>
void test_products(const lwft::Probes& probes, const char* isa) {
  for (const int64_t m : {0, 1, 2, 3, 5, 8, 13}) {
    for (const int64_t n : {0, 1, 7, 16, 33, 64, 100}) {
      for (const int64_t k : {0, 1, 5, 16, 67, 300}) {
        for (const bool b_transposed : {false, true}) {
          const std::vector<T> a = whole_numbers<T>(m * k, 1), b = whole_numbers<T>(k * n, 2);
          const int64_t row_stride = b_transposed ? 1 : n, col_stride = b_transposed ? k : 1;
          const int64_t ldc = probes.padded(kType<T>, n);
          std::vector<T> panels(static_cast<size_t>(k * ldc)), c(static_cast<size_t>(m * ldc), T(3));
          std::vector<T> few(static_cast<size_t>(m * n), T(3));
          const lwft::ProbeMatrix b_matrix{kType<T>, b.data(), row_stride, col_stride};
          probes.pack_panels(kType<T>, b_matrix, k, n, panels.data());
          probes.gemm(kType<T>, m, n, k, a.data(), k, 1, panels.data(), c.data(), ldc, b_transposed);
          if (b_transposed) {
            const lwft::ProbeMatrix rows{kType<T>, b.data(), k, 1};
            probes.dot_rows(kType<T>, m, n, k, a.data(), k, rows, few.data(), n, true);
          } else {
            probes.combine_rows(kType<T>, m, n, k, a.data(), k, b_matrix, few.data(), n, false);
          }
          bool same = true;
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              T expected = b_transposed ? T(3) : T(0);
              for (int64_t l = 0; l < k; ++l) expected += a[i * k + l] * b[l * row_stride + j * col_stride];
              same = same && c[i * ldc + j] == expected && few[i * n + j] == expected;
            }
          }
          check(same, isa, "products", m, n, k);
        }
      }
    }
  }
}

// Whole numbers stay exact in parts too.
void test_parts(const lwft::Probes& probes, const char* isa) {
  if (probes.gemm_parts == nullptr) return;
  for (const int64_t m : {0, 1, 15, 16, 17, 33, 50}) {
    for (const int64_t n : {0, 1, 16, 33, 64, 100}) {
      for (const int64_t k : {0, 1, 16, 31, 67, 300}) {
        for (const int way : {0, 1, 2, 3}) {
          const bool transposed = way % 2 == 1, split = way / 2 == 1;
          const std::vector<float> a = whole_numbers<float>(m * k, 1), b = whole_numbers<float>(k * n, 2);
          const int64_t a_row = transposed ? 1 : k, a_col = transposed ? m : 1;
          const int64_t b_row = transposed ? 1 : n, b_col = transposed ? k : 1;
          const int64_t ldc = probes.padded(lwft::DType::f32, n);
          std::vector<float> panels(static_cast<size_t>(probes.part_panels(k, n)));
          std::vector<float> c(static_cast<size_t>(m * ldc), 3.0f);
          probes.pack_part_panels({lwft::DType::f32, b.data(), b_row, b_col}, k, n, panels.data());
          probes.gemm_parts(m, n, k, a.data(), a_row, a_col, panels.data(), 0, k, c.data(), ldc, transposed, split);
          bool same = true;
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              float expected = transposed ? 3.0f : 0.0f;
              for (int64_t l = 0; l < k; ++l) expected += a[i * a_row + l * a_col] * b[l * b_row + j * b_col];
              same = same && c[i * ldc + j] == expected;
            }
          }
          check(same, isa, "products in parts", m, n, k);
        }
      }
    }
  }
}

void test_conversions(const lwft::Probes& probes, const char* isa) {
  using lwft::DType;
  for (const DType middle : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t n = 0; n < 70; ++n) {
      const std::vector<float> values = whole_numbers<float>(n, 3);
      std::vector<char> stored(static_cast<size_t>(n) * lwft::element_size(middle));
      std::vector<float> back(static_cast<size_t>(n));
      probes.convert(DType::f32, values.data(), 1, n, middle, stored.data());
      probes.convert(middle, stored.data(), 1, n, DType::f32, back.data());
      check(back == values, isa, "conversion there and back", static_cast<int64_t>(middle), n);
    }
  }
}

template <class T>
void test_rows(const lwft::Probes& probes, const char* isa) {
  const lwft::Dropout dropout = lwft::make_dropout(0x123456789ABCDEFull, 42, 0.4);
  for (const int64_t col0 : {0, 5, 64, 1000}) {
    for (const int64_t n : {0, 1, 15, 64, 130}) {
      std::vector<T> multipliers(static_cast<size_t>(n)), values(static_cast<size_t>(n), T(2));
      probes.dropout_multipliers(kType<T>, dropout, 9, col0, n, multipliers.data());
      probes.dropout_row(kType<T>, dropout, 9, col0, n, values.data());
      for (int64_t i = 0; i < n; ++i) {
        const bool keeps = lwft::dropout_keeps(dropout, 9, col0 + i);
        const T expected = keeps ? static_cast<T>(dropout.keep_scale) : T(0);
        check(multipliers[i] == expected && values[i] == 2 * expected, isa, "dropout", col0, n, i);
      }
    }
  }
  for (int64_t n = 0; n < 40; ++n) {
    std::vector<T> x = whole_numbers<T>(n, 4), y(static_cast<size_t>(n));
    for (const auto function : {lwft::Unary::exp, lwft::Unary::exp2, lwft::Unary::tanh, lwft::Unary::erf}) {
      probes.unary(kType<T>, function, n, x.data(), y.data());
    }
    for (int64_t i = 0; i < n; ++i) check(std::fabs(y[i] - std::erf(x[i])) < 1e-6, isa, "erf", n, i);
  }
}

void on_three_threads(int64_t tasks, lwft::TaskRange run, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(context, task, task + 1);
  };
  std::thread second(work), third(work);
  work();
  second.join();
  third.join();
}

void test_tasks(const lwft::Probes& probes, const char* isa) {
  for (const lwft::ParallelFor host : {lwft::ParallelFor{nullptr}, lwft::ParallelFor{on_three_threads}}) {
    lwft::set_parallel_for(host);
    for (const int64_t tasks : {0, 1, 2, 300}) {
      std::vector<int64_t> results(static_cast<size_t>(tasks), -1);
      probes.run_tasks(tasks, false, results.data());
      bool each = true;
      for (int64_t i = 0; i < tasks; ++i) each = each && results[i] == i;
      check(each, isa, "tasks", tasks);
    }
    bool failed = false;
    std::vector<int64_t> results(50);
    try {
      probes.run_tasks(50, true, results.data());
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    check(failed, isa, "a task that gets no memory");
  }
  lwft::set_parallel_for(nullptr);
}

// What scopes inside scopes take stays apart and intact, also where the outer one took nothing yet, where
// blocks are added and where they are too large to keep.
void test_scratch() {
  const lwft::WorkspaceMark outermost = lwft::workspace_mark();
  for (const size_t bytes : {size_t{1}, size_t{100}, size_t{300} << 10, size_t{40} << 20}) {
    const lwft::WorkspaceMark outer = lwft::workspace_mark();
    for (int round = 0; round < 3; ++round) {
      const lwft::WorkspaceMark middle = lwft::workspace_mark();
      auto* const first = static_cast<char*>(lwft::workspace_take(bytes, 1));
      first[0] = first[bytes - 1] = 'a';
      const lwft::WorkspaceMark inner = lwft::workspace_mark();
      auto* const second = static_cast<char*>(lwft::workspace_take(2 * bytes, 1));
      second[0] = second[2 * bytes - 1] = 'b';
      lwft::workspace_release(inner);
      auto* const third = static_cast<double*>(lwft::workspace_take(3, sizeof(double)));
      third[0] = third[2] = 1.5;
      check(first[0] == 'a' && first[bytes - 1] == 'a', "any level", "scratch of a scope still open");
      for (const void* piece : {static_cast<void*>(first), static_cast<void*>(second), static_cast<void*>(third)}) {
        check(reinterpret_cast<uintptr_t>(piece) % 64 == 0, "any level", "alignment of scratch");
      }
      lwft::workspace_release(middle);
    }
    lwft::workspace_release(outer);
  }
  lwft::workspace_release(outermost);
}

}  // namespace

int main() {
  test_scratch();
  std::thread(test_scratch).join();
  for (int i = 0; i < lwft::cpu_level_count(); ++i) {
    if (!lwft::cpu_level_runs_here(i)) continue;
    const char* isa = lwft::cpu_level(i).isa;
    const lwft::Probes& probes = *lwft::find_probes(isa);
    test_products<float>(probes, isa);
    test_products<double>(probes, isa);
    test_parts(probes, isa);
    test_conversions(probes, isa);
    test_rows<float>(probes, isa);
    test_rows<double>(probes, isa);
    test_tasks(probes, isa);
    std::printf("%s: %d failures so far\n", isa, failures);
  }
  return failures == 0 ? 0 : 1;
}
