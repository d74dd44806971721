// attention by level, for python_tests/attention/test_attention_levels.py.
#include "harness/harness.h"

namespace lwft::harness {

namespace {

Strided strided(const py::array& array) {
  Strided result;
  result.data = array.data();
  for (int i = 0; i < 4; ++i) result.stride[i] = array.shape(i) == 1 ? 0 : stride(array, i);
  return result;
}
StridedOut strided_out(py::array& array) {
  StridedOut result;
  result.data = array.mutable_data();
  for (int i = 0; i < 4; ++i) result.stride[i] = stride(array, i);
  return result;
}
py::array like(const py::array& array) { return empty(dtype_of(array), {array.shape(), array.shape() + array.ndim()}); }

// (B, H, S, D) q, (B, Hkv, L, D) k and v, (1 or B, Hkv, P, D) prefix, (broadcast to B, H, S, L) bias; unit
// last strides.
template <class Params>
void fill_inputs(Params& p, const py::array& q, const py::array& k, const py::array& v, const py::array& bias,
                 const py::array& prefix_k, const py::array& prefix_v, double scale, bool causal, int64_t window,
                 double softcap, uint64_t seed, uint64_t offset, double dropout_p) {
  p.shape = {q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), prefix_k.shape(2), q.shape(3), dtype_of(q)};
  p.rule.scale = scale;
  p.rule.softcap = softcap;
  p.rule.causal = causal;
  p.rule.window = window;
  p.rule.bias = strided(bias);
  p.rule.bias_dtype = dtype_of(bias);
  p.rule.dropout = make_dropout(seed, offset, dropout_p);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.prefix_k = strided(prefix_k);
  p.prefix_v = strided(prefix_v);
}

py::tuple forward(const std::string& level, const py::array& q, const py::array& k, const py::array& v,
                  const py::array& bias, const py::array& prefix_k, const py::array& prefix_v, double scale,
                  bool causal, int64_t window, double softcap, uint64_t seed, uint64_t offset, double dropout_p) {
  AttentionForward p{};
  fill_inputs(p, q, k, v, bias, prefix_k, prefix_v, scale, causal, window, softcap, seed, offset, dropout_p);
  py::array out = like(q);
  py::array lse = empty(accumulate_dtype(p.shape.dtype), {q.shape(0), q.shape(1), q.shape(2)});
  p.out = strided_out(out);
  p.lse = lse.mutable_data();
  kernels(level).attention->forward(p);
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
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
