// The low-rank product against plain loops in double, on every level, under whatever sanitizer there is.
#include <cstring>
#include <tuple>

#include "tests/check.h"

namespace {

using namespace lwft;
using namespace lwft::tests;

struct Case {
  int64_t tokens, in_features, rank, out_features;
  int64_t adapters;  // 0: one adapter and no index
  double dropout_p;
  bool accumulate;
};

template <class T>
void test_case(const CpuKernels& level, const Case& c) {
  const int64_t tokens = c.tokens, d_in = c.in_features, r = c.rank, d_out = c.out_features;
  const int64_t adapters = c.adapters > 0 ? c.adapters : 1;
  const auto x = random_values<T>(tokens * d_in, 1), g = random_values<T>(tokens * d_out, 2);
  const auto a = random_values<T>(adapters * r * d_in, 3), b = random_values<T>(adapters * d_out * r, 4);
  const auto bias = random_values<T>(d_out, 5);
  std::vector<T> out = random_values<T>(tokens * d_out, 6);
  std::vector<SumType<T>> hidden(tokens * r);
  std::vector<T> dx(x.size()), da(a.size()), db(b.size()), dbias(d_out);
  std::vector<int64_t> index(tokens);
  // Runs of a few tokens, some without an adapter; the last adapter is used by nobody.
  for (int64_t t = 0; t < tokens; ++t) index[t] = c.adapters > 0 ? t / 5 % c.adapters - 1 : 0;

  std::vector<double> e_out(out.begin(), out.end()), e_hidden(hidden.size());
  std::vector<double> e_dx(dx.size()), e_da(da.size()), e_db(db.size()), e_dbias(d_out);
  const double scale = 0.75;
  const Dropout dropout = make_dropout(7, 9, c.dropout_p);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t adapter = c.adapters > 0 ? index[t] : 0;
    for (int64_t j = 0; j < d_out; ++j) {
      if (!c.accumulate) e_out[t * d_out + j] = bias[j];
      e_dbias[j] += g[t * d_out + j];
    }
    if (adapter < 0) continue;
    const T *at = a.data() + adapter * r * d_in, *bt = b.data() + adapter * d_out * r;
    std::vector<double> xd(d_in);
    for (int64_t k = 0; k < d_in; ++k) {
      xd[k] = dropout_keeps(dropout, t, k) ? dropout.keep_scale * x[t * d_in + k] : 0.0;
    }
    for (int64_t i = 0; i < r; ++i) {
      double h = 0, dh = 0;
      for (int64_t k = 0; k < d_in; ++k) h += xd[k] * at[i * d_in + k];
      e_hidden[t * r + i] = h;
      for (int64_t j = 0; j < d_out; ++j) {
        const double gradient = scale * g[t * d_out + j];
        e_out[t * d_out + j] += scale * h * bt[j * r + i];
        dh += gradient * bt[j * r + i];
        e_db[(adapter * d_out + j) * r + i] += gradient * h;
      }
      for (int64_t k = 0; k < d_in; ++k) {
        const double keep = dropout_keeps(dropout, t, k) ? dropout.keep_scale : 0.0;
        e_dx[t * d_in + k] += keep * dh * at[i * d_in + k];
        e_da[(adapter * r + i) * d_in + k] += dh * xd[k];
      }
    }
  }

  LowRankForward f{};
  f.tokens = tokens;
  f.in_features = d_in;
  f.rank = r;
  f.out_features = d_out;
  f.adapters = adapters;
  f.x_dtype = f.out_dtype = f.bias_dtype = f.param_dtype = kType<T>;
  f.x = x.data();
  f.x_row_stride = d_in;
  f.a = a.data();
  f.b = b.data();
  f.adapter_index = c.adapters > 0 ? index.data() : nullptr;
  f.bias = bias.data();
  f.scale = scale;
  f.dropout = dropout;
  f.accumulate = c.accumulate;
  f.out = out.data();
  f.out_row_stride = d_out;
  f.hidden = hidden.data();
  std::vector<T> out_alone = out;
  level.lowrank->forward(f);
  f.out = out_alone.data();
  f.hidden = nullptr;  // no backward follows
  level.lowrank->forward(f);
  const bool same = out.empty() || std::memcmp(out_alone.data(), out.data(), out.size() * sizeof(T)) == 0;
  check(same, level.isa, "out without hidden", tokens, r);

  LowRankBackward p{};
  p.tokens = tokens;
  p.in_features = d_in;
  p.rank = r;
  p.out_features = d_out;
  p.adapters = adapters;
  p.x_dtype = p.out_dtype = p.bias_dtype = p.param_dtype = kType<T>;
  p.grad_out = g.data();
  p.grad_out_row_stride = d_out;
  p.x = x.data();
  p.x_row_stride = d_in;
  p.a = a.data();
  p.b = b.data();
  p.hidden = hidden.data();
  p.adapter_index = f.adapter_index;
  p.scale = scale;
  p.dropout = dropout;
  p.dx = dx.data();
  p.da = da.data();
  p.db = db.data();
  p.dbias = dbias.data();
  level.lowrank->backward(p);

  const double allowed = kAllowedError<T>;
  check(relative_error(out, e_out) < allowed, level.isa, "out", tokens, d_in, r);
  check(relative_error(hidden, e_hidden) < allowed, level.isa, "hidden", tokens, d_in, r);
  check(relative_error(dx, e_dx) < allowed, level.isa, "dx", tokens, d_in, r);
  check(relative_error(da, e_da) < allowed, level.isa, "da", tokens, d_in, r);
  check(relative_error(db, e_db) < allowed, level.isa, "db", tokens, d_in, r);
  check(relative_error(dbias, e_dbias) < allowed, level.isa, "dbias", tokens, d_in, r);
}

// Both products with a packed weight, their rows further apart than they are long; and the weight, unpacked.
template <class T>
void test_packed(const CpuKernels& level, int64_t rows, int64_t d_in, int64_t d_out) {
  const int64_t bytes = level.lowrank->packed_bytes(d_out, d_in, kType<T>);
  if (bytes == 0) {
    check(sizeof(T) == 2, level.isa, "only 16 bits may have no packed form", d_in, d_out);
    return;
  }
  const auto weight = random_values<T>(d_out * d_in, 1);
  std::vector<char> blocks(static_cast<size_t>(bytes));
  const PackedWeight packed{d_out, d_in, kType<T>, blocks.data()};
  level.lowrank->pack_weight(packed, weight.data());
  std::vector<T> unpacked(weight.size());
  level.lowrank->unpack_weight(packed, unpacked.data());
  check(std::memcmp(unpacked.data(), weight.data(), weight.size() * sizeof(T)) == 0, level.isa, "unpacked", d_in,
        d_out);
  for (const bool transpose : {true, false}) {
    const int64_t depth = transpose ? d_in : d_out, columns = transpose ? d_out : d_in;
    const int64_t a_stride = depth + 3, out_stride = columns + 2;
    const auto a = random_values<T>((rows - 1) * a_stride + depth, 2);
    std::vector<T> out = random_values<T>((rows - 1) * out_stride + columns, 3);
    std::vector<double> expected(out.begin(), out.end());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t l = 0; l < depth; ++l) {
          const T w = transpose ? weight[j * d_in + l] : weight[l * d_in + j];
          expected[i * out_stride + j] += static_cast<double>(a[i * a_stride + l]) * static_cast<double>(w);
        }
      }
    }
    level.lowrank->packed_product({packed, transpose, rows, a.data(), a_stride, out.data(), out_stride});
    check(relative_error(out, expected) < kAllowedError<T>, level.isa, "packed", transpose, rows, d_in);
  }
}

}  // namespace

int main() {
  return run_on_every_level([](const CpuKernels& level) {
    for (const Case& c : {
             Case{0, 5, 2, 7, 0, 0.0, false},
             Case{1, 33, 4, 130, 0, 0.3, false},
             Case{7, 64, 1, 64, 0, 0.0, true},
             Case{20, 1, 3, 1, 0, 0.0, false},
             Case{61, 70, 5, 33, 4, 0.3, false},
             Case{61, 70, 5, 33, 4, 0.0, true},
             Case{130, 100, 17, 200, 0, 0.3, false},  // enough work for two threads
             Case{2, 1100, 70, 1090, 0, 0.0, false},  // few tokens: the columns of out are shared out
             Case{64, 40, 70, 1100, 3, 0.3, false},
             Case{64, 1100, 48, 500, 0, 0.3, false},  // the most tokens that share out the factors
             Case{65, 500, 16, 300, 0, 0.0, true},
         }) {
      test_case<float>(level, c);
      test_case<double>(level, c);
      test_case<BFloat16>(level, c);
    }
    for (const auto& [rows, d_in, d_out] : {
             std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
             {1, 130, 300},
             {5, 33, 257},
             {9, 7, 5},
             {17, 513, 31},
             {64, 300, 290},  // more than one block each way
             {300, 70, 40},   // more than one task's rows
         }) {
      test_packed<float>(level, rows, d_in, d_out);
      test_packed<double>(level, rows, d_in, d_out);
      test_packed<BFloat16>(level, rows, d_in, d_out);
    }
  });
}
