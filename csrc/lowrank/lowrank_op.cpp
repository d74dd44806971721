// lwft::low_rank_linear_*, lora_linear_* and lora_delta_*: tensors to LowRankForward / LowRankBackward, and
// the product with the frozen weight, which is the vendor's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/cpu/dispatch.h"
#include "common/op.h"
#include "lowrank/lowrank.h"

namespace lwft {
namespace {

// The two factors, contiguous, alone (r, d_in), (d_out, r) or stacked (n, r, d_in), (n, d_out, r).
struct Factors {
  Tensor a, b;

  Factors(const Tensor& a_in, const Tensor& b_in) : a(as_contiguous(a_in)), b(as_contiguous(b_in)) {}

  template <class Parameters>
  void fill(Parameters& p) const {
    const int64_t last = a.dim() - 1;
    p.adapters = a.dim() == 3 ? a.size(0) : 1;
    p.rank = a.size(last - 1);
    p.in_features = a.size(last);
    p.out_features = b.size(last - 1);
    p.param_dtype = dtype_of(a);
    p.a = data(a);
    p.b = data(b);
  }
};

// A wrong index would read past the stacked adapters. The kernel walks the indices anyway, so this costs
// nothing.
template <class Parameters>
void set_adapter_index(Parameters& p, const MaybeTensor& adapter_index) {
  p.adapter_index = adapter_index ? static_cast<const int64_t*>(data(*adapter_index)) : nullptr;
  for (int64_t token = 0; p.adapter_index != nullptr && token < p.tokens; ++token) {
    const int64_t adapter = p.adapter_index[token];
    STD_TORCH_CHECK(adapter >= -1 && adapter < p.adapters, "lwft: adapter_index must lie between -1 and ",
                    p.adapters - 1, ", got ", adapter);
  }
}

template <class Parameters>
void set_input(Parameters& p, const Tensor& x, double scale, const MaybeTensor& seed, double dropout_p) {
  p.tokens = x.size(0);
  p.x_dtype = dtype_of(x);
  p.x = data(x);
  p.x_row_stride = x.stride(0);
  p.scale = scale;
  p.dropout = dropout_of(seed, dropout_p);
}

// out = bias + the product, or out += the product; returns the hidden middle.
Tensor forward_into(const Tensor& out, bool accumulate, const Tensor& x, const MaybeTensor& bias_in,
                    const Factors& factors, const MaybeTensor& index_in, const MaybeTensor& seed, double scale,
                    double dropout_p) {
  const MaybeTensor bias = as_contiguous(bias_in), index = as_contiguous(index_in);
  LowRankForward p{};
  factors.fill(p);
  set_input(p, x, scale, seed, dropout_p);
  set_adapter_index(p, index);
  p.bias = data(bias);
  p.bias_dtype = bias ? dtype_of(*bias) : p.x_dtype;
  p.accumulate = accumulate;
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(out);
  p.out_row_stride = out.stride(0);
  Tensor hidden = empty(x, {p.tokens, p.rank}, accumulate_dtype(p.param_dtype));
  p.hidden = hidden.mutable_data_ptr();
  cpu_kernels().lowrank->forward(p);
  return hidden;
}

// Where the gradients go; null for those that are not wanted.
struct Gradients {
  void *dx, *da, *db, *dbias;
  DType bias_dtype;
};

void backward_into(const Gradients& gradients, const Tensor& grad_out, const Tensor& x, const Factors& factors,
                   const Tensor& hidden_in, const MaybeTensor& index_in, const MaybeTensor& seed, double scale,
                   double dropout_p) {
  const Tensor hidden = as_contiguous(hidden_in);
  const MaybeTensor index = as_contiguous(index_in);
  LowRankBackward p{};
  factors.fill(p);
  set_input(p, x, scale, seed, dropout_p);
  set_adapter_index(p, index);
  p.grad_out = data(grad_out);
  p.out_dtype = dtype_of(grad_out);
  p.grad_out_row_stride = grad_out.stride(0);
  p.hidden = data(hidden);
  p.dx = gradients.dx;
  p.da = gradients.da;
  p.db = gradients.db;
  p.dbias = gradients.dbias;
  p.bias_dtype = gradients.bias_dtype;
  cpu_kernels().lowrank->backward(p);
}

// An uninitialised gradient of a factor, like it; empty if it is not wanted.
Tensor empty_like(const Wanted& wanted, int bit, const Tensor& factor) {
  const DType dtype = dtype_of(factor);
  if (factor.dim() == 2) return wanted.empty(bit, factor, {factor.size(0), factor.size(1)}, dtype);
  return wanted.empty(bit, factor, {factor.size(0), factor.size(1), factor.size(2)}, dtype);
}

// ---- the vendor's matrix product; below autograd, by the C shim, which takes no torch::Scalar ----

Tensor transposed(const Tensor& matrix) {
  const int64_t sizes[] = {matrix.size(1), matrix.size(0)}, strides[] = {matrix.stride(1), matrix.stride(0)};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, matrix.storage_offset(), &handle));
  return Tensor(handle);
}

// result += a b
void add_product(const Tensor& result, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), a.get(), b.get(), 1.0, 1.0));
}

// result = a b
void product_into(const Tensor& result, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), a.get(), b.get()));
}

// ---- low_rank_linear ----

std::tuple<Tensor, Tensor> low_rank_linear_forward(const Tensor& x_in, const Tensor& down_weight,
                                                   const Tensor& up_weight, const MaybeTensor& bias) {
  const Tensor x = with_unit_rows(x_in);
  const Factors factors(down_weight, up_weight);
  Tensor out = empty(x, {x.size(0), up_weight.size(0)}, dtype_of(x));
  Tensor hidden = forward_into(out, false, x, bias, factors, {}, {}, 1.0, 0.0);
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                    const Tensor& down_weight, const Tensor& up_weight,
                                                                    const Tensor& hidden, int64_t needs) {
  const Tensor grad_out = with_unit_rows(grad_in), x = with_unit_rows(x_in);
  const Factors factors(down_weight, up_weight);
  const Wanted wanted(needs);
  const DType param_dtype = dtype_of(up_weight);
  Tensor dx = wanted.empty(0, x, {x.size(0), x.size(1)}, dtype_of(x));
  Tensor ddown = empty_like(wanted, 1, down_weight), dup = empty_like(wanted, 2, up_weight);
  Tensor dbias = wanted.empty(3, x, {up_weight.size(0)}, param_dtype);
  const Gradients gradients{wanted.data(0, dx), wanted.data(1, ddown), wanted.data(2, dup), wanted.data(3, dbias),
                            param_dtype};
  backward_into(gradients, grad_out, x, factors, hidden, {}, {}, 1.0, 0.0);
  return {dx, ddown, dup, dbias};
}

// ---- lora_linear: the low-rank part and the bias first, then the vendor adds x W^T in place ----

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                                               const Tensor& lora_a, const Tensor& lora_b,
                                               const MaybeTensor& adapter_index, const MaybeTensor& seed, double scale,
                                               double dropout_p) {
  const Tensor x = with_unit_rows(x_in);
  const Factors factors(lora_a, lora_b);
  Tensor out = empty(x, {x.size(0), weight.size(0)}, dtype_of(x));
  Tensor hidden = forward_into(out, false, x, bias, factors, adapter_index, seed, scale, dropout_p);
  if (x.size(0) > 0) add_product(out, x, transposed(weight));
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                        const Tensor& weight, const Tensor& lora_a,
                                                                        const Tensor& lora_b, const Tensor& hidden,
                                                                        const MaybeTensor& adapter_index,
                                                                        const MaybeTensor& seed, double scale,
                                                                        double dropout_p, int64_t needs) {
  const Tensor grad_out = with_unit_rows(grad_in), x = with_unit_rows(x_in);
  const Factors factors(lora_a, lora_b);
  const Wanted wanted(needs);
  const DType dtype = dtype_of(x);
  Tensor dx = wanted.empty(0, x, {x.size(0), x.size(1)}, dtype);
  Tensor dweight = wanted.empty(1, x, {weight.size(0), weight.size(1)}, dtype);
  Tensor dbias = wanted.empty(2, x, {weight.size(0)}, dtype);
  Tensor da = empty_like(wanted, 3, lora_a), db = empty_like(wanted, 4, lora_b);
  const Gradients gradients{wanted.data(0, dx), wanted.data(3, da), wanted.data(4, db), wanted.data(2, dbias), dtype};
  backward_into(gradients, grad_out, x, factors, hidden, adapter_index, seed, scale, dropout_p);
  if (wanted[0] && x.size(0) > 0) add_product(dx, grad_out, weight);
  if (wanted[1]) product_into(dweight, transposed(grad_out), x);
  return {dx, dweight, dbias, da, db};
}

// ---- lora_delta ----

// Conservative: rows that interleave without touching count as shared.
bool share_memory(const Tensor& x, const Tensor& y) {
  const auto first = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto last = [&](const Tensor& t) {
    return first(t) + ((t.size(0) - 1) * t.stride(0) + t.size(1)) * static_cast<int64_t>(element_size(dtype_of(t)));
  };
  return first(x) < last(y) && first(y) < last(x);
}

Tensor lora_delta_forward_(const Tensor& base_out, const Tensor& x_in, const Tensor& lora_a, const Tensor& lora_b,
                           const MaybeTensor& adapter_index, const MaybeTensor& seed, double scale, double dropout_p) {
  STD_TORCH_CHECK(base_out.size(1) == 1 || base_out.stride(1) == 1,
                  "lwft::lora_delta_forward_: base_out must have unit stride along its rows");
  Tensor x = with_unit_rows(x_in);
  if (x.size(0) > 0 && share_memory(x, base_out)) x = torch::stable::clone(x);
  const Factors factors(lora_a, lora_b);
  return forward_into(base_out, true, x, {}, factors, adapter_index, seed, scale, dropout_p);
}

std::tuple<Tensor, Tensor> lora_delta_forward(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                              const Tensor& lora_b, const MaybeTensor& adapter_index,
                                              const MaybeTensor& seed, double scale, double dropout_p) {
  Tensor out = empty(base_out, {base_out.size(0), base_out.size(1)}, dtype_of(base_out));
  torch::stable::copy_(out, base_out);
  Tensor hidden = lora_delta_forward_(out, x, lora_a, lora_b, adapter_index, seed, scale, dropout_p);
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor> lora_delta_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& lora_a,
                                                       const Tensor& lora_b, const Tensor& hidden,
                                                       const MaybeTensor& adapter_index, const MaybeTensor& seed,
                                                       double scale, double dropout_p, int64_t needs) {
  const Tensor grad_out = with_unit_rows(grad_in), x = with_unit_rows(x_in);
  const Factors factors(lora_a, lora_b);
  const Wanted wanted(needs);
  Tensor dx = wanted.empty(0, x, {x.size(0), x.size(1)}, dtype_of(x));
  Tensor da = empty_like(wanted, 1, lora_a), db = empty_like(wanted, 2, lora_b);
  const Gradients gradients{wanted.data(0, dx), wanted.data(1, da), wanted.data(2, db), nullptr, dtype_of(x)};
  backward_into(gradients, grad_out, x, factors, hidden, adapter_index, seed, scale, dropout_p);
  return {dx, da, db};
}

}  // namespace
}  // namespace lwft

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  m.def(
      "low_rank_linear_forward(Tensor x, Tensor down_weight, Tensor up_weight, Tensor? bias) "
      "-> (Tensor out, Tensor hidden)");
  m.def(
      "low_rank_linear_backward(Tensor grad_out, Tensor x, Tensor down_weight, Tensor up_weight, "
      "Tensor hidden, int needs) -> (Tensor dx, Tensor ddown_weight, Tensor dup_weight, Tensor dbias)");
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, "
      "Tensor? adapter_index, Tensor? seed, float scale, float dropout_p) -> (Tensor out, Tensor hidden)");
  m.def(
      "lora_linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor hidden, Tensor? adapter_index, Tensor? seed, float scale, float dropout_p, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dlora_a, Tensor dlora_b)");
  m.def(
      "lora_delta_forward(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? adapter_index, "
      "Tensor? seed, float scale, float dropout_p) -> (Tensor out, Tensor hidden)");
  m.def(
      "lora_delta_forward_(Tensor(a!) base_out, Tensor x, Tensor lora_a, Tensor lora_b, "
      "Tensor? adapter_index, Tensor? seed, float scale, float dropout_p) -> Tensor hidden");
  m.def(
      "lora_delta_backward(Tensor grad_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor hidden, "
      "Tensor? adapter_index, Tensor? seed, float scale, float dropout_p, int needs) "
      "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b)");
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CPU, m) {
  m.impl("low_rank_linear_forward", TORCH_BOX(&lwft::low_rank_linear_forward));
  m.impl("low_rank_linear_backward", TORCH_BOX(&lwft::low_rank_linear_backward));
  m.impl("lora_linear_forward", TORCH_BOX(&lwft::lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&lwft::lora_linear_backward));
  m.impl("lora_delta_forward", TORCH_BOX(&lwft::lora_delta_forward));
  m.impl("lora_delta_forward_", TORCH_BOX(&lwft::lora_delta_forward_));
  m.impl("lora_delta_backward", TORCH_BOX(&lwft::lora_delta_backward));
}
