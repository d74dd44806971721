// add_layer_norm on the CPU: a row is read once, summed and normalised in the cache, and written once.
#include "common/cpu/convert.h"
#include "common/cpu/dropout_vec.h"
#include "common/cpu/threads.h"
#include "norm/norm.h"

namespace lwft::LWFT_ISA {
namespace {

// Rows of one forward task: enough to outweigh handing it to a thread, few enough to balance short batches.
constexpr int64_t kForwardRows = 16;
// Backward tasks keep a partial sum of dweight and dbias each; so many at most, whatever the number of tokens.
constexpr int64_t kBackwardTasks = 64;

// s = x + dropout(u)
template <class T, class Params>
void residual_sum(const Params& p, int64_t token, T* scratch, T* s) {
  const int64_t d = p.model_dim;
  const T* u = scratch;
  if (p.dropout.active()) {
    load_row(p.sublayer_dtype, p.sublayer_out, token * p.sublayer_row_stride, d, scratch);
    dropout_row(p.dropout, token, 0, d, scratch);
  } else {
    u = view_row(p.sublayer_dtype, p.sublayer_out, token * p.sublayer_row_stride, d, scratch);
  }
  const T* x = view_row(p.x_dtype, p.x, token * p.x_row_stride, d, s);
  for (int64_t j = 0; j < d; j += kLanes<T>) {
    store_columns(s, j, d, load_columns(x, j, d) + load_columns(u, j, d));
  }
}

// A parameter of model_dim elements as T: where it lies, converted into scratch, or `absent` where there is none.
template <class T>
const T* parameter(DType dtype, const void* data, int64_t d, T absent, Scratch& scratch) {
  T* converted = scratch.take<T>(d);
  if (data != nullptr) return view_row(dtype, data, 0, d, converted);
  for (int64_t j = 0; j < d; ++j) converted[j] = absent;
  return converted;
}

template <class T>
void forward_rows(const AddLayerNormForward& p, const T* weight, const T* bias, int64_t begin, int64_t end) {
  const int64_t d = p.model_dim;
  Scratch scratch;
  T* s = scratch.take<T>(d);
  T* row = scratch.take<T>(d);
  for (int64_t token = begin; token < end; ++token) {
    residual_sum(p, token, row, s);
    Vec<T> total{};
    for (int64_t j = 0; j < d; j += kLanes<T>) total += load_columns(s, j, d);
    const T mean = sum(total) / static_cast<T>(d);
    // From the deviations, in a second pass over the cached row: E[s^2] - mean^2 cancels for a large mean.
    Vec<T> squares{};
    for (int64_t j = 0; j < d; j += kLanes<T>) {
      const Vec<T> deviation = select(first_lanes<T>(d - j), load_columns(s, j, d) - mean, Vec<T>{});
      squares += deviation * deviation;
    }
    const T variance = sum(squares) / static_cast<T>(d);
    const T rstd = T{1} / static_cast<T>(__builtin_sqrt(static_cast<double>(variance) + p.eps));
    T* out = p.out_dtype == dtype_of<T>() ? static_cast<T*>(p.out) + token * d : row;
    for (int64_t j = 0; j < d; j += kLanes<T>) {
      const Vec<T> normalised = (load_columns(s, j, d) - mean) * rstd;
      store_columns(out, j, d, fma(normalised, load_columns(weight, j, d), load_columns(bias, j, d)));
    }
    if (out == row) store_row(p.out_dtype, row, d, p.out, token * d);
    static_cast<T*>(p.mean)[token] = mean;
    static_cast<T*>(p.rstd)[token] = rstd;
  }
}

template <class T>
void forward_as(const AddLayerNormForward& p) {
  Scratch scratch;
  const T* weight = parameter(p.param_dtype, p.weight, p.model_dim, T{1}, scratch);
  const T* bias = parameter(p.param_dtype, p.bias, p.model_dim, T{0}, scratch);
  parallel_for(ceil_div(p.tokens, kForwardRows), [&](int64_t task) {
    const int64_t begin = task * kForwardRows;
    forward_rows(p, weight, bias, begin, minimum(begin + kForwardRows, p.tokens));
  });
}

// n = (s - mean) rstd and g = grad_out * weight; ds = rstd (g - mean(g) - n mean(g n)). The token's share of dweight
// (grad_out * n) and dbias (grad_out) is added to the task's partial sums.
template <class T>
void backward_rows(const AddLayerNormBackward& p, const T* weight, T* dweight, T* dbias, int64_t begin, int64_t end) {
  const int64_t d = p.model_dim;
  Scratch scratch;
  T* s = scratch.take<T>(d);
  T* row = scratch.take<T>(d);
  T* grad_row = scratch.take<T>(d);
  for (int64_t token = begin; token < end; ++token) {
    residual_sum(p, token, row, s);
    const T* grad_out = view_row(p.out_dtype, p.grad_out, token * p.grad_out_row_stride, d, grad_row);
    const T mean = static_cast<const T*>(p.mean)[token], rstd = static_cast<const T*>(p.rstd)[token];
    Vec<T> sum_g{}, sum_gn{};
    for (int64_t j = 0; j < d; j += kLanes<T>) {
      // lanes past the end have grad_out = 0, so what n is there does not matter
      const Vec<T> dy = load_columns(grad_out, j, d), n = (load_columns(s, j, d) - mean) * rstd;
      const Vec<T> g = dy * load_columns(weight, j, d);
      sum_g += g;
      sum_gn = fma(g, n, sum_gn);
      store_columns(dweight, j, d, fma(dy, n, load_columns(dweight, j, d)));
      store_columns(dbias, j, d, load_columns(dbias, j, d) + dy);
    }
    if (p.dx == nullptr && p.dsublayer_out == nullptr) continue;
    const T mean_g = sum(sum_g) / static_cast<T>(d), mean_gn = sum(sum_gn) / static_cast<T>(d);
    T* ds = p.dx != nullptr && p.x_dtype == dtype_of<T>() ? static_cast<T*>(p.dx) + token * d : row;
    for (int64_t j = 0; j < d; j += kLanes<T>) {
      const Vec<T> n = (load_columns(s, j, d) - mean) * rstd;
      const Vec<T> g = load_columns(grad_out, j, d) * load_columns(weight, j, d);
      store_columns(ds, j, d, (g - mean_g - n * mean_gn) * rstd);
    }
    if (p.dx != nullptr && ds == row) store_row(p.x_dtype, row, d, p.dx, token * d);
    if (p.dsublayer_out != nullptr) {
      if (p.dropout.active()) {
        if (ds != row) {
          for (int64_t j = 0; j < d; j += kLanes<T>) store_columns(row, j, d, load_columns(ds, j, d));
        }
        dropout_row(p.dropout, token, 0, d, row);
        ds = row;
      }
      store_row(p.sublayer_dtype, ds, d, p.dsublayer_out, token * d);
    }
  }
}

template <class T>
void backward_as(const AddLayerNormBackward& p) {
  const int64_t d = p.model_dim;
  const int64_t rows = maximum(kForwardRows, ceil_div(p.tokens, kBackwardTasks));
  const int64_t tasks = ceil_div(p.tokens, rows);
  Scratch scratch;
  const T* weight = parameter(p.param_dtype, p.weight, d, T{1}, scratch);
  T* dweight = scratch.take<T>((tasks + 1) * d);  // the last row of each is for the sum of the others
  T* dbias = scratch.take<T>((tasks + 1) * d);
  for (int64_t i = 0; i < (tasks + 1) * d; ++i) dweight[i] = dbias[i] = T{0};
  parallel_for(tasks, [&](int64_t task) {
    const int64_t begin = task * rows;
    backward_rows(p, weight, dweight + task * d, dbias + task * d, begin, minimum(begin + rows, p.tokens));
  });
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t j = 0; j < d; ++j) {
      dweight[tasks * d + j] += dweight[task * d + j];
      dbias[tasks * d + j] += dbias[task * d + j];
    }
  }
  if (p.dweight != nullptr) store_row(p.param_dtype, dweight + tasks * d, d, p.dweight, 0);
  if (p.dbias != nullptr) store_row(p.param_dtype, dbias + tasks * d, d, p.dbias, 0);
}

void forward(const AddLayerNormForward& p) {
  if (p.out_dtype == DType::f64) {
    forward_as<double>(p);
  } else {
    forward_as<float>(p);
  }
}

void backward(const AddLayerNormBackward& p) {
  if (p.out_dtype == DType::f64) {
    backward_as<double>(p);
  } else {
    backward_as<float>(p);
  }
}

}  // namespace

extern const NormKernels norm_kernels;
constexpr NormKernels norm_kernels = {forward, backward};

}  // namespace lwft::LWFT_ISA
