// add_layer_norm against plain loops in double, on every level, under whatever sanitizer this is built with.
#include "tests/check.h"

namespace {

using namespace lwft;
using namespace lwft::tests;

template <class T>
void test_sizes(const CpuKernels& level, int64_t tokens, int64_t d, double dropout_p) {
  const auto x = random_values<T>(tokens * d, 1), u = random_values<T>(tokens * d, 2),
             g = random_values<T>(tokens * d, 3);
  const auto weight = random_values<T>(d, 4), bias = random_values<T>(d, 5);
  std::vector<T> out(x.size()), mean(tokens), rstd(tokens), dx(x.size()), du(x.size()), dweight(d), dbias(d);

  AddLayerNormForward f{};
  f.tokens = tokens;
  f.model_dim = d;
  f.x_dtype = f.sublayer_dtype = f.out_dtype = f.param_dtype = kType<T>;
  f.x = x.data();
  f.sublayer_out = u.data();
  f.x_row_stride = f.sublayer_row_stride = d;
  f.weight = weight.data();
  f.bias = bias.data();
  f.eps = 1e-5;
  f.dropout = make_dropout(7, 9, dropout_p);
  f.out = out.data();
  f.mean = mean.data();
  f.rstd = rstd.data();
  level.norm->forward(f);

  AddLayerNormBackward b{};
  b.tokens = tokens;
  b.model_dim = d;
  b.x_dtype = b.sublayer_dtype = b.out_dtype = b.param_dtype = kType<T>;
  b.grad_out = g.data();
  b.x = x.data();
  b.sublayer_out = u.data();
  b.grad_out_row_stride = b.x_row_stride = b.sublayer_row_stride = d;
  b.weight = weight.data();
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.dropout = f.dropout;
  b.dx = dx.data();
  b.dsublayer_out = du.data();
  b.dweight = dweight.data();
  b.dbias = dbias.data();
  level.norm->backward(b);

  std::vector<double> e_out(x.size()), e_dx(x.size()), e_du(x.size()), e_dweight(d), e_dbias(d);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> s(d), keep(d);
    double m = 0, variance = 0, mean_g = 0, mean_gn = 0;
    for (int64_t j = 0; j < d; ++j) {
      keep[j] = dropout_keeps(f.dropout, t, j) ? f.dropout.keep_scale : 0.0;
      s[j] = x[t * d + j] + keep[j] * u[t * d + j];
      m += s[j] / d;
    }
    for (int64_t j = 0; j < d; ++j) variance += (s[j] - m) * (s[j] - m) / d;
    const double r = 1 / std::sqrt(variance + f.eps);
    for (int64_t j = 0; j < d; ++j) {
      const double n = (s[j] - m) * r, gradient = g[t * d + j];
      e_out[t * d + j] = n * weight[j] + bias[j];
      mean_g += gradient * weight[j] / d;
      mean_gn += gradient * weight[j] * n / d;
      e_dweight[j] += gradient * n;
      e_dbias[j] += gradient;
    }
    for (int64_t j = 0; j < d; ++j) {
      e_dx[t * d + j] = r * (g[t * d + j] * weight[j] - mean_g - (s[j] - m) * r * mean_gn);
      e_du[t * d + j] = keep[j] * e_dx[t * d + j];
    }
  }
  check(relative_error(out, e_out) < kAllowedError<T>, level.isa, "out", tokens, d);
  check(relative_error(dx, e_dx) < kAllowedError<T>, level.isa, "dx", tokens, d);
  check(relative_error(du, e_du) < kAllowedError<T>, level.isa, "dsublayer_out", tokens, d);
  check(relative_error(dweight, e_dweight) < kAllowedError<T>, level.isa, "dweight", tokens, d);
  check(relative_error(dbias, e_dbias) < kAllowedError<T>, level.isa, "dbias", tokens, d);
}

}  // namespace

int main() {
  return run_on_every_level([](const CpuKernels& level) {
    for (const int64_t tokens : {0, 1, 17, 131}) {
      for (const int64_t d : {7, 33, 96}) {
        test_sizes<float>(level, tokens, d, 0.0);
        test_sizes<float>(level, tokens, d, 0.3);
        test_sizes<double>(level, tokens, d, 0.3);
      }
    }
  });
}
