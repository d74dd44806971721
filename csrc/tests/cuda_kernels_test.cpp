// The CUDA kernels in the emulation: the results of the CPU kernels, in whatever order threads run, from buffers of the
// exact size for AddressSanitizer. Numbers are tested in depth from Python;
// python_tests/cuda/test_planted_faults.py breaks the kernels and looks whether this notices.
#include <cmath>
#include <cstring>

#include "adapter/adapter.h"
#include "attention/attention.h"
#include "common/cpu/dispatch.h"
#include "common/cuda/row.cuh"
#include "lowrank/lowrank.h"
#include "norm/norm.h"
#include "tests/cuda_modes.h"

namespace {

using namespace lwft;
using namespace lwft::cuda;
using lwft::tests::check;
using lwft::tests::in_every_mode;
using lwft::tests::random_values;
using lwft::tests::relative_error;

const char* const kWhere = "the emulation";

template <class T>
constexpr DType kType = DType::f32;
template <>
constexpr DType kType<BFloat16> = DType::bf16;
template <>
constexpr DType kType<Float16> = DType::f16;

// Between two kernels that round intermediate results in different places.
template <class T>
constexpr double kAllowedError = 2e-6;
template <>
constexpr double kAllowedError<BFloat16> = 2e-2;
template <>
constexpr double kAllowedError<Float16> = 3e-3;

template <class T>
std::vector<T> random(int64_t count, uint32_t seed) {
  std::vector<T> values;
  values.reserve(static_cast<size_t>(count));  // and no more, so that a step too far is one too far
  for (float x : random_values<float>(count, seed)) values.push_back(from_float<T>(x));
  return values;
}

template <class T>
using Results = std::vector<std::vector<T>>;

template <class T>
bool same_bits(const Results<T>& a, const Results<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].size() > 0 && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(T)) != 0) return false;
  }
  return true;
}

// `on_gpu` and `on_cpu` give the results of the same call.
template <class T, class OnGpu, class OnCpu>
void compare(const char* op, int64_t tokens, int64_t d, int64_t m, const OnGpu& on_gpu, const OnCpu& on_cpu) {
  const Results<T> expected = on_cpu();
  Results<T> first;
  in_every_mode([&] {
    const Results<T> found = on_gpu();
    for (size_t i = 0; i < found.size(); ++i) {
      std::vector<float> value;
      std::vector<double> right;
      for (T x : found[i]) value.push_back(to_float(x));
      for (T x : expected[i]) right.push_back(to_float(x));
      // a NaN is no small error, so not `> allowed`
      check(relative_error(value, right) <= kAllowedError<T>, kWhere, op, tokens, d, static_cast<int64_t>(i));
    }
    if (first.empty()) first = found;
    check(same_bits(found, first), kWhere, "the same bits in every mode", tokens, d, m);
  });
}

template <class T>
void test_add_layer_norm(int64_t tokens, int64_t d) {
  const auto x = random<T>(tokens * d, 1), u = random<T>(tokens * d, 2), weight = random<T>(d, 3);
  const auto bias = random<T>(d, 4), grad_out = random<T>(tokens * d, 5);
  const auto run = [&](auto&& forward, auto&& backward) {
    Results<T> results{std::vector<T>(tokens * d), std::vector<T>(tokens * d), std::vector<T>(tokens * d),
                       std::vector<T>(d), std::vector<T>(d)};
    std::vector<float> mean(tokens), rstd(tokens);
    AddLayerNormForward p{};
    p.tokens = tokens;
    p.model_dim = d;
    p.x_dtype = p.sublayer_dtype = p.out_dtype = p.param_dtype = kType<T>;
    p.x = x.data();
    p.sublayer_out = u.data();
    p.x_row_stride = p.sublayer_row_stride = d;
    p.weight = weight.data();
    p.bias = bias.data();
    p.eps = 1e-5;
    p.dropout = make_dropout(1, 2, 0.25);
    p.out = results[0].data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    forward(p);
    AddLayerNormBackward b{};
    b.tokens = tokens;
    b.model_dim = d;
    b.x_dtype = b.sublayer_dtype = b.out_dtype = b.param_dtype = kType<T>;
    b.grad_out = grad_out.data();
    b.x = x.data();
    b.sublayer_out = u.data();
    b.grad_out_row_stride = b.x_row_stride = b.sublayer_row_stride = d;
    b.weight = weight.data();
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.dropout = p.dropout;
    b.dx = results[1].data();
    b.dsublayer_out = results[2].data();
    b.dweight = results[3].data();
    b.dbias = results[4].data();
    backward(b);
    return results;
  };
  compare<T>(
      "add_layer_norm", tokens, d, 0,
      [&] {
        return run(
            [](const AddLayerNormForward& p) {
              check(add_layer_norm_cuda_declines(p) == nullptr, kWhere, "add_layer_norm declines");
              check(add_layer_norm_forward_cuda(p, nullptr) == 0, kWhere, "add_layer_norm fails");
            },
            [](AddLayerNormBackward& p) {
              check(add_layer_norm_cuda_declines(p) == nullptr, kWhere, "its backward declines");
              std::vector<float> workspace(add_layer_norm_backward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(add_layer_norm_backward_cuda(p, nullptr) == 0, kWhere, "its backward fails");
            });
      },
      [&] { return run(cpu_level(0).norm->forward, cpu_level(0).norm->backward); });
}

// Without dropout where !norm, so that both ways through each are met.
template <class T>
void test_adapter(int64_t tokens, int64_t d, int64_t m, bool norm) {
  const auto x = random<T>(tokens * d, 1), down = random<T>(m * d, 2), down_bias = random<T>(m, 3);
  const auto up = random<T>(d * m, 4), up_bias = random<T>(d, 5), norm_weight = random<T>(d, 6);
  const auto norm_bias = random<T>(d, 7), grad_out = random<T>(tokens * d, 8);
  const bool backward_too = m <= 128;
  const auto run = [&](auto&& forward, auto&& backward) {
    Results<T> results{std::vector<T>(tokens * d), std::vector<T>(tokens * m)};
    std::vector<float> mean(tokens), rstd(tokens);
    AdapterForward p{};
    p.tokens = tokens;
    p.model_dim = d;
    p.bottleneck = m;
    p.dtype = p.param_dtype = kType<T>;
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
    if (norm) p.dropout = make_dropout(1, 2, 0.25);
    p.out = results[0].data();
    p.hidden = results[1].data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    forward(p);
    if (!backward_too) return results;
    for (int64_t size : {tokens * d, m * d, m, d * m, d}) results.emplace_back(size);
    if (norm) results.emplace_back(d), results.emplace_back(d);
    AdapterBackward b{};
    b.tokens = tokens;
    b.model_dim = d;
    b.bottleneck = m;
    b.dtype = b.param_dtype = kType<T>;
    b.grad_out = grad_out.data();
    b.x = x.data();
    b.grad_out_row_stride = b.x_row_stride = d;
    b.norm_weight = p.norm_weight;
    b.norm_bias = p.norm_bias;
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.down_weight = down.data();
    b.hidden = results[1].data();
    b.activation = p.activation;
    b.up_weight = up.data();
    b.scale = p.scale;
    b.dropout = p.dropout;
    b.residual_is_x = true;
    b.dx = results[2].data();
    b.ddown_weight = results[3].data();
    b.ddown_bias = results[4].data();
    b.dup_weight = results[5].data();
    b.dup_bias = results[6].data();
    b.dnorm_weight = norm ? results[7].data() : nullptr;
    b.dnorm_bias = norm ? results[8].data() : nullptr;
    backward(b);
    return results;
  };
  compare<T>(
      "the adapter", tokens, d, m,
      [&] {
        return run(
            [](const AdapterForward& p) {
              check(adapter_cuda_declines(p) == nullptr, kWhere, "the adapter declines");
              check(adapter_forward_cuda(p, nullptr) == 0, kWhere, "the adapter fails");
            },
            [](AdapterBackward& p) {
              check(adapter_cuda_declines(p) == nullptr, kWhere, "its backward declines");
              std::vector<float> workspace(adapter_backward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(adapter_backward_cuda(p, nullptr) == 0, kWhere, "its backward fails");
            });
      },
      [&] { return run(cpu_level(0).adapter->forward, cpu_level(0).adapter->backward); });
}

// Everything the rule has, or nothing of it.
template <class T>
void test_attention(int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t d, bool everything) {
  const int64_t batch = 2, prefix = everything ? 5 : 0;
  const auto q = random<T>(batch * heads * queries * d, 1), k = random<T>(batch * kv_heads * keys * d, 2);
  const auto v = random<T>(batch * kv_heads * keys * d, 3), bias = random<T>(heads * queries * keys, 4);
  const auto prefix_k = random<T>(kv_heads * prefix * d, 5), prefix_v = random<T>(kv_heads * prefix * d, 6);
  std::vector<uint8_t> mask(queries * keys);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 5 != 0;
  const std::vector<int64_t> lengths{keys - 1, keys / 2};
  const auto grad_out = random<T>(batch * heads * queries * d, 7);
  const auto grad_lse = random_values<float>(batch * heads * queries, 8);
  const auto run = [&](auto&& forward, auto&& backward) {
    Results<T> results{std::vector<T>(batch * heads * queries * d)};
    std::vector<float> lse(batch * heads * queries);
    AttentionForward p{};
    p.shape = {batch, heads, kv_heads, queries, keys, prefix, d, kType<T>};
    p.rule.scale = 0.5;
    p.rule.bias_dtype = kType<T>;
    if (everything) {
      p.rule.softcap = 2.0;
      p.rule.causal = true;
      p.rule.window = keys - 2;
      p.rule.bias = {bias.data(), {0, queries * keys, keys, 1}};
      p.rule.mask = {mask.data(), {0, 0, keys, 1}};
      p.rule.lengths = lengths.data();
      p.rule.dropout = make_dropout(1, 2, 0.25);
      p.prefix_k = {prefix_k.data(), {0, prefix * d, d, 1}};
      p.prefix_v = {prefix_v.data(), {0, prefix * d, d, 1}};
    }
    p.q = {q.data(), {heads * queries * d, queries * d, d, 1}};
    p.k = {k.data(), {kv_heads * keys * d, keys * d, d, 1}};
    p.v = {v.data(), {kv_heads * keys * d, keys * d, d, 1}};
    p.out = {results[0].data(), {heads * queries * d, d, heads * d, 1}};
    p.lse = lse.data();
    forward(p);
    results.emplace_back();
    for (float x : lse) results[1].push_back(from_float<T>(x));
    // Backward declines wider heads; so many keys would take it most of the time of this test, and are no case of its own.
    if (d > 128 || keys > 1000) return results;
    AttentionBackward b{};
    for (size_t size : {q.size(), k.size(), v.size()}) results.emplace_back(size);
    if (everything) {
      for (size_t size : {bias.size(), prefix_k.size(), prefix_v.size()}) results.emplace_back(size);
      b.dbias = results[5].data();
      b.dprefix_k = results[6].data();
      b.dprefix_v = results[7].data();
    }
    b.shape = p.shape;
    b.rule = p.rule;
    b.grad_out = {grad_out.data(), {heads * queries * d, queries * d, d, 1}};
    b.grad_lse = grad_lse.data();
    b.q = p.q;
    b.k = p.k;
    b.v = p.v;
    b.prefix_k = p.prefix_k;
    b.prefix_v = p.prefix_v;
    b.out = {p.out.data, {heads * queries * d, d, heads * d, 1}};
    b.lse = lse.data();
    b.dq = {results[2].data(), {heads * queries * d, d, heads * d, 1}};
    b.dk = {results[3].data(), {kv_heads * keys * d, d, kv_heads * d, 1}};
    b.dv = {results[4].data(), {kv_heads * keys * d, d, kv_heads * d, 1}};
    const int64_t bias_size[] = {1, heads, queries, keys};
    for (int i = 0; i < 4; ++i) b.bias_size[i] = bias_size[i];
    b.prefix_batch = 1;
    backward(b);
    return results;
  };
  compare<T>(
      "attention", queries, keys, d,
      [&] {
        return run(
            [](AttentionForward& p) {
              check(attention_cuda_declines(p) == nullptr, kWhere, "attention declines");
              std::vector<float> workspace(attention_forward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(attention_forward_cuda(p, nullptr) == 0, kWhere, "attention fails");
            },
            [](AttentionBackward& p) {
              check(attention_cuda_declines(p) == nullptr, kWhere, "its backward declines");
              std::vector<float> workspace(attention_backward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(attention_backward_cuda(p, nullptr) == 0, kWhere, "its backward fails");
            });
      },
      [&] { return run(cpu_level(0).attention->forward, cpu_level(0).attention->backward); });
}

// `adapters` > 0: stacked, with dropout, of an odd number added to what is there; else with the gradient of the bias.
template <class T, class F>
void test_low_rank(int64_t tokens, int64_t d_in, int64_t rank, int64_t d_out, int64_t adapters) {
  const int64_t n = adapters > 0 ? adapters : 1;
  const auto x = random<T>(tokens * d_in, 1), base = random<T>(tokens * d_out, 2), bias = random<T>(d_out, 3);
  const auto grad_out = random<T>(tokens * d_out, 4);
  std::vector<F> a, b;
  for (float value : random_values<float>(n * rank * d_in, 5)) a.push_back(from_float<F>(value));
  for (float value : random_values<float>(n * d_out * rank, 6)) b.push_back(from_float<F>(value));
  std::vector<int64_t> index;
  for (int64_t token = 0; token < tokens && adapters > 0; ++token) {
    index.push_back(token % 7 == 3 ? -1 : token * adapters / tokens);
  }
  const auto run = [&](auto&& forward, auto&& backward) {
    Results<T> results{base, std::vector<T>(tokens * d_in, from_float<T>(NAN))};
    std::vector<float> hidden(tokens * rank);
    std::vector<F> da(a.size()), db(b.size());
    LowRankForward p{};
    p.tokens = tokens;
    p.in_features = d_in;
    p.rank = rank;
    p.out_features = d_out;
    p.adapters = n;
    p.x_dtype = p.out_dtype = p.bias_dtype = kType<T>;
    p.param_dtype = kType<F>;
    p.x = x.data();
    p.x_row_stride = d_in;
    p.a = a.data();
    p.b = b.data();
    p.adapter_index = adapters > 0 ? index.data() : nullptr;
    p.bias = bias.data();
    p.scale = 0.5;
    if (adapters > 0) p.dropout = make_dropout(1, 2, 0.25);
    p.accumulate = adapters % 2 == 1;
    p.out = results[0].data();
    p.out_row_stride = d_out;
    p.hidden = hidden.data();
    forward(p);
    if (adapters == 0) results.emplace_back(d_out);
    LowRankBackward g{};
    g.tokens = tokens;
    g.in_features = d_in;
    g.rank = rank;
    g.out_features = d_out;
    g.adapters = n;
    g.x_dtype = g.out_dtype = g.bias_dtype = kType<T>;
    g.param_dtype = kType<F>;
    g.grad_out = grad_out.data();
    g.grad_out_row_stride = d_out;
    g.x = x.data();
    g.x_row_stride = d_in;
    g.a = a.data();
    g.b = b.data();
    g.hidden = hidden.data();
    g.adapter_index = p.adapter_index;
    g.scale = p.scale;
    g.dropout = p.dropout;
    g.dx = results[1].data();
    g.da = da.data();
    g.db = db.data();
    g.dbias = adapters > 0 ? nullptr : results[2].data();
    backward(g);
    const auto rounded = [](const std::vector<F>& gradient) {
      std::vector<T> values;
      for (F value : gradient) values.push_back(from_float<T>(to_float(value)));
      return values;
    };
    results.push_back(rounded(da));
    results.push_back(rounded(db));
    return results;
  };
  compare<T>(
      "the low-rank product", tokens, d_in, rank,
      [&] {
        return run(
            [](LowRankForward& p) {
              check(low_rank_cuda_declines(p) == nullptr, kWhere, "the low-rank product declines");
              std::vector<float> workspace(low_rank_forward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(low_rank_forward_cuda(p, nullptr) == 0, kWhere, "the low-rank product fails");
            },
            [](LowRankBackward& p) {
              check(low_rank_cuda_declines(p) == nullptr, kWhere, "its backward declines");
              std::vector<float> workspace(low_rank_backward_workspace(p), NAN);
              p.workspace = workspace.data();
              check(low_rank_backward_cuda(p, nullptr) == 0, kWhere, "its backward fails");
            });
      },
      [&] { return run(cpu_level(0).lowrank->forward, cpu_level(0).lowrank->backward); });
}

}  // namespace

// With the name of a room, its kernels alone.
// Of all rooms, or of the one that is named, and then only up to the first failure.
int main(int argc, char** argv) {
  const auto wanted = [&](const char* room) { return argc < 2 || std::strcmp(argv[1], room) == 0; };
  tests::first_failure_ends = argc > 1;
  set_parallel_for(tests::run_on_two_threads);
  if (wanted("adapter")) {
    test_adapter<BFloat16>(1, 8, 8, true);
    test_adapter<BFloat16>(65, 136, 24, false);
    test_adapter<Float16>(70, 72, 56, true);
    test_adapter<Float16>(3, 136, 72, true);
    test_adapter<BFloat16>(2, 8, 136, true);
    test_adapter<BFloat16>(140, 8, 64, true);
  }
  if (wanted("attention")) {
    test_attention<BFloat16>(1, 1, 66, 70, 72, true);
    test_attention<BFloat16>(2, 1, 33, 66, 40, false);
    test_attention<Float16>(1, 1, 65, 40, 136, true);
    test_attention<Float16>(4, 2, 9, 70, 64, true);     // few rows
    test_attention<BFloat16>(4, 1, 1, 1100, 16, true);  // in two parts of the keys
  }
  if (wanted("norm")) {
    test_add_layer_norm<BFloat16>(3, 1032);
    test_add_layer_norm<Float16>(9, 72);
    test_add_layer_norm<float>(2, 4104);
    test_add_layer_norm<float>(270, 4104);  // more rows than blocks of backward
  }
  if (wanted("lowrank")) {
    test_low_rank<BFloat16, BFloat16>(1, 8, 3, 8, 0);
    test_low_rank<BFloat16, float>(70, 136, 12, 72, 0);
    test_low_rank<Float16, Float16>(3, 1096, 20, 40, 0);  // slices of the middle
    test_low_rank<BFloat16, float>(140, 72, 8, 200, 3);
    test_low_rank<Float16, float>(66, 136, 40, 72, 2);
    test_low_rank<BFloat16, BFloat16>(9, 200, 72, 136, 0);
  }
  if (tests::failures == 0) std::puts("ok");
  return tests::failures == 0 ? 0 : 1;
}
