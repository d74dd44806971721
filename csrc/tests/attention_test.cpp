// attention against plain loops in double, on every level, under whatever sanitizer this is built with.
#include "tests/check.h"

namespace {

using namespace lwft;
using namespace lwft::tests;

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, prefix, head_dim;
  bool causal = false;
  int64_t window = 0;
  double softcap = 0, dropout_p = 0;
  bool bias = false, mask = false, lengths = false;
  int64_t bias_size[4] = {1, 1, 1, 1};
  bool shared_prefix = false;
};

// Contiguous (a, b, c, d); a dimension of size 1 is broadcast.
Strided dense(const void* data, const int64_t (&size)[4]) {
  Strided result;
  result.data = data;
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    result.stride[i] = size[i] == 1 ? 0 : stride;
    stride *= size[i];
  }
  return result;
}
StridedOut dense_out(void* data, const int64_t (&size)[4]) {
  const Strided strided = dense(data, size);
  StridedOut result;
  result.data = data;
  for (int i = 0; i < 4; ++i) result.stride[i] = strided.stride[i];
  return result;
}
int64_t at(const Strided& t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
}

template <class T>
struct Run {
  const Case& c;
  int64_t q_size[4], k_size[4], prefix_size[4], mask_size[4];
  std::vector<T> q, k, v, prefix_k, prefix_v, bias, grad_out;
  std::vector<SumType<T>> lse, grad_lse;
  std::vector<uint8_t> mask;
  std::vector<int64_t> lengths;
  AttentionForward f{};
  AttentionBackward b{};
  std::vector<T> out, dq, dk, dv, dbias, dprefix_k, dprefix_v;
  std::vector<double> e_out, e_lse, e_dq, e_dk, e_dv, e_dbias, e_dprefix_k, e_dprefix_v;

  explicit Run(const Case& test)
      : c(test),
        q_size{c.batch, c.heads, c.queries, c.head_dim},
        k_size{c.batch, c.kv_heads, c.keys, c.head_dim},
        prefix_size{c.shared_prefix ? 1 : c.batch, c.kv_heads, c.prefix, c.head_dim},
        mask_size{c.batch, 1, c.queries, c.keys} {
    const auto count = [](const int64_t (&size)[4]) { return size[0] * size[1] * size[2] * size[3]; };
    q = random_values<T>(count(q_size), 1);
    k = random_values<T>(count(k_size), 2);
    v = random_values<T>(count(k_size), 3);
    prefix_k = random_values<T>(count(prefix_size), 4);
    prefix_v = random_values<T>(count(prefix_size), 5);
    bias = random_values<T>(count(c.bias_size), 6);
    grad_out = random_values<T>(count(q_size), 7);
    grad_lse = random_values<SumType<T>>(c.batch * c.heads * c.queries, 8);
    for (const double x : random_values<double>(count(mask_size), 9)) mask.push_back(x > -0.3);
    for (int64_t i = 0; i < c.batch; ++i) lengths.push_back(i % 2 == 0 ? c.keys * 2 / 3 : 0);
    out.resize(q.size());
    lse.resize(grad_lse.size());
    dq.resize(q.size());
    dk.resize(k.size());
    dv.resize(k.size());
    dbias.resize(bias.size());
    dprefix_k.resize(prefix_k.size());
    dprefix_v.resize(prefix_k.size());

    f.shape = {c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.prefix, c.head_dim, kType<T>};
    f.rule.scale = 0.4;
    f.rule.softcap = c.softcap;
    f.rule.causal = c.causal;
    f.rule.window = c.window;
    f.rule.bias_dtype = kType<T>;
    if (c.bias) f.rule.bias = dense(bias.data(), c.bias_size);
    if (c.mask) f.rule.mask = dense(mask.data(), mask_size);
    f.rule.lengths = c.lengths ? lengths.data() : nullptr;
    if (c.dropout_p > 0) f.rule.dropout = make_dropout(5, 6, c.dropout_p);
    f.q = dense(q.data(), q_size);
    f.k = dense(k.data(), k_size);
    f.v = dense(v.data(), k_size);
    f.prefix_k = dense(prefix_k.data(), prefix_size);
    f.prefix_v = dense(prefix_v.data(), prefix_size);
    f.out = dense_out(out.data(), q_size);
    f.lse = lse.data();

    b.shape = f.shape;
    b.rule = f.rule;
    b.grad_out = dense(grad_out.data(), q_size);
    b.grad_lse = grad_lse.data();
    b.q = f.q;
    b.k = f.k;
    b.v = f.v;
    b.prefix_k = f.prefix_k;
    b.prefix_v = f.prefix_v;
    b.out = dense(out.data(), q_size);
    b.lse = lse.data();
    b.dq = dense_out(dq.data(), q_size);
    b.dk = dense_out(dk.data(), k_size);
    b.dv = dense_out(dv.data(), k_size);
    b.dbias = c.bias ? dbias.data() : nullptr;
    for (int i = 0; i < 4; ++i) b.bias_size[i] = c.bias_size[i];
    b.dprefix_k = c.prefix > 0 ? dprefix_k.data() : nullptr;
    b.dprefix_v = c.prefix > 0 ? dprefix_v.data() : nullptr;
    b.prefix_batch = prefix_size[0];
  }

  bool sees(int64_t n, int64_t i, int64_t j) const {
    const int64_t position = i + c.keys - c.queries;
    if (c.causal && j > position) return false;
    if (c.window > 0 && (j <= position - c.window || (!c.causal && j >= position + c.window))) return false;
    if (c.lengths && j >= lengths[n]) return false;
    return !c.mask || mask[at(f.rule.mask, n, 0, i, j)] != 0;
  }

  // One row of the softmax and its gradient, by the formulas of lwft_kernels/attention/autograd.py.
  void expect_row(int64_t n, int64_t h, int64_t i) {
    const int64_t kv = h / (c.heads / c.kv_heads), columns = c.prefix + c.keys, d = c.head_dim;
    const int64_t row = (n * c.heads + h) * c.queries + i;
    const auto key = [&](int64_t j, int64_t l) -> double {
      return j < c.prefix ? prefix_k[at(f.prefix_k, n, kv, j, l)] : k[at(f.k, n, kv, j - c.prefix, l)];
    };
    const auto value = [&](int64_t j, int64_t l) -> double {
      return j < c.prefix ? prefix_v[at(f.prefix_v, n, kv, j, l)] : v[at(f.v, n, kv, j - c.prefix, l)];
    };
    std::vector<double> p(columns), keep(columns), slope(columns), dp(columns);
    double total = 0, delta = -grad_lse[row];
    for (int64_t j = 0; j < columns; ++j) {
      if (j >= c.prefix && !sees(n, i, j - c.prefix)) continue;
      double score = 0;
      for (int64_t l = 0; l < d; ++l) score += f.rule.scale * q[at(f.q, n, h, i, l)] * key(j, l);
      slope[j] = 1;
      if (c.softcap > 0) {
        const double bent = std::tanh(score / c.softcap);
        score = c.softcap * bent;
        slope[j] = 1 - bent * bent;
      }
      if (c.bias && j >= c.prefix) score += bias[at(f.rule.bias, n, h, i, j - c.prefix)];
      p[j] = std::exp(score);
      total += p[j];
    }
    e_lse[row] = std::log(total);
    if (total == 0) return;
    for (int64_t j = 0; j < columns; ++j) {
      p[j] /= total;
      keep[j] = dropout_keeps(f.rule.dropout, row, j) ? f.rule.dropout.keep_scale : 0.0;
      for (int64_t l = 0; l < d; ++l) {
        const double dy = grad_out[at(f.q, n, h, i, l)];
        e_out[at(f.q, n, h, i, l)] += p[j] * keep[j] * value(j, l);
        dp[j] += keep[j] * dy * value(j, l);
        auto& dvalue = j < c.prefix ? e_dprefix_v[at(f.prefix_v, n, kv, j, l)] : e_dv[at(f.v, n, kv, j - c.prefix, l)];
        dvalue += p[j] * keep[j] * dy;
      }
      delta += p[j] * dp[j];
    }
    for (int64_t j = 0; j < columns; ++j) {
      const double ds = p[j] * (dp[j] - delta), dr = ds * slope[j] * f.rule.scale;
      if (c.bias && j >= c.prefix) e_dbias[at(f.rule.bias, n, h, i, j - c.prefix)] += ds;
      for (int64_t l = 0; l < d; ++l) {
        e_dq[at(f.q, n, h, i, l)] += dr * key(j, l);
        auto& dkey = j < c.prefix ? e_dprefix_k[at(f.prefix_k, n, kv, j, l)] : e_dk[at(f.k, n, kv, j - c.prefix, l)];
        dkey += dr * q[at(f.q, n, h, i, l)];
      }
    }
  }

  void test(const CpuKernels& level, int64_t number) {
    level.attention->forward(f);
    level.attention->backward(b);
    e_out.assign(q.size(), 0);
    e_lse.assign(lse.size(), 0);
    e_dq.assign(q.size(), 0);
    e_dk.assign(k.size(), 0);
    e_dv.assign(k.size(), 0);
    e_dbias.assign(bias.size(), 0);
    e_dprefix_k.assign(prefix_k.size(), 0);
    e_dprefix_v.assign(prefix_k.size(), 0);
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t i = 0; i < c.queries; ++i) expect_row(n, h, i);
      }
    }
    for (size_t i = 0; i < lse.size(); ++i) {
      if (!std::isinf(e_lse[i])) continue;
      check(std::isinf(lse[i]) && lse[i] < 0, level.isa, "lse of an empty row", number, static_cast<int64_t>(i));
      lse[i] = 0;
      e_lse[i] = 0;
    }
    const auto expect = [&](const auto& value, const std::vector<double>& expected, const char* name) {
      check(relative_error(value, expected) < kAllowedError<T>, level.isa, name, number);
    };
    expect(out, e_out, "out");
    expect(lse, e_lse, "lse");
    expect(dq, e_dq, "dq");
    expect(dk, e_dk, "dk");
    expect(dv, e_dv, "dv");
    if (c.bias) expect(dbias, e_dbias, "dbias");
    expect(dprefix_k, e_dprefix_k, "dprefix_k");
    expect(dprefix_v, e_dprefix_v, "dprefix_v");
  }
};

// Each is the smallest that reaches a path of its own: few and many rows, one and several blocks and chunks,
// every way a bias gradient is summed.
const Case kCases[] = {
    {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 1, .keys = 530, .prefix = 3, .head_dim = 33, .dropout_p = 0.2},
    {.batch = 1, .heads = 2, .kv_heads = 2, .queries = 50, .keys = 50, .prefix = 0, .head_dim = 17, .causal = true},
    {.batch = 2,
     .heads = 2,
     .kv_heads = 1,
     .queries = 30,
     .keys = 140,
     .prefix = 5,
     .head_dim = 70,
     .causal = true,
     .window = 40,
     .softcap = 2,
     .dropout_p = 0.3,
     .shared_prefix = true},
    {.batch = 2,
     .heads = 3,
     .kv_heads = 3,
     .queries = 20,
     .keys = 300,
     .prefix = 0,
     .head_dim = 8,
     .bias = true,
     .mask = true,
     .bias_size = {1, 3, 20, 300}},
    {.batch = 2,
     .heads = 2,
     .kv_heads = 1,
     .queries = 60,
     .keys = 20,
     .prefix = 2,
     .head_dim = 5,
     .window = 30,
     .bias = true,
     .lengths = true,
     .bias_size = {1, 1, 60, 20}},
    {.batch = 2,
     .heads = 2,
     .kv_heads = 2,
     .queries = 9,
     .keys = 150,
     .prefix = 1,
     .head_dim = 1,
     .bias = true,
     .bias_size = {2, 1, 9, 1}},
    {.batch = 2,
     .heads = 2,
     .kv_heads = 2,
     .queries = 9,
     .keys = 40,
     .prefix = 0,
     .head_dim = 12,
     .bias = true,
     .bias_size = {1, 1, 1, 40}},
    {.batch = 2, .heads = 2, .kv_heads = 2, .queries = 9, .keys = 0, .prefix = 0, .head_dim = 12},
    {.batch = 2, .heads = 2, .kv_heads = 2, .queries = 0, .keys = 9, .prefix = 1, .head_dim = 12},
};

}  // namespace

int main() {
  return run_on_every_level([](const CpuKernels& level) {
    int64_t number = 0;
    for (const Case& c : kCases) {
      Run<float>(c).test(level, number);
      Run<double>(c).test(level, number);
      Run<BFloat16>(c).test(level, number);
      ++number;
    }
  });
}
