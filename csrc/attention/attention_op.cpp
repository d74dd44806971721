// lwft::attention_forward / _backward: tensors to AttentionForward / AttentionBackward.
#include "attention/attention.h"
#include "common/cpu/dispatch.h"
#include "common/op.h"
#ifdef LWFT_WITH_CUDA
#include "common/cuda_stream.h"
#endif

namespace lwft {
namespace {

// Kernels walk along the last dimension with stride 1; a tensor of any other is copied.
Tensor unit_stride(const Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}
MaybeTensor unit_stride(const MaybeTensor& tensor) { return tensor ? MaybeTensor(unit_stride(*tensor)) : std::nullopt; }

// (B, H, S, L) or broadcast to it: the last stride may be 0 too.
MaybeTensor unit_or_no_stride(const MaybeTensor& tensor) {
  return tensor && tensor->stride(3) != 0 ? unit_stride(tensor) : tensor;
}

// Dimensions of size 1 get stride 0, so that they broadcast.
void set_strides(const Tensor& tensor, int64_t* stride) {
  for (int i = 0; i < 4; ++i) stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
}
Strided strided(const MaybeTensor& tensor) {
  Strided result;
  if (!tensor) return result;
  result.data = data(*tensor);
  set_strides(*tensor, result.stride);
  return result;
}
StridedOut strided_out(const Tensor& tensor, bool wanted) {
  StridedOut result;
  if (!wanted) return result;
  result.data = tensor.mutable_data_ptr();
  set_strides(tensor, result.stride);
  return result;
}

// An empty (B, H, T, D) whose memory is (B, T, H, D).
Tensor empty_by_token(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, DType dtype) {
  const auto at_least_1 = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t head = at_least_1(head_dim), token = head * at_least_1(heads), sequence = token * at_least_1(tokens);
  const int64_t strides[4] = {sequence, head, token, 1};
  return empty_strided(like, {batch, heads, tokens, head_dim}, strides, dtype);
}

// (B, H, S, L), or broadcast to it.
bool broadcasts(const Tensor& tensor, const Tensor& q, const Tensor& k) {
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = tensor.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = tensor.size(i) == full[i] || tensor.size(i) == 1;
  return fits;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, const MaybeTensor& mask,
           const MaybeTensor& prefix_k, const MaybeTensor& prefix_v, const MaybeTensor& lengths, double scale,
           int64_t window, double softcap) {
  require_one_device(q, k, v, bias, mask, prefix_k, prefix_v, lengths);
  require(q.dim() == 4 && k.dim() == 4 && same_shape(k, v));
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(3);
  const DType dtype = dtype_of(q);
  require(head_dim > 0 && k.size(0) == batch && k.size(3) == head_dim && dtype_of(k) == dtype && dtype_of(v) == dtype);
  require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0);
  require(prefix_k.has_value() == prefix_v.has_value());
  if (prefix_k) {
    const Tensor& prefix = *prefix_k;
    require(prefix.dim() == 4 && (prefix.size(0) == 1 || prefix.size(0) == batch) && prefix.size(1) == kv_heads);
    require(prefix.size(3) == head_dim && same_shape(prefix, *prefix_v) && dtype_of(prefix) == dtype &&
            dtype_of(*prefix_v) == dtype);
  }
  require(!bias || (broadcasts(*bias, q, k) && parameter_fits(dtype_of(*bias), dtype)));
  require(!mask || (broadcasts(*mask, q, k) && mask->scalar_type() == ScalarType::Bool));
  require(!lengths || (is_vector(*lengths, batch) && lengths->scalar_type() == ScalarType::Long));
  require(std::isfinite(scale) && window >= 0 && softcap >= 0 && std::isfinite(softcap));
}

// The arguments that forward and backward have in common, with strides the kernels can walk.
struct Inputs {
  Tensor q, k, v;
  MaybeTensor bias, mask, prefix_k, prefix_v, lengths;

  Inputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const MaybeTensor& bias_in,
         const MaybeTensor& mask_in, const MaybeTensor& prefix_k_in, const MaybeTensor& prefix_v_in,
         const MaybeTensor& lengths_in)
      : q(unit_stride(q_in)),
        k(unit_stride(k_in)),
        v(unit_stride(v_in)),
        bias(unit_or_no_stride(bias_in)),
        mask(unit_or_no_stride(mask_in)),
        prefix_k(unit_stride(prefix_k_in)),
        prefix_v(unit_stride(prefix_v_in)),
        lengths(as_contiguous(lengths_in)) {}

  AttentionShape shape() const {
    AttentionShape s{};
    s.batch = q.size(0);
    s.heads = q.size(1);
    s.kv_heads = k.size(1);
    s.queries = q.size(2);
    s.keys = k.size(2);
    s.prefix = prefix_k ? prefix_k->size(2) : 0;
    s.head_dim = q.size(3);
    s.dtype = dtype_of(q);
    return s;
  }

  // But for the dropout, whose seed may lie on the device.
  AttentionRule rule(double scale, bool causal, int64_t window, double softcap) const {
    AttentionRule r{};
    r.scale = scale;
    r.softcap = softcap;
    r.causal = causal;
    r.window = window;
    r.bias = strided(bias);
    r.bias_dtype = bias ? dtype_of(*bias) : DType::f32;
    r.mask = strided(mask);
    r.lengths = static_cast<const int64_t*>(data(lengths));
    return r;
  }
};

// Set the dropout from `seed`, which lies on the device of q, and run the kernel.
struct OnCpu {
  static void run(AttentionForward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.rule.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().attention->forward(p);
  }
  static void run(AttentionBackward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    p.rule.dropout = dropout_of(seed, dropout_p);
    cpu_kernels().attention->backward(p);
  }
};

#ifdef LWFT_WITH_CUDA
struct OnCuda {
  static void run(AttentionForward& p, const Tensor& q, const MaybeTensor& seed, double dropout_p) {
    set_device_dropout(p.rule, seed, dropout_p);
    require_cuda(attention_cuda_declines(p));
    const Tensor workspace = empty(q, {attention_forward_workspace(p)}, DType::f32);
    p.workspace = workspace.mutable_data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    require_no_error(attention_forward_cuda(p, current_cuda_stream(q)));
  }
  static void run(AttentionBackward&, const Tensor&, const MaybeTensor&, double) {
    require_cuda("its gradient is not computed in CUDA C++");
  }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
                                             const MaybeTensor& mask, const MaybeTensor& prefix_k,
                                             const MaybeTensor& prefix_v, const MaybeTensor& lengths,
                                             const MaybeTensor& seed, double scale, bool causal, int64_t window,
                                             double softcap, double dropout_p) {
  check(q, k, v, bias, mask, prefix_k, prefix_v, lengths, scale, window, softcap);
  const Inputs in(q, k, v, bias, mask, prefix_k, prefix_v, lengths);
  AttentionForward p{};
  p.shape = in.shape();
  p.rule = in.rule(scale, causal, window, softcap);
  p.q = strided(in.q);
  p.k = strided(in.k);
  p.v = strided(in.v);
  p.prefix_k = strided(in.prefix_k);
  p.prefix_v = strided(in.prefix_v);
  const AttentionShape& s = p.shape;
  Tensor out = empty_by_token(q, s.batch, s.heads, s.queries, s.head_dim, s.dtype);
  Tensor lse = empty(q, {s.batch, s.heads, s.queries}, accumulate_dtype(s.dtype));
  p.out = strided_out(out, true);
  p.lse = lse.mutable_data_ptr();
  Device::run(p, q, seed, dropout_p);
  return {out, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_in, const MaybeTensor& grad_lse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const MaybeTensor& bias, const MaybeTensor& mask, const MaybeTensor& prefix_k, const MaybeTensor& prefix_v,
    const MaybeTensor& lengths, const Tensor& out_in, const Tensor& lse_in, const MaybeTensor& seed, double scale,
    bool causal, int64_t window, double softcap, double dropout_p, int64_t needs) {
  const Inputs in(q, k, v, bias, mask, prefix_k, prefix_v, lengths);
  const Tensor grad_out = unit_stride(grad_out_in), out = unit_stride(out_in), lse = as_contiguous(lse_in);
  const MaybeTensor grad_lse = as_contiguous(grad_lse_in);
  const Wanted wanted(needs);
  AttentionBackward p{};
  p.shape = in.shape();
  p.rule = in.rule(scale, causal, window, softcap);
  p.grad_out = strided(grad_out);
  p.grad_lse = data(grad_lse);
  p.q = strided(in.q);
  p.k = strided(in.k);
  p.v = strided(in.v);
  p.prefix_k = strided(in.prefix_k);
  p.prefix_v = strided(in.prefix_v);
  p.out = strided(out);
  p.lse = data(lse);

  const AttentionShape& s = p.shape;
  const auto by_token = [&](int bit, int64_t heads, int64_t tokens) {
    return wanted[bit] ? empty_by_token(q, s.batch, heads, tokens, s.head_dim, s.dtype) : empty(q, {0}, s.dtype);
  };
  // Bits 3 to 5 stand for arguments that may be absent: then nothing is computed for them.
  const auto like_argument = [&](int bit, const MaybeTensor& argument) {
    if (!wanted[bit] || !argument) return empty(q, {0}, argument ? dtype_of(*argument) : s.dtype);
    return empty(q, {argument->size(0), argument->size(1), argument->size(2), argument->size(3)}, dtype_of(*argument));
  };
  Tensor dq = by_token(0, s.heads, s.queries);
  Tensor dk = by_token(1, s.kv_heads, s.keys), dv = by_token(2, s.kv_heads, s.keys);
  Tensor dbias = like_argument(3, in.bias);
  Tensor dprefix_k = like_argument(4, in.prefix_k), dprefix_v = like_argument(5, in.prefix_v);
  p.dq = strided_out(dq, wanted[0]);
  p.dk = strided_out(dk, wanted[1]);
  p.dv = strided_out(dv, wanted[2]);
  if (in.bias && wanted[3]) {
    p.dbias = dbias.mutable_data_ptr();
    for (int i = 0; i < 4; ++i) p.bias_size[i] = in.bias->size(i);
  }
  if (in.prefix_k) {
    p.prefix_batch = in.prefix_k->size(0);
    p.dprefix_k = wanted.data(4, dprefix_k);
    p.dprefix_v = wanted.data(5, dprefix_v);
  }
  Device::run(p, q, seed, dropout_p);
  return {dq, dk, dv, dbias, dprefix_k, dprefix_v};
}

}  // namespace
}  // namespace lwft

constexpr char kForwardSchema[] =
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? prefix_k, "
    "Tensor? prefix_v, Tensor? lengths, Tensor? seed, float scale, bool causal, int window, float softcap, "
    "float dropout_p) -> (Tensor out, Tensor lse)";

constexpr char kBackwardSchema[] =
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, "
    "Tensor? mask, Tensor? prefix_k, Tensor? prefix_v, Tensor? lengths, Tensor out, Tensor lse, "
    "Tensor? seed, float scale, bool causal, int window, float softcap, float dropout_p, int needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dprefix_k, Tensor dprefix_v)";

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&lwft::attention_forward<lwft::OnCpu>));
  m.impl("attention_backward", TORCH_BOX(&lwft::attention_backward<lwft::OnCpu>));
}

#ifdef LWFT_WITH_CUDA
// In a namespace of their own: on a GPU, Python chooses between these and Triton's kernels (lwft_kernels/registration.py).
STABLE_TORCH_LIBRARY_FRAGMENT(lwft_cuda, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lwft_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&lwft::attention_forward<lwft::OnCuda>));
  m.impl("attention_backward", TORCH_BOX(&lwft::attention_backward<lwft::OnCuda>));
}
#endif
