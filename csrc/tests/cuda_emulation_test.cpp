// The emulation of CUDA itself: each instruction against the PTX manual, and mistakes that it must find.
#include <cmath>
#include <cstring>
#include <functional>
#include <initializer_list>

#include "common/cuda/portable.cuh"
#include "tests/cuda_modes.h"

namespace {

using namespace lwft;
using namespace lwft::cuda;
using emulation::Schedule;
using lwft::tests::check;
using lwft::tests::in_every_mode;
using lwft::tests::random_values;

const char* const kWhere = "the emulation";

// What launch() throws, or "" when it throws nothing.
template <class... Arguments>
std::string error_of(void (*kernel)(Arguments...), int threads, Arguments... arguments) {
  try {
    launch(kernel, 1, threads, 4096, nullptr, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// ---- instructions ----

// The layouts as PTX ISA 8.5, section 9.7.14.5.8 (mma.m16n8k16 with .f16 and .bf16) and 9.7.14.5.15 (ldmatrix) give them,
// by the formulas there and not by those of the emulation.
struct MmaTest {
  const uint16_t* a;  // (16, 16)
  const uint16_t* b;  // (16, 8)
  float* c;           // (16, 8)
};

template <class T>
LWFT_KERNEL(kWarpLanes)
mma_kernel(MmaTest p) {
  const int group = thread_index() >> 2, in_group = thread_index() % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 8; i += 2) {  // a0..a7, in pairs
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const int column = in_group * 2 + (i >= 4 ? 8 : 0);
    a[i / 2] = p.a[row * 16 + column] | static_cast<uint32_t>(p.a[row * 16 + column + 1]) << 16;
  }
  for (int i = 0; i < 4; i += 2) {  // b0..b3
    const int row = in_group * 2 + (i >= 2 ? 8 : 0);
    b[i / 2] = p.b[row * 8 + group] | static_cast<uint32_t>(p.b[(row + 1) * 8 + group]) << 16;
  }
  float c[4];
  const auto index = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) c[i] = p.c[index(i)];
  mma<T>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[index(i)] = c[i];
}

template <class T>
void test_mma(const char* name) {
  std::vector<uint16_t> a, b;
  for (float x : random_values<float>(256, 1)) a.push_back(from_float<T>(x).bits);
  for (float x : random_values<float>(128, 2)) b.push_back(from_float<T>(x).bits);
  std::vector<float> c = random_values<float>(128, 3);
  std::vector<double> expected(c.begin(), c.end());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) {
        expected[i * 8 + j] += static_cast<double>(to_float(T{a[i * 16 + k]})) * to_float(T{b[k * 8 + j]});
      }
    }
  }
  launch(mma_kernel<T>, 1, kWarpLanes, 0, nullptr, MmaTest{a.data(), b.data(), c.data()});
  check(tests::relative_error(c, expected) < 1e-6, name, "mma");
}

template <bool kTransposed>
LWFT_KERNEL(kWarpLanes)
ldmatrix_kernel(uint32_t* result) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = thread_index(); i < 32 * 8; i += kWarpLanes) shared[i] = static_cast<uint16_t>(i);
  block_barrier();
  uint32_t r[4];
  const uint16_t* row = shared + (31 - thread_index()) * 8;  // row i of the four matrices: element (31 - i) * 8
  kTransposed ? ldmatrix_x4_transposed(r, row) : ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) result[thread_index() * 4 + i] = r[i];
}

void test_ldmatrix() {
  std::vector<uint32_t> result(kWarpLanes * 4), transposed(kWarpLanes * 4);
  launch(ldmatrix_kernel<false>, 1, kWarpLanes, 4096, nullptr, result.data());
  launch(ldmatrix_kernel<true>, 1, kWarpLanes, 4096, nullptr, transposed.data());
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) { return (31 - (matrix * 8 + row)) * 8 + column; };
      const int i = lane / 4, j = lane % 4 * 2;
      check(result[lane * 4 + matrix] == static_cast<uint32_t>(element(i, j) | element(i, j + 1) << 16), kWhere,
            "ldmatrix", lane, matrix);
      check(transposed[lane * 4 + matrix] == static_cast<uint32_t>(element(j, i) | element(j + 1, i) << 16), kWhere,
            "ldmatrix.trans", lane, matrix);
    }
  }
}

LWFT_KERNEL(kWarpLanes) shuffle_kernel(float* values) {
  const int lane = thread_index();
  values[lane] = shuffle_xor(values[lane], 5);
}

void test_shuffle() {
  std::vector<float> values(kWarpLanes);
  for (int i = 0; i < kWarpLanes; ++i) values[i] = static_cast<float>(i);
  launch(shuffle_kernel, 1, kWarpLanes, 0, nullptr, values.data());
  for (int i = 0; i < kWarpLanes; ++i) check(values[i] == static_cast<float>(i ^ 5), kWhere, "shuffle_xor", i);
}

LWFT_KERNEL(kWarpLanes) copy_kernel(const float* from, float* seen) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index();
  copy_async(shared + lane * 8, from + lane * 4, true);
  copy_commit();
  copy_async(shared + lane * 8 + 4, nullptr, false);
  copy_commit();
  copy_wait<1>();  // the first copy is there
  seen[lane * 3] = shared[lane * 8 + 3];
  seen[lane * 3 + 1] = shared[lane * 8 + 4];  // the second may be
  copy_wait<0>();
  seen[lane * 3 + 2] = shared[lane * 8 + 4];
}

void test_copies() {
  in_every_mode([] {
    alignas(16) float from[kWarpLanes * 4];
    for (int i = 0; i < kWarpLanes * 4; ++i) from[i] = static_cast<float>(i);
    std::vector<float> seen(kWarpLanes * 3);
    launch(copy_kernel, 1, kWarpLanes, 4096, nullptr, static_cast<const float*>(from), seen.data());
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      check(seen[lane * 3] == from[lane * 4 + 3], kWhere, "copy_async", lane);
      const bool early = emulation::options.early_copies;
      check(early ? seen[lane * 3 + 1] == 0.0f : std::isnan(seen[lane * 3 + 1]), kWhere, "copy_wait<1>", lane);
      check(seen[lane * 3 + 2] == 0.0f, kWhere, "zeros of copy_async", lane);
    }
  });
}

// Every 16-bit float there and back; the middle between neighbours goes to the even one, a little beyond it does not.
template <class T>
void test_conversions(const char* name, uint16_t infinity) {
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const float low = to_float(T{bits});
    check(from_float<T>(low).bits == bits && from_float<T>(-low).bits == (bits | 0x8000), name, "conversion", bits);
    if (bits + 1 == infinity) break;
    const float high = to_float(T{static_cast<uint16_t>(bits + 1)});
    const auto middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    const auto even = static_cast<uint16_t>(bits + bits % 2);
    check(from_float<T>(middle).bits == even, name, "conversion of a middle", bits);
    check(from_float<T>(std::nextafter(middle, low)).bits == bits, name, "conversion below a middle", bits);
    check(from_float<T>(std::nextafter(middle, high)).bits == bits + 1, name, "conversion above a middle", bits);
  }
  check(to_float(T{infinity}) == HUGE_VALF && from_float<T>(HUGE_VALF).bits == infinity, name, "infinity");
  check(std::isnan(to_float(from_float<T>(NAN))), name, "NaN");
}

// ---- mistakes that it must find ----

// Each thread hands its number to the thread that mirrors it.
template <bool kWithBarrier>
LWFT_KERNEL(2 * kWarpLanes)
mirror_kernel(float* result) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index();
  shared[thread] = static_cast<float>(thread);
  if (kWithBarrier) block_barrier();
  result[thread] = shared[2 * kWarpLanes - 1 - thread];
}

// The same through copies in two rounds into one buffer; a wait or the barrier before it is written again may be missing.
template <bool kWithWait, bool kWithSecondBarrier>
LWFT_KERNEL(2 * kWarpLanes)
reuse_kernel(const float* from, float* result) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), threads = 2 * kWarpLanes;
  for (int round = 0; round < 2; ++round) {
    copy_async(shared + thread * 4, from + (round * threads + thread) * 4, true);
    copy_commit();
    if (kWithWait) copy_wait<0>();
    block_barrier();
    result[round * threads + thread] = shared[(threads - 1 - thread) * 4];
    if (kWithSecondBarrier) block_barrier();
  }
}

LWFT_KERNEL(2 * kWarpLanes) half_barrier_kernel() {
  if (thread_index() < 40) block_barrier();
}
LWFT_KERNEL(kWarpLanes) missing_lane_kernel() {
  if (thread_index() != 7) shuffle_xor(1.0f, 1);
}
LWFT_KERNEL(kWarpLanes) different_instructions_kernel() {
  uint32_t r[4];
  if (thread_index() < 16) {
    shuffle_xor(1.0f, 1);
  } else {
    ldmatrix_x4(r, shared_memory());
  }
}
LWFT_KERNEL(kWarpLanes) misaligned_kernel() {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + 8);
}

int modes_with_a_wrong_result(void (*kernel)(float*)) {
  int wrong = 0;
  in_every_mode([&] {
    std::vector<float> result(2 * kWarpLanes);
    launch(kernel, 1, 2 * kWarpLanes, 4096, nullptr, result.data());
    bool right = true;
    for (int i = 0; i < 2 * kWarpLanes; ++i) right &= result[i] == static_cast<float>(2 * kWarpLanes - 1 - i);
    wrong += !right;
  });
  return wrong;
}

int modes_with_a_wrong_result(void (*kernel)(const float*, float*)) {
  constexpr int threads = 2 * kWarpLanes;
  int wrong = 0;
  in_every_mode([&] {
    alignas(16) float from[2 * threads * 4];
    for (int i = 0; i < 2 * threads * 4; ++i) from[i] = static_cast<float>(i);
    std::vector<float> result(2 * threads);
    launch(kernel, 1, threads, 4096, nullptr, static_cast<const float*>(from), result.data());
    bool right = true;
    for (int round = 0; round < 2; ++round) {
      for (int i = 0; i < threads; ++i) {
        right &= result[round * threads + i] == from[(round * threads + threads - 1 - i) * 4];
      }
    }
    wrong += !right;
  });
  return wrong;
}

void test_mistakes() {
  check(modes_with_a_wrong_result(mirror_kernel<true>) == 0, kWhere, "a barrier in its place");
  check(modes_with_a_wrong_result(mirror_kernel<false>) > 0, kWhere, "a missing barrier is found");
  check(modes_with_a_wrong_result(reuse_kernel<true, true>) == 0, kWhere, "waits and barriers in their places");
  check(modes_with_a_wrong_result(reuse_kernel<false, true>) > 0, kWhere, "a missing wait is found");
  check(modes_with_a_wrong_result(reuse_kernel<true, false>) > 0, kWhere, "writing what others still read is found");
  in_every_mode([] {
    check(contains(error_of(half_barrier_kernel, 2 * kWarpLanes), "wait for each other"), kWhere, "half a barrier");
    check(contains(error_of(missing_lane_kernel, kWarpLanes), "wait for each other"), kWhere, "a missing lane");
    check(contains(error_of(different_instructions_kernel, kWarpLanes), "meet in"), kWhere, "lanes that part");
    check(contains(error_of(misaligned_kernel, kWarpLanes), "multiple of 16"), kWhere, "a misaligned address");
    check(contains(error_of(missing_lane_kernel, 33), "whole warps"), kWhere, "part of a warp");
  });
}

}  // namespace

int main() {
  test_mma<BFloat16>("bf16");
  test_mma<Float16>("fp16");
  test_ldmatrix();
  test_shuffle();
  test_copies();
  test_conversions<BFloat16>("bf16", 0x7F80);
  test_conversions<Float16>("fp16", 0x7C00);
  test_mistakes();
  if (tests::failures == 0) std::puts("ok");
  return tests::failures == 0 ? 0 : 1;
}
