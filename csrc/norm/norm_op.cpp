// lwft::add_layer_norm_forward / _backward: tensors to AddLayerNormForward / AddLayerNormBackward.
#include "common/cpu/dispatch.h"
#include "common/op.h"
#include "norm/norm.h"
#ifdef LWFT_WITH_CUDA
#include "common/cuda_stream.h"
#endif

namespace lwft {
namespace {

void check(const Tensor& x, const Tensor& sublayer_out, const MaybeTensor& weight, const MaybeTensor& bias,
           double eps) {
  require_one_device(x, sublayer_out, weight, bias);
  require(x.dim() >= 1 && last_size(x) > 0 && same_shape(x, sublayer_out) && eps > 0 && std::isfinite(eps));
  const DType sum = promote(dtype_of(x), dtype_of(sublayer_out));
  for (const MaybeTensor* parameter : {&weight, &bias}) {
    if (!*parameter) continue;
    const DType dtype = dtype_of(**parameter);
    require(is_vector(**parameter, last_size(x)) && (dtype == sum || dtype == DType::f32));
  }
  require(!weight || !bias || dtype_of(*weight) == dtype_of(*bias));
}

// Set the dropout from `seed`, which lies on the device of x, and run the kernel.
struct OnCpu {
  static void run(AddLayerNormForward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().norm->forward(p);
  }
  static void run(AddLayerNormBackward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().norm->backward(p);
  }
};

#ifdef LWFT_WITH_CUDA
struct OnCuda {
  static void run(AddLayerNormForward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    enqueue(p, x, seed, dropout_p, add_layer_norm_forward_cuda);
  }
  static void run(AddLayerNormBackward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    const Tensor workspace = empty(x, {add_layer_norm_backward_workspace(p)}, DType::f32);
    p.workspace = workspace.mutable_data_ptr();
    enqueue(p, x, seed, dropout_p, add_layer_norm_backward_cuda);
  }

 private:
  template <class P>
  static void enqueue(P& p, const Tensor& x, const MaybeTensor& seed, double dropout_p,
                      int (*kernel)(const P&, void*)) {
    set_device_dropout(p, seed, dropout_p);
    require_cuda(add_layer_norm_cuda_declines(p));
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    require_no_error(kernel(p, current_cuda_stream(x)));
  }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x_in, const Tensor& sublayer_in,
                                                          const MaybeTensor& weight_in, const MaybeTensor& bias_in,
                                                          const MaybeTensor& seed, double eps, double dropout_p) {
  check(x_in, sublayer_in, weight_in, bias_in, eps);
  const Rows x(x_in), sublayer_out(sublayer_in);
  const MaybeTensor weight = as_contiguous(weight_in), bias = as_contiguous(bias_in);
  AddLayerNormForward p{};
  p.tokens = x.count();
  p.model_dim = x.width();
  p.x_dtype = x.dtype();
  p.sublayer_dtype = sublayer_out.dtype();
  p.out_dtype = promote(p.x_dtype, p.sublayer_dtype);
  p.param_dtype = weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : p.out_dtype;
  p.x = x.data();
  p.x_row_stride = x.stride();
  p.sublayer_out = sublayer_out.data();
  p.sublayer_row_stride = sublayer_out.stride();
  p.weight = data(weight);
  p.bias = data(bias);
  p.eps = eps;
  Tensor out = empty(x_in, shape_of(x_in), p.out_dtype);
  Tensor mean = empty(x_in, leading_shape(x_in), accumulate_dtype(p.out_dtype));
  Tensor rstd = empty(x_in, leading_shape(x_in), accumulate_dtype(p.out_dtype));
  p.out = out.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  Device::run(p, x_in, seed, dropout_p);
  return {out, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                   const Tensor& sublayer_in,
                                                                   const MaybeTensor& weight_in, const Tensor& mean,
                                                                   const Tensor& rstd, const MaybeTensor& seed,
                                                                   double dropout_p, int64_t needs) {
  const Rows grad_out(grad_in), x(x_in), sublayer_out(sublayer_in);
  const MaybeTensor weight = as_contiguous(weight_in);
  const Wanted wanted(needs);
  AddLayerNormBackward p{};
  p.tokens = x.count();
  p.model_dim = x.width();
  p.x_dtype = x.dtype();
  p.sublayer_dtype = sublayer_out.dtype();
  p.out_dtype = grad_out.dtype();
  p.param_dtype = weight ? dtype_of(*weight) : p.x_dtype;
  p.grad_out = grad_out.data();
  p.grad_out_row_stride = grad_out.stride();
  p.x = x.data();
  p.x_row_stride = x.stride();
  p.sublayer_out = sublayer_out.data();
  p.sublayer_row_stride = sublayer_out.stride();
  p.weight = data(weight);
  p.mean = data(mean);
  p.rstd = data(rstd);
  Tensor dx = wanted.empty(0, x_in, shape_of(x_in), p.x_dtype);
  Tensor dsublayer_out = wanted.empty(1, x_in, shape_of(x_in), p.sublayer_dtype);
  Tensor dweight = wanted.empty(2, x_in, {p.model_dim}, p.param_dtype);
  Tensor dbias = wanted.empty(3, x_in, {p.model_dim}, p.param_dtype);
  p.dx = wanted.data(0, dx);
  p.dsublayer_out = wanted.data(1, dsublayer_out);
  p.dweight = wanted.data(2, dweight);
  p.dbias = wanted.data(3, dbias);
  Device::run(p, x_in, seed, dropout_p);
  return {dx, dsublayer_out, dweight, dbias};
}

}  // namespace
}  // namespace lwft

constexpr char kForwardSchema[] =
    "add_layer_norm_forward(Tensor x, Tensor sublayer_out, Tensor? weight, Tensor? bias, Tensor? seed, float eps, "
    "float dropout_p) -> (Tensor out, Tensor mean, Tensor rstd)";
constexpr char kBackwardSchema[] =
    "add_layer_norm_backward(Tensor grad_out, Tensor x, Tensor sublayer_out, Tensor? weight, Tensor mean, "
    "Tensor rstd, Tensor? seed, float dropout_p, int needs) "
    "-> (Tensor dx, Tensor dsublayer_out, Tensor dweight, Tensor dbias)";

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CPU, m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&lwft::add_layer_norm_forward<lwft::OnCpu>));
  m.impl("add_layer_norm_backward", TORCH_BOX(&lwft::add_layer_norm_backward<lwft::OnCpu>));
}

#ifdef LWFT_WITH_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(lwft_cuda, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft_cuda, CUDA, m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&lwft::add_layer_norm_forward<lwft::OnCuda>));
  m.impl("add_layer_norm_backward", TORCH_BOX(&lwft::add_layer_norm_backward<lwft::OnCuda>));
}
#endif
