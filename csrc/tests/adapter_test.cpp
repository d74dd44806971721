// The adapter against plain loops in double, on every level, under whatever sanitizer this is built with.
#include "adapter/adapter.h"

#include "tests/check.h"

namespace {

using namespace lwft;
using namespace lwft::tests;

struct Case {
  int64_t tokens, d, m;
  bool norm;
  double dropout_p;
};

template <class T>
std::vector<double> values(const std::vector<T>& elements) {
  return std::vector<double>(elements.begin(), elements.end());
}

std::vector<double> zeros(int64_t n) { return std::vector<double>(static_cast<size_t>(n)); }

template <class T>
void test_case(const CpuKernels& level, const Case& c) {
  const int64_t tokens = c.tokens, d = c.d, m = c.m;
  const auto x_in = random_values<T>(tokens * d, 1), residual_in = random_values<T>(tokens * d, 2);
  const auto gradient_in = random_values<T>(tokens * d, 3);
  const auto down_in = random_values<T>(m * d, 4), down_bias_in = random_values<T>(m, 5);
  const auto up_in = random_values<T>(d * m, 6), up_bias_in = random_values<T>(d, 7);
  const auto weight_in = random_values<T>(d, 8), bias_in = random_values<T>(d, 9);
  std::vector<T> out(tokens * d), hidden(tokens * m);
  std::vector<SumType<T>> mean(tokens), rstd(tokens);
  std::vector<T> dx(tokens * d), ddown(m * d), ddown_bias(m), dup(d * m), dup_bias(d), dweight(d), dbias(d);

  AdapterForward f{};
  f.tokens = tokens;
  f.model_dim = d;
  f.bottleneck = m;
  f.dtype = f.param_dtype = kType<T>;
  f.x = x_in.data();
  f.x_row_stride = f.residual_row_stride = d;
  f.norm_weight = c.norm ? weight_in.data() : nullptr;
  f.norm_bias = c.norm ? bias_in.data() : nullptr;
  f.eps = 1e-5;
  f.down_weight = down_in.data();
  f.down_bias = down_bias_in.data();
  f.activation = Activation::silu;
  f.up_weight = up_in.data();
  f.up_bias = up_bias_in.data();
  f.scale = 0.7;
  f.dropout = make_dropout(7, 9, c.dropout_p);
  f.residual = residual_in.data();
  f.out = out.data();
  f.hidden = hidden.data();
  f.mean = mean.data();
  f.rstd = rstd.data();
  level.adapter->forward(f);

  AdapterBackward b{};
  b.tokens = tokens;
  b.model_dim = d;
  b.bottleneck = m;
  b.dtype = b.param_dtype = kType<T>;
  b.grad_out = gradient_in.data();
  b.x = x_in.data();
  b.grad_out_row_stride = b.x_row_stride = d;
  b.norm_weight = f.norm_weight;
  b.norm_bias = f.norm_bias;
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.down_weight = down_in.data();
  b.hidden = hidden.data();
  b.activation = f.activation;
  b.up_weight = up_in.data();
  b.scale = f.scale;
  b.dropout = f.dropout;
  b.residual_is_x = true;
  b.dx = dx.data();
  b.ddown_weight = ddown.data();
  b.ddown_bias = ddown_bias.data();
  b.dup_weight = dup.data();
  b.dup_bias = dup_bias.data();
  b.dnorm_weight = c.norm ? dweight.data() : nullptr;
  b.dnorm_bias = c.norm ? dbias.data() : nullptr;
  level.adapter->backward(b);

  const auto x = values(x_in), residual = values(residual_in), gradient = values(gradient_in);
  const auto down = values(down_in), down_bias = values(down_bias_in), weight = values(weight_in);
  const auto up = values(up_in), up_bias = values(up_bias_in), bias = values(bias_in);
  auto e_out = zeros(tokens * d), e_dx = zeros(tokens * d), e_ddown = zeros(m * d), e_ddown_bias = zeros(m);
  auto e_dup = zeros(d * m), e_dup_bias = zeros(d), e_dweight = zeros(d), e_dbias = zeros(d);
  for (int64_t t = 0; t < tokens; ++t) {
    // forward
    double average = 0, variance = 0;
    for (int64_t j = 0; j < d; ++j) average += x[t * d + j] / static_cast<double>(d);
    for (int64_t j = 0; j < d; ++j) variance += std::pow(x[t * d + j] - average, 2) / static_cast<double>(d);
    const double r = 1 / std::sqrt(variance + f.eps);
    auto n = zeros(d), input = zeros(d), h = zeros(m), slope = zeros(m), dz = zeros(m), g = zeros(d);
    for (int64_t j = 0; j < d; ++j) {
      n[j] = (x[t * d + j] - average) * r;
      input[j] = c.norm ? n[j] * weight[j] + bias[j] : x[t * d + j];
    }
    for (int64_t k = 0; k < m; ++k) {
      double z = down_bias[k];
      for (int64_t j = 0; j < d; ++j) z += input[j] * down[k * d + j];
      const double s = 1 / (1 + std::exp(-z));
      h[k] = z * s;
      slope[k] = s * (1 + z * (1 - s));
    }
    for (int64_t j = 0; j < d; ++j) {
      const double keep = (dropout_keeps(f.dropout, t, j) ? f.dropout.keep_scale : 0.0) * f.scale;
      double y = up_bias[j];
      for (int64_t k = 0; k < m; ++k) y += h[k] * up[j * m + k];
      e_out[t * d + j] = residual[t * d + j] + keep * y;
      g[j] = keep * gradient[t * d + j];
    }
    // backward
    for (int64_t j = 0; j < d; ++j) {
      e_dup_bias[j] += g[j];
      for (int64_t k = 0; k < m; ++k) {
        e_dup[j * m + k] += g[j] * h[k];
        dz[k] += g[j] * up[j * m + k] * slope[k];
      }
    }
    auto dn = zeros(d);
    for (int64_t k = 0; k < m; ++k) {
      e_ddown_bias[k] += dz[k];
      for (int64_t j = 0; j < d; ++j) {
        e_ddown[k * d + j] += dz[k] * input[j];
        dn[j] += dz[k] * down[k * d + j];
      }
    }
    double mean_g = 0, mean_gn = 0;
    for (int64_t j = 0; j < d; ++j) {
      e_dweight[j] += dn[j] * n[j];
      e_dbias[j] += dn[j];
      mean_g += dn[j] * weight[j] / static_cast<double>(d);
      mean_gn += dn[j] * weight[j] * n[j] / static_cast<double>(d);
    }
    for (int64_t j = 0; j < d; ++j) {
      const double through = c.norm ? r * (dn[j] * weight[j] - mean_g - n[j] * mean_gn) : dn[j];
      e_dx[t * d + j] = through + gradient[t * d + j];
    }
  }
  const auto compare = [&](const std::vector<T>& mine, const std::vector<double>& exact, const char* what) {
    check(relative_error(values(mine), exact) < kAllowedError<T>, level.isa, what, tokens, d);
  };
  compare(out, e_out, "out");
  compare(dx, e_dx, "dx");
  compare(ddown, e_ddown, "ddown_weight");
  compare(ddown_bias, e_ddown_bias, "ddown_bias");
  compare(dup, e_dup, "dup_weight");
  compare(dup_bias, e_dup_bias, "dup_bias");
  if (c.norm) compare(dweight, e_dweight, "dnorm_weight");
  if (c.norm) compare(dbias, e_dbias, "dnorm_bias");
}

}  // namespace

int main() {
  return run_on_every_level([](const CpuKernels& level) {
    for (const Case& c : {Case{0, 33, 5, true, 0.3}, Case{1, 7, 3, false, 0.0}, Case{5, 97, 17, true, 0.3},
                          Case{31, 150, 64, false, 0.3}, Case{53, 33, 70, true, 0.0}, Case{67, 530, 50, true, 0.3},
                          Case{150, 70, 37, false, 0.0}, Case{2100, 9, 4, true, 0.1}, Case{2100, 17, 35, true, 0.1},
                          Case{3, 1500, 70, false, 0.3}, Case{1, 1300, 128, false, 0.0}}) {
      test_case<float>(level, c);
      test_case<double>(level, c);
      test_case<BFloat16>(level, c);
    }
  });
}
