// add_layer_norm by level, for python_tests/norm/test_levels.py and python_tests/cuda.
#include "harness/harness.h"

namespace lwft::harness {

namespace {

// Contiguous (tokens, model_dim) arrays of one dtype; parameters of one dtype. Level "cuda" is the CUDA kernel in its
// emulation; ValueError says why it declines.
py::tuple forward(const std::string& level, const py::array& x, const py::array& sublayer_out, const py::array& weight,
                  const py::array& bias, double eps, uint64_t seed, uint64_t offset, double dropout_p) {
  AddLayerNormForward p{};
  p.tokens = x.shape(0);
  p.model_dim = x.shape(1);
  p.x_dtype = p.sublayer_dtype = p.out_dtype = dtype_of(x);
  p.param_dtype = dtype_of(weight);
  p.x = x.data();
  p.x_row_stride = stride(x, 0);
  p.sublayer_out = sublayer_out.data();
  p.sublayer_row_stride = stride(sublayer_out, 0);
  p.weight = weight.data();
  p.bias = bias.data();
  p.eps = eps;
  p.dropout = make_dropout(seed, offset, dropout_p);
  py::array out = empty(p.out_dtype, {p.tokens, p.model_dim});
  py::array mean = empty(accumulate_dtype(p.out_dtype), {p.tokens}),
            rstd = empty(accumulate_dtype(p.out_dtype), {p.tokens});
  p.out = out.mutable_data();
  p.mean = mean.mutable_data();
  p.rstd = rstd.mutable_data();
  if (level == "cuda") {
    if (const char* reason = add_layer_norm_cuda_declines(p)) throw py::value_error(reason);
    add_layer_norm_forward_cuda(p, nullptr);
  } else {
    kernels(level).norm->forward(p);
  }
  return py::make_tuple(out, mean, rstd);
}

py::tuple backward(const std::string& level, const py::array& grad_out, const py::array& x,
                   const py::array& sublayer_out, const py::array& weight, const py::array& mean, const py::array& rstd,
                   uint64_t seed, uint64_t offset, double dropout_p) {
  AddLayerNormBackward p{};
  p.tokens = x.shape(0);
  p.model_dim = x.shape(1);
  p.x_dtype = p.sublayer_dtype = p.out_dtype = dtype_of(x);
  p.param_dtype = dtype_of(weight);
  p.grad_out = grad_out.data();
  p.grad_out_row_stride = stride(grad_out, 0);
  p.x = x.data();
  p.x_row_stride = stride(x, 0);
  p.sublayer_out = sublayer_out.data();
  p.sublayer_row_stride = stride(sublayer_out, 0);
  p.weight = weight.data();
  p.mean = mean.data();
  p.rstd = rstd.data();
  p.dropout = make_dropout(seed, offset, dropout_p);
  py::array dx = empty(p.x_dtype, {p.tokens, p.model_dim}), du = empty(p.x_dtype, {p.tokens, p.model_dim});
  py::array dweight = empty(p.param_dtype, {p.model_dim}), dbias = empty(p.param_dtype, {p.model_dim});
  p.dx = dx.mutable_data();
  p.dsublayer_out = du.mutable_data();
  p.dweight = dweight.mutable_data();
  p.dbias = dbias.mutable_data();
  if (level == "cuda") {
    if (const char* reason = add_layer_norm_cuda_declines(p)) throw py::value_error(reason);
    std::vector<float> workspace(static_cast<size_t>(add_layer_norm_backward_workspace(p)));
    p.workspace = workspace.data();
    add_layer_norm_backward_cuda(p, nullptr);
  } else {
    kernels(level).norm->backward(p);
  }
  return py::make_tuple(dx, du, dweight, dbias);
}

void bind(py::module_& m) {
  m.def("add_layer_norm_forward", &forward);
  m.def("add_layer_norm_backward", &backward);
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
