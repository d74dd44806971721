// lwft::adapter_forward / _backward: tensors to AdapterForward / AdapterBackward.
#include "adapter/adapter.h"
#include "common/cpu/dispatch.h"
#include "common/op.h"
#ifdef LWFT_WITH_CUDA
#include "common/cuda_stream.h"
#endif

namespace lwft {
namespace {

void check(const Tensor& x, const Tensor& down_weight, const MaybeTensor& down_bias, const Tensor& up_weight,
           const MaybeTensor& up_bias, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
           const MaybeTensor& residual, int64_t activation, double eps, double scale) {
  require_one_device(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, residual);
  require(x.dim() >= 1 && last_size(x) > 0 && down_weight.dim() == 2 && down_weight.size(0) > 0);
  const int64_t d = last_size(x), m = down_weight.size(0);
  const DType dtype = dtype_of(x), param_dtype = dtype_of(down_weight);
  require(is_matrix(down_weight, m, d) && is_matrix(up_weight, d, m) && dtype_of(up_weight) == param_dtype &&
          parameter_fits(param_dtype, dtype));
  const auto fits = [&](const MaybeTensor& row, int64_t n) {
    return !row || (is_vector(*row, n) && dtype_of(*row) == param_dtype);
  };
  require(fits(down_bias, m) && fits(up_bias, d) && fits(norm_weight, d) && fits(norm_bias, d));
  require(norm_weight || !norm_bias);
  require(!residual || (same_shape(*residual, x) && dtype_of(*residual) == dtype));
  require(activation >= 0 && activation < kActivations && eps > 0 && std::isfinite(eps) && std::isfinite(scale));
}

struct ForwardResult {
  Tensor out;
  MaybeTensor hidden, mean, rstd;
};

// Everything of AdapterForward but the dropout, whose seed may lie on the device, and the results it points to: beside out
// those that backward needs, where it `keeps` them.
ForwardResult fill_forward(AdapterForward& p, const Rows& x, const Tensor& down_weight, const MaybeTensor& down_bias,
                           const Tensor& up_weight, const MaybeTensor& up_bias, const MaybeTensor& norm_weight,
                           const MaybeTensor& norm_bias, const std::optional<Rows>& residual, int64_t activation,
                           double eps, double scale, bool residual_is_x, bool keeps) {
  p.tokens = x.count();
  p.model_dim = x.width();
  p.bottleneck = down_weight.size(0);
  p.dtype = x.dtype();
  p.param_dtype = dtype_of(down_weight);
  p.x = x.data();
  p.x_row_stride = x.stride();
  p.norm_weight = data(norm_weight);
  p.norm_bias = data(norm_bias);
  p.eps = eps;
  p.down_weight = data(down_weight);
  p.down_bias = data(down_bias);
  p.activation = static_cast<Activation>(activation);
  p.up_weight = data(up_weight);
  p.up_bias = data(up_bias);
  p.scale = scale;
  p.residual = residual_is_x ? p.x : residual ? residual->data() : nullptr;
  p.residual_row_stride = residual_is_x ? p.x_row_stride : residual ? residual->stride() : 0;

  const DType statistics = accumulate_dtype(p.dtype);
  const Tensor& like = x.tensor();
  ForwardResult result{empty(like, shape_of(like), p.dtype), {}, {}, {}};
  p.out = result.out.mutable_data_ptr();
  if (!keeps) return result;
  const std::vector<int64_t> normed = norm_weight ? leading_shape(like) : std::vector<int64_t>{0};
  result.hidden = empty(like, shape_of(like, p.bottleneck), p.param_dtype);
  result.mean = empty(like, normed, statistics);
  result.rstd = empty(like, normed, statistics);
  p.hidden = result.hidden->mutable_data_ptr();
  p.mean = norm_weight ? result.mean->mutable_data_ptr() : nullptr;
  p.rstd = norm_weight ? result.rstd->mutable_data_ptr() : nullptr;
  return result;
}

// Set the dropout from `seed`, which lies on the device of x, and run the kernel.
struct OnCpu {
  static void run(AdapterForward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().adapter->forward(p);
  }
  static void run(AdapterBackward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().adapter->backward(p);
  }
};

#ifdef LWFT_WITH_CUDA
struct OnCuda {
  static void run(AdapterForward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    enqueue(p, x, seed, dropout_p, adapter_forward_cuda);
  }
  static void run(AdapterBackward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    const Tensor workspace = empty(x, {adapter_backward_workspace(p)}, DType::f32);
    p.workspace = workspace.mutable_data_ptr();
    enqueue(p, x, seed, dropout_p, adapter_backward_cuda);
  }

 private:
  template <class P>
  static void enqueue(P& p, const Tensor& x, const MaybeTensor& seed, double dropout_p,
                      int (*kernel)(const P&, void*)) {
    set_device_dropout(p, seed, dropout_p);
    require_cuda(adapter_cuda_declines(p));
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    require_no_error(kernel(p, current_cuda_stream(x)));
  }
};
#endif

template <class Device>
ForwardResult run_forward(const Tensor& x_in, const Tensor& down_weight_in, const MaybeTensor& down_bias_in,
                          const Tensor& up_weight_in, const MaybeTensor& up_bias_in, const MaybeTensor& norm_weight_in,
                          const MaybeTensor& norm_bias_in, const MaybeTensor& residual_in, const MaybeTensor& seed,
                          int64_t activation, double eps, double scale, double dropout_p, bool residual_is_x,
                          bool keeps) {
  check(x_in, down_weight_in, down_bias_in, up_weight_in, up_bias_in, norm_weight_in, norm_bias_in, residual_in,
        activation, eps, scale);
  const Rows x(x_in);
  const Tensor down_weight = as_contiguous(down_weight_in), up_weight = as_contiguous(up_weight_in);
  const MaybeTensor down_bias = as_contiguous(down_bias_in), up_bias = as_contiguous(up_bias_in);
  const MaybeTensor norm_weight = as_contiguous(norm_weight_in), norm_bias = as_contiguous(norm_bias_in);
  const std::optional<Rows> residual = residual_in ? std::optional<Rows>(*residual_in) : std::nullopt;
  AdapterForward p{};
  ForwardResult result = fill_forward(p, x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                                      residual, activation, eps, scale, residual_is_x, keeps);
  Device::run(p, x_in, seed, dropout_p);
  return result;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> adapter_forward(const Tensor& x, const Tensor& down_weight,
                                                           const MaybeTensor& down_bias, const Tensor& up_weight,
                                                           const MaybeTensor& up_bias, const MaybeTensor& norm_weight,
                                                           const MaybeTensor& norm_bias, const MaybeTensor& residual,
                                                           const MaybeTensor& seed, int64_t activation, double eps,
                                                           double scale, double dropout_p, bool residual_is_x) {
  const ForwardResult result =
      run_forward<Device>(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, residual, seed,
                          activation, eps, scale, dropout_p, residual_is_x, true);
  return {result.out, *result.hidden, *result.mean, *result.rstd};
}

Tensor adapter_inference(const Tensor& x, const Tensor& down_weight, const MaybeTensor& down_bias,
                         const Tensor& up_weight, const MaybeTensor& up_bias, const MaybeTensor& norm_weight,
                         const MaybeTensor& norm_bias, const MaybeTensor& residual, const MaybeTensor& seed,
                         int64_t activation, double eps, double scale, double dropout_p, bool residual_is_x) {
  return run_forward<OnCpu>(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, residual, seed,
                            activation, eps, scale, dropout_p, residual_is_x, false)
      .out;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& down_weight_in, const MaybeTensor& /*down_bias*/,
    const Tensor& up_weight_in, const MaybeTensor& norm_weight_in, const MaybeTensor& norm_bias_in,
    const Tensor& hidden_in, const Tensor& mean, const Tensor& rstd, const MaybeTensor& seed, int64_t activation,
    double scale, double dropout_p, bool residual_is_x, int64_t needs) {
  const Rows grad_out(grad_in), x(x_in);
  const Tensor down_weight = as_contiguous(down_weight_in), up_weight = as_contiguous(up_weight_in);
  const MaybeTensor norm_weight = as_contiguous(norm_weight_in), norm_bias = as_contiguous(norm_bias_in);
  const Tensor hidden = as_contiguous(hidden_in);
  const Wanted wanted(needs);
  AdapterBackward p{};
  p.tokens = x.count();
  p.model_dim = x.width();
  p.bottleneck = down_weight.size(0);
  p.dtype = x.dtype();
  p.param_dtype = dtype_of(down_weight);
  p.grad_out = grad_out.data();
  p.grad_out_row_stride = grad_out.stride();
  p.x = x.data();
  p.x_row_stride = x.stride();
  p.norm_weight = data(norm_weight);
  p.norm_bias = data(norm_bias);
  p.mean = data(mean);
  p.rstd = data(rstd);
  p.down_weight = data(down_weight);
  p.hidden = data(hidden);
  p.activation = static_cast<Activation>(activation);
  p.up_weight = data(up_weight);
  p.scale = scale;
  p.residual_is_x = residual_is_x;
  const int64_t d = p.model_dim, m = p.bottleneck;
  Tensor dx = wanted.empty(0, x_in, shape_of(x_in), p.dtype);
  Tensor ddown_weight = wanted.empty(1, x_in, {m, d}, p.param_dtype);
  Tensor ddown_bias = wanted.empty(2, x_in, {m}, p.param_dtype);
  Tensor dup_weight = wanted.empty(3, x_in, {d, m}, p.param_dtype);
  Tensor dup_bias = wanted.empty(4, x_in, {d}, p.param_dtype);
  Tensor dnorm_weight = wanted.empty(5, x_in, {d}, p.param_dtype);
  Tensor dnorm_bias = wanted.empty(6, x_in, {d}, p.param_dtype);
  p.dx = wanted.data(0, dx);
  p.ddown_weight = wanted.data(1, ddown_weight);
  p.ddown_bias = wanted.data(2, ddown_bias);
  p.dup_weight = wanted.data(3, dup_weight);
  p.dup_bias = wanted.data(4, dup_bias);
  p.dnorm_weight = wanted.data(5, dnorm_weight);
  p.dnorm_bias = wanted.data(6, dnorm_bias);
  Device::run(p, x_in, seed, dropout_p);
  return {dx, ddown_weight, ddown_bias, dup_weight, dup_bias, dnorm_weight, dnorm_bias};
}

}  // namespace
}  // namespace lwft

#define LWFT_FORWARD_ARGUMENTS                                                                          \
  "(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "               \
  "Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, Tensor? seed, int activation, float eps, " \
  "float scale, float dropout_p, bool residual_is_x) "
constexpr char kForwardSchema[] =
    "adapter_forward" LWFT_FORWARD_ARGUMENTS "-> (Tensor out, Tensor hidden, Tensor mean, Tensor rstd)";
// forward where no backward follows
constexpr char kInferenceSchema[] = "adapter_inference" LWFT_FORWARD_ARGUMENTS "-> Tensor";

constexpr char kBackwardSchema[] =
    "adapter_backward(Tensor grad_out, Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor hidden, Tensor mean, Tensor rstd, Tensor? seed, int activation, "
    "float scale, float dropout_p, bool residual_is_x, int needs) "
    "-> (Tensor dx, Tensor ddown_weight, Tensor ddown_bias, Tensor dup_weight, Tensor dup_bias, "
    "Tensor dnorm_weight, Tensor dnorm_bias)";

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  m.def(kForwardSchema);
  m.def(kInferenceSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CPU, m) {
  m.impl("adapter_forward", TORCH_BOX(&lwft::adapter_forward<lwft::OnCpu>));
  m.impl("adapter_inference", TORCH_BOX(&lwft::adapter_inference));
  m.impl("adapter_backward", TORCH_BOX(&lwft::adapter_backward<lwft::OnCpu>));
}

#ifdef LWFT_WITH_CUDA
// In a namespace of their own: on a GPU, Python chooses between these and Triton's kernels (lwft_kernels/registration.py).
STABLE_TORCH_LIBRARY_FRAGMENT(lwft_cuda, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft_cuda, CUDA, m) {
  m.impl("adapter_forward", TORCH_BOX(&lwft::adapter_forward<lwft::OnCuda>));
  m.impl("adapter_backward", TORCH_BOX(&lwft::adapter_backward<lwft::OnCuda>));
}
#endif
