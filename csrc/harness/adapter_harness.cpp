// The adapter by level, for python_tests/adapter/test_levels.py and python_tests/cuda.
#include "adapter/adapter.h"

#include "harness/harness.h"

namespace lwft::harness {

namespace {

const void* data_or_null(const py::object& array) {
  return array.is_none() ? nullptr : py::cast<py::array>(array).data();
}

// Contiguous arrays of one dtype, parameters of one dtype; norm_weight and norm_bias may be None, the residual is x.
// Level "cuda" is the CUDA kernel in its emulation; ValueError says why it declines.
py::tuple forward(const std::string& level, const py::array& x, const py::array& down_weight,
                  const py::array& down_bias, const py::array& up_weight, const py::array& up_bias,
                  const py::object& norm_weight, const py::object& norm_bias, int activation, double eps, double scale,
                  uint64_t seed, uint64_t offset, double dropout_p) {
  AdapterForward p{};
  p.tokens = x.shape(0);
  p.model_dim = x.shape(1);
  p.bottleneck = down_weight.shape(0);
  p.dtype = dtype_of(x);
  p.param_dtype = dtype_of(down_weight);
  p.x = p.residual = x.data();
  p.x_row_stride = p.residual_row_stride = stride(x, 0);
  p.norm_weight = data_or_null(norm_weight);
  p.norm_bias = data_or_null(norm_bias);
  p.eps = eps;
  p.down_weight = down_weight.data();
  p.down_bias = down_bias.data();
  p.activation = static_cast<Activation>(activation);
  p.up_weight = up_weight.data();
  p.up_bias = up_bias.data();
  p.scale = scale;
  p.dropout = make_dropout(seed, offset, dropout_p);
  py::array out = empty(p.dtype, {p.tokens, p.model_dim});
  py::array hidden = empty(p.param_dtype, {p.tokens, p.bottleneck});
  py::array mean = empty(accumulate_dtype(p.dtype), {p.tokens}), rstd = empty(accumulate_dtype(p.dtype), {p.tokens});
  p.out = out.mutable_data();
  p.hidden = hidden.mutable_data();
  p.mean = mean.mutable_data();
  p.rstd = rstd.mutable_data();
  if (level == "cuda") {
    if (const char* reason = adapter_cuda_declines(p)) throw py::value_error(reason);
    adapter_forward_cuda(p, nullptr);
  } else {
    kernels(level).adapter->forward(p);
  }
  return py::make_tuple(out, hidden, mean, rstd);
}

struct alignas(16) Aligned16 {
  float value[4];
};

py::tuple backward(const std::string& level, const py::array& grad_out, const py::array& x,
                   const py::array& down_weight, const py::array& up_weight, const py::object& norm_weight,
                   const py::object& norm_bias, const py::array& hidden, const py::array& mean, const py::array& rstd,
                   int activation, double scale, uint64_t seed, uint64_t offset, double dropout_p) {
  AdapterBackward p{};
  p.tokens = x.shape(0);
  p.model_dim = x.shape(1);
  p.bottleneck = down_weight.shape(0);
  p.dtype = dtype_of(x);
  p.param_dtype = dtype_of(down_weight);
  p.grad_out = grad_out.data();
  p.grad_out_row_stride = stride(grad_out, 0);
  p.x = x.data();
  p.x_row_stride = stride(x, 0);
  p.norm_weight = data_or_null(norm_weight);
  p.norm_bias = data_or_null(norm_bias);
  p.mean = mean.data();
  p.rstd = rstd.data();
  p.down_weight = down_weight.data();
  p.hidden = hidden.data();
  p.activation = static_cast<Activation>(activation);
  p.up_weight = up_weight.data();
  p.scale = scale;
  p.dropout = make_dropout(seed, offset, dropout_p);
  p.residual_is_x = true;
  const py::ssize_t d = p.model_dim, m = p.bottleneck;
  py::array dx = empty(p.dtype, {p.tokens, d});
  py::array ddown_weight = empty(p.param_dtype, {m, d}), ddown_bias = empty(p.param_dtype, {m});
  py::array dup_weight = empty(p.param_dtype, {d, m}), dup_bias = empty(p.param_dtype, {d});
  py::array dnorm_weight = empty(p.param_dtype, {d}), dnorm_bias = empty(p.param_dtype, {d});
  p.dx = dx.mutable_data();
  p.ddown_weight = ddown_weight.mutable_data();
  p.ddown_bias = ddown_bias.mutable_data();
  p.dup_weight = dup_weight.mutable_data();
  p.dup_bias = dup_bias.mutable_data();
  if (p.norm_weight != nullptr) {
    p.dnorm_weight = dnorm_weight.mutable_data();
    p.dnorm_bias = dnorm_bias.mutable_data();
  }
  if (level == "cuda") {
    if (const char* reason = adapter_cuda_declines(p)) throw py::value_error(reason);
    const auto floats = static_cast<size_t>(adapter_backward_workspace(p));
    std::vector<Aligned16> workspace(floats / 4 + 1);
    p.workspace = workspace.data();
    adapter_backward_cuda(p, nullptr);
  } else {
    kernels(level).adapter->backward(p);
  }
  return py::make_tuple(dx, ddown_weight, ddown_bias, dup_weight, dup_bias, dnorm_weight, dnorm_bias);
}

void bind(py::module_& m) {
  m.def("adapter_forward", &forward);
  m.def("adapter_backward", &backward);
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
