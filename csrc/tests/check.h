// What the C++ tests share: random inputs in buffers of the exact size (so that AddressSanitizer sees a step too far),
// real threads (for ThreadSanitizer), every level this machine runs, and one error measure. The numbers are tested in
// depth from Python; here the same code runs under the sanitizers.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "common/cpu/dispatch.h"
#include "common/cpu/threads.h"

namespace lwft::tests {

inline int failures = 0;
inline bool first_failure_ends = false;  // for who only asks whether there is one

inline void check(bool holds, const char* isa, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED on %s: %s (%lld, %lld, %lld)\n", isa, what, static_cast<long long>(a),
               static_cast<long long>(b), static_cast<long long>(c));
  if (first_failure_ends) std::_Exit(1);
}

// A bfloat16 in memory: the upper half of a float, rounded towards zero where it is made of one.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = static_cast<uint16_t>(wide >> 16);
  }
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

template <class T>
constexpr DType kType = sizeof(T) == 8   ? DType::f64
                        : sizeof(T) == 4 ? DType::f32
                                         : DType::bf16;

// What sums and statistics are kept in: accumulate_dtype.
template <class T>
using SumType = std::conditional_t<sizeof(T) == 8, double, float>;

// Uniform in [-1, 1).
template <class T>
std::vector<T> random_values(int64_t count, uint32_t seed) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<T>(static_cast<SumType<T>>(static_cast<int32_t>(seed)) / static_cast<SumType<T>>(2147483648.0));
  }
  return values;
}

// |value - expected| / |expected| in the Euclidean norm.
template <class T>
double relative_error(const std::vector<T>& value, const std::vector<double>& expected) {
  double distance = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = static_cast<double>(value[i]) - expected[i];
    distance += difference * difference;
    size += expected[i] * expected[i];
  }
  return size > 0 ? std::sqrt(distance / size) : std::sqrt(distance);
}

// A rounding error that a sum of a few hundred terms may have; of bfloat16, whose 8 bits intermediate results are
// rounded to as well, what only tells right from wrong.
template <class T>
constexpr double kAllowedError = sizeof(T) == 8   ? 1e-13
                                 : sizeof(T) == 4 ? 2e-6
                                                  : 2e-2;

inline void run_on_two_threads(int64_t tasks, TaskRange run, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(context, task, task + 1);
  };
  std::thread other(work);
  work();
  other.join();
}

// test(kernels of a level) on every level, on two threads; the exit status of main.
template <class Test>
int run_on_every_level(const Test& test) {
  set_parallel_for(run_on_two_threads);
  for (int i = 0; i < cpu_level_count(); ++i) {
    if (cpu_level_runs_here(i)) test(cpu_level(i));
  }
  if (failures == 0) std::puts("ok");
  return failures == 0 ? 0 : 1;
}

}  // namespace lwft::tests
