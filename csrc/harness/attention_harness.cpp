// attention by level, for python_tests/attention/test_levels.py and python_tests/cuda.
#include "attention/attention.h"

#include <cmath>

#include "harness/harness.h"

namespace lwft::harness {

namespace {

Strided strided(const py::array& array) {
  Strided result;
  result.data = array.data();
  for (int i = 0; i < 4; ++i) result.stride[i] = array.shape(i) == 1 ? 0 : stride(array, i);
  return result;
}
Strided strided(const py::object& array) { return array.is_none() ? Strided{} : strided(py::cast<py::array>(array)); }
StridedOut strided_out(py::array& array) {
  StridedOut result;
  result.data = array.mutable_data();
  for (int i = 0; i < 4; ++i) result.stride[i] = stride(array, i);
  return result;
}
py::array like(const py::array& array) { return empty(dtype_of(array), {array.shape(), array.shape() + array.ndim()}); }

// (B, H, S, D) q, (B, Hkv, L, D) k and v; None or (1 or B, Hkv, P, D) prefix, None or (broadcast to B, H, S, L) bias; unit
// last strides.
template <class Params>
void fill_inputs(Params& p, const py::array& q, const py::array& k, const py::array& v, const py::object& bias,
                 const py::object& prefix_k, const py::object& prefix_v, double scale, bool causal, int64_t window,
                 double softcap, uint64_t seed, uint64_t offset, double dropout_p) {
  const int64_t prefix = prefix_k.is_none() ? 0 : py::cast<py::array>(prefix_k).shape(2);
  p.shape = {q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), prefix, q.shape(3), dtype_of(q)};
  p.rule.scale = scale;
  p.rule.softcap = softcap;
  p.rule.causal = causal;
  p.rule.window = window;
  p.rule.bias = strided(bias);
  p.rule.bias_dtype = bias.is_none() ? DType::f32 : dtype_of(py::cast<py::array>(bias));
  p.rule.dropout = make_dropout(seed, offset, dropout_p);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.prefix_k = strided(prefix_k);
  p.prefix_v = strided(prefix_v);
}

// mask: None or bool, as bias. lengths: None or (B) int64.
void fill_masks(AttentionRule& rule, const py::object& mask, const py::object& lengths) {
  rule.mask = strided(mask);
  if (!lengths.is_none()) rule.lengths = static_cast<const int64_t*>(py::cast<py::array>(lengths).data());
}

// Level "cuda" is the CUDA kernel in its emulation; ValueError says why it declines. `out` lies as the op lays it out.
py::tuple forward(const std::string& level, const py::array& q, const py::array& k, const py::array& v,
                  const py::object& bias, const py::object& prefix_k, const py::object& prefix_v, double scale,
                  bool causal, int64_t window, double softcap, uint64_t seed, uint64_t offset, double dropout_p,
                  const py::object& mask, const py::object& lengths) {
  AttentionForward p{};
  fill_inputs(p, q, k, v, bias, prefix_k, prefix_v, scale, causal, window, softcap, seed, offset, dropout_p);
  fill_masks(p.rule, mask, lengths);
  const py::array by_token = empty(p.shape.dtype, {q.shape(0), q.shape(2), q.shape(1), q.shape(3)});
  py::array out = by_token.attr("transpose")(0, 2, 1, 3);
  py::array lse = empty(accumulate_dtype(p.shape.dtype), {q.shape(0), q.shape(1), q.shape(2)});
  p.out = strided_out(out);
  p.lse = lse.mutable_data();
  if (level == "cuda") {
    if (const char* reason = attention_cuda_declines(p)) throw py::value_error(reason);
    std::vector<float> workspace(static_cast<size_t>(attention_forward_workspace(p)), NAN);
    p.workspace = workspace.data();
    attention_forward_cuda(p, nullptr);
  } else {
    kernels(level).attention->forward(p);
  }
  return py::make_tuple(out, lse);
}

py::tuple backward(const std::string& level, const py::array& grad_out, const py::array& grad_lse, const py::array& q,
                   const py::array& k, const py::array& v, const py::array& bias, const py::array& prefix_k,
                   const py::array& prefix_v, const py::array& out, const py::array& lse, double scale, bool causal,
                   int64_t window, double softcap, uint64_t seed, uint64_t offset, double dropout_p) {
  AttentionBackward p{};
  fill_inputs(p, q, k, v, bias, prefix_k, prefix_v, scale, causal, window, softcap, seed, offset, dropout_p);
  p.grad_out = strided(grad_out);
  p.grad_lse = grad_lse.data();
  p.out = strided(out);
  p.lse = lse.data();
  py::array dq = like(q), dk = like(k), dv = like(v), dbias = like(bias);
  py::array dprefix_k = like(prefix_k), dprefix_v = like(prefix_v);
  p.dq = strided_out(dq);
  p.dk = strided_out(dk);
  p.dv = strided_out(dv);
  p.dbias = dbias.mutable_data();
  for (int i = 0; i < 4; ++i) p.bias_size[i] = bias.shape(i);
  p.dprefix_k = dprefix_k.mutable_data();
  p.dprefix_v = dprefix_v.mutable_data();
  p.prefix_batch = prefix_k.shape(0);
  kernels(level).attention->backward(p);
  return py::make_tuple(dq, dk, dv, dbias, dprefix_k, dprefix_v);
}

void bind(py::module_& m) {
  using py::arg;
  m.def("attention_forward", &forward, arg("level"), arg("q"), arg("k"), arg("v"), arg("bias"), arg("prefix_k"),
        arg("prefix_v"), arg("scale"), arg("causal"), arg("window"), arg("softcap"), arg("seed"), arg("offset"),
        arg("dropout_p"), arg("mask") = py::none(), arg("lengths") = py::none());
  m.def("attention_backward", &backward);
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
