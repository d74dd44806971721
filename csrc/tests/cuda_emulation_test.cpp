// The emulation of CUDA itself: each instruction against the PTX manual, mistakes that it must find, and the kernels that
// are built on it, with buffers of the exact size for AddressSanitizer.
#include <cmath>
#include <cstring>
#include <functional>
#include <initializer_list>

#include "adapter/adapter.h"
#include "common/cuda/row.cuh"
#include "norm/norm.h"
#include "tests/check.h"

namespace {

using namespace lwft;
using namespace lwft::cuda;
using emulation::Schedule;
using lwft::tests::check;
using lwft::tests::random_values;

const char* const kWhere = "the emulation";

// Runs `body` under every schedule, with late and with early copies.
void in_every_mode(const std::function<void()>& body) {
  for (Schedule schedule : {Schedule::round_robin, Schedule::greedy, Schedule::greedy_reversed}) {
    for (bool early : {false, true}) {
      emulation::options = {schedule, early};
      body();
    }
  }
  emulation::options = {};
}

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

// ---- kernels ----

// Numbers are tested in python_tests/cuda; here, that nothing outside the buffers is touched and that the order in which
// threads run does not matter.
template <class T>
std::vector<T> random(int64_t count, uint32_t seed) {
  std::vector<T> values;
  for (float x : random_values<float>(count, seed)) values.push_back(from_float<T>(x));
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
void test_add_layer_norm(DType dtype, int64_t tokens, int64_t d) {
  const auto x = random<T>(tokens * d, 1), u = random<T>(tokens * d, 2), weight = random<T>(d, 3);
  const auto bias = random<T>(d, 4), grad_out = random<T>(tokens * d, 5);
  std::vector<T> first_out, first_dx, first_dweight;
  in_every_mode([&] {
    std::vector<T> out(tokens * d), dx(tokens * d), du(tokens * d), dweight(d), dbias(d);
    std::vector<float> mean(tokens), rstd(tokens);
    AddLayerNormForward p{};
    p.tokens = tokens;
    p.model_dim = d;
    p.x_dtype = p.sublayer_dtype = p.out_dtype = p.param_dtype = dtype;
    p.x = x.data();
    p.sublayer_out = u.data();
    p.x_row_stride = p.sublayer_row_stride = d;
    p.weight = weight.data();
    p.bias = bias.data();
    p.eps = 1e-5;
    p.dropout = make_dropout(1, 2, 0.25);
    p.out = out.data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    check(add_layer_norm_cuda_declines(p) == nullptr, kWhere, "add_layer_norm declines", tokens, d);
    check(add_layer_norm_forward_cuda(p, nullptr) == 0, kWhere, "add_layer_norm fails", tokens, d);
    AddLayerNormBackward b{};
    b.tokens = tokens;
    b.model_dim = d;
    b.x_dtype = b.sublayer_dtype = b.out_dtype = b.param_dtype = dtype;
    b.grad_out = grad_out.data();
    b.x = x.data();
    b.sublayer_out = u.data();
    b.grad_out_row_stride = b.x_row_stride = b.sublayer_row_stride = d;
    b.weight = weight.data();
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.dropout = p.dropout;
    b.dx = dx.data();
    b.dsublayer_out = du.data();
    b.dweight = dweight.data();
    b.dbias = dbias.data();
    check(add_layer_norm_cuda_declines(b) == nullptr, kWhere, "its backward declines", tokens, d);
    std::vector<float> workspace(add_layer_norm_backward_workspace(b), NAN);
    b.workspace = workspace.data();
    check(add_layer_norm_backward_cuda(b, nullptr) == 0, kWhere, "its backward fails", tokens, d);
    for (const auto* values : {&out, &dx, &du, &dweight, &dbias}) {
      for (T value : *values) check(std::isfinite(to_float(value)), kWhere, "add_layer_norm's results", tokens, d);
    }
    if (first_out.empty()) first_out = out, first_dx = dx, first_dweight = dweight;
    check(same_bits(out, first_out) && same_bits(dx, first_dx) && same_bits(dweight, first_dweight), kWhere,
          "add_layer_norm gives the same result in every mode", tokens, d);
  });
}

template <class T>
void test_adapter(DType dtype, int64_t tokens, int64_t d, int64_t m, bool norm) {
  const auto x = random<T>(tokens * d, 1), down = random<T>(m * d, 2), down_bias = random<T>(m, 3);
  const auto up = random<T>(d * m, 4), up_bias = random<T>(d, 5), norm_weight = random<T>(d, 6);
  const auto norm_bias = random<T>(d, 7);
  std::vector<T> first, first_dx, first_ddown, first_dup;
  in_every_mode([&] {
    std::vector<T> out(tokens * d), hidden(tokens * m);
    std::vector<float> mean(tokens), rstd(tokens);
    AdapterForward p{};
    p.tokens = tokens;
    p.model_dim = d;
    p.bottleneck = m;
    p.dtype = p.param_dtype = dtype;
    p.x = p.residual = x.data();
    p.x_row_stride = p.residual_row_stride = d;
    p.norm_weight = norm ? norm_weight.data() : nullptr;
    p.norm_bias = norm ? norm_bias.data() : nullptr;
    p.eps = 1e-5;
    p.down_weight = down.data();
    p.down_bias = down_bias.data();
    p.activation = Activation::gelu;
    p.up_weight = up.data();
    p.up_bias = up_bias.data();
    p.scale = 0.5;
    p.dropout = make_dropout(1, 2, 0.25);
    p.out = out.data();
    p.hidden = hidden.data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    check(adapter_cuda_declines(p) == nullptr, kWhere, "the adapter declines", tokens, d, m);
    check(adapter_forward_cuda(p, nullptr) == 0, kWhere, "the adapter fails", tokens, d, m);
    for (T value : out) check(std::isfinite(to_float(value)), kWhere, "the adapter's result", tokens, d, m);
    if (first.empty()) first = out;
    check(same_bits(out, first), kWhere, "the adapter gives the same result in every mode", tokens, d, m);

    std::vector<T> dx(tokens * d), ddown(m * d), ddown_bias(m), dup(d * m), dup_bias(d), dnorm_weight(d), dnorm_bias(d);
    AdapterBackward b{};
    b.tokens = tokens;
    b.model_dim = d;
    b.bottleneck = m;
    b.dtype = b.param_dtype = dtype;
    b.grad_out = x.data();
    b.x = x.data();
    b.grad_out_row_stride = b.x_row_stride = d;
    b.norm_weight = p.norm_weight;
    b.norm_bias = p.norm_bias;
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.down_weight = down.data();
    b.hidden = hidden.data();
    b.activation = p.activation;
    b.up_weight = up.data();
    b.scale = p.scale;
    b.dropout = p.dropout;
    b.residual_is_x = true;
    b.dx = dx.data();
    b.ddown_weight = ddown.data();
    b.ddown_bias = ddown_bias.data();
    b.dup_weight = dup.data();
    b.dup_bias = dup_bias.data();
    if (norm) b.dnorm_weight = dnorm_weight.data(), b.dnorm_bias = dnorm_bias.data();
    if (m > 64) return;  // which backward declines
    check(adapter_cuda_declines(b) == nullptr, kWhere, "the adapter's backward declines", tokens, d, m);
    std::vector<float> workspace(adapter_backward_workspace(b), NAN);
    b.workspace = workspace.data();
    check(adapter_backward_cuda(b, nullptr) == 0, kWhere, "the adapter's backward fails", tokens, d, m);
    for (const auto* values : {&dx, &ddown, &ddown_bias, &dup, &dup_bias, &dnorm_weight, &dnorm_bias}) {
      for (T value : *values) check(std::isfinite(to_float(value)), kWhere, "its gradients", tokens, d, m);
    }
    if (first_dx.empty()) first_dx = dx, first_ddown = ddown, first_dup = dup;
    check(same_bits(dx, first_dx) && same_bits(ddown, first_ddown) && same_bits(dup, first_dup), kWhere,
          "the adapter's gradients are the same in every mode", tokens, d, m);
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
  test_adapter<BFloat16>(DType::bf16, 1, 8, 8, true);
  test_adapter<BFloat16>(DType::bf16, 65, 136, 24, false);
  test_adapter<Float16>(DType::f16, 70, 72, 72, true);
  test_add_layer_norm<BFloat16>(DType::bf16, 3, 1032);
  test_add_layer_norm<Float16>(DType::f16, 9, 72);
  test_add_layer_norm<float>(DType::f32, 2, 4104);
  if (tests::failures == 0) std::puts("ok");
  return tests::failures == 0 ? 0 : 1;
}
