// lwft::low_rank_linear_*, lora_linear_* and lora_delta_*: tensors to LowRankForward / LowRankBackward, and the product
// with the frozen weight, which is the vendor's where the vendor has one; on a GPU always.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <chrono>
#include <cstring>
#include <mutex>

#include "common/cpu/dispatch.h"
#include "common/op.h"
#include "lowrank/lowrank.h"

#ifdef LWFT_WITH_CUDA
#include "common/cuda_stream.h"

// In libtorch_cuda alone, hence weak, as the stream is.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                          AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                                          double beta, double alpha);
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                       AtenTensorHandle mat2);
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// x (..., d_in) and the factors alone or, where they are chosen by index, stacked.
void check(const Tensor& x, const Tensor& a, const Tensor& b, bool stacked, double scale) {
  const int64_t dims = stacked ? 3 : 2, last = dims - 1;
  require_one_device(x, a, b);
  require(x.dim() >= 1 && a.dim() == dims && b.dim() == dims && std::isfinite(scale));
  require(a.size(last) == last_size(x) && a.size(last) > 0 && a.size(last - 1) > 0 &&
          b.size(last) == a.size(last - 1) && b.size(last - 1) > 0 &&
          (!stacked || (a.size(0) == b.size(0) && a.size(0) > 0)));
  require(dtype_of(a) == dtype_of(b));
}

template <class Parameters>
void set_input(Parameters& p, const Rows& x, double scale, const MaybeTensor& adapter_index) {
  p.tokens = x.count();
  p.x_dtype = x.dtype();
  p.x = x.data();
  p.x_row_stride = x.stride();
  p.scale = scale;
  p.adapter_index = adapter_index ? static_cast<const int64_t*>(data(*adapter_index)) : nullptr;
}

// An uninitialised gradient like what it is the gradient of; empty if it is not wanted.
Tensor empty_like(const Wanted& wanted, int bit, const Tensor& tensor) {
  return wanted.empty(bit, tensor, shape_of(tensor), dtype_of(tensor));
}

// ---- the product with the frozen weight ----

// The vendor's, below autograd, by the C shim, which takes no torch::Scalar: result += a b, or result = a b.
void vendor_add_product(const Tensor& result, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor transposed(const Tensor& matrix) {
  return matrix_view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

// result (m, n), a (m, k) with unit stride along their rows, b (k, n) with a unit stride.
BaseProduct base_product(const Tensor& result, const Tensor& a, const Tensor& b) {
  BaseProduct p{};
  p.rows = a.size(0);
  p.depth = a.size(1);
  p.columns = b.size(1);
  p.dtype = dtype_of(a);
  p.a = data(a);
  p.a_row_stride = a.stride(0);
  p.b = data(b);
  p.b_row_stride = b.stride(0);
  p.b_col_stride = b.stride(1);
  p.out = result.mutable_data_ptr();
  p.out_row_stride = result.stride(0);
  return p;
}

void own_add_product(const Tensor& result, const Tensor& a, const Tensor& b) {
  cpu_kernels().lowrank->base_product(base_product(result, a, b));
}

// Whether the vendor multiplies 16-bit matrices by a plain loop: so PyTorch does where the processor has no instruction
// for it, many times slower than in float32. Neither PyTorch nor the processor tells, so it is measured, once per kind
// and process. Between a loop and a kernel there is no doubt.
bool vendor_is_slow(const Tensor& like, bool b_is_transpose) {
  constexpr int64_t kSize = 128;
  constexpr int kTimes = 3;
  const DType dtype = dtype_of(like);
  const Tensor a = empty(like, {kSize, kSize}, dtype), b = empty(like, {kSize, kSize}, dtype);
  Tensor result = empty(like, {kSize, kSize}, dtype);
  for (const Tensor& tensor : {a, b, result}) {
    std::memset(tensor.mutable_data_ptr(), 0, kSize * kSize * element_size(dtype));
  }
  const Tensor right = b_is_transpose ? transposed(b) : b;
  const auto best = [&](void (*product)(const Tensor&, const Tensor&, const Tensor&)) {
    auto least = std::chrono::steady_clock::duration::max();
    for (int i = 0; i < kTimes; ++i) {
      const auto start = std::chrono::steady_clock::now();
      product(result, a, right);
      const auto time = std::chrono::steady_clock::now() - start;
      least = time < least ? time : least;
    }
    return least;
  };
  return best(vendor_add_product) > 3 * best(own_add_product);
}

bool takes_own(const Tensor& result, const Tensor& a, const Tensor& b) {
  const DType dtype = dtype_of(a);
  if (dtype == DType::f64 || (b.stride(0) != 1 && b.stride(1) != 1)) return false;
  if (dtype == DType::f32) return cpu_kernels().lowrank->base_product_is_faster(base_product(result, a, b));
  const bool b_is_transpose = b.stride(0) == 1;
  static std::once_flag measured[4];
  static bool slow[4];
  const int kind = (dtype == DType::bf16 ? 0 : 2) + (b_is_transpose ? 1 : 0);
  std::call_once(measured[kind], [&] { slow[kind] = vendor_is_slow(a, b_is_transpose); });
  return slow[kind];
}

// result += a b
void add_product(const Tensor& result, const Tensor& a, const Tensor& b) {
  takes_own(result, a, b) ? own_add_product(result, a, b) : vendor_add_product(result, a, b);
}

// ---- the frozen weight, plain or packed ----

// What pack_weight made of a weight is bytes in one dimension, which no weight is, nor a flattened one.
bool is_packed(const Tensor& weight) { return weight.scalar_type() == ScalarType::Byte; }

int64_t packed_bytes(int64_t d_out, int64_t d_in, DType dtype) {
  return cpu_kernels().lowrank->packed_bytes(d_out, d_in, dtype);
}

PackedWeight packed_weight(const Tensor& bytes, int64_t d_out, int64_t d_in, DType dtype) {
  require(is_packed(bytes) && is_vector(bytes, packed_bytes(d_out, d_in, dtype)) && bytes.size(0) > 0 &&
          bytes.is_contiguous());
  return {d_out, d_in, dtype, bytes.mutable_data_ptr()};
}

// A weight is read from end to end for every few tokens: through large pages, if the system gives them, that is faster,
// the more so as nothing is fetched ahead past the end of a page (at 16 tokens a quarter of the time, measured).
void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage, last = end / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// The size of what pack_weight makes of `weight`; 0 where the level in use has no product for its dtype.
int64_t packed_weight_bytes(const Tensor& weight) {
  require(weight.dim() == 2);
  return packed_bytes(weight.size(0), weight.size(1), dtype_of(weight));
}

Tensor pack_weight(const Tensor& weight_in) {
  const int64_t bytes = packed_weight_bytes(weight_in);
  STD_TORCH_CHECK(bytes > 0, "lwft::pack_weight: the level ", cpu_kernels().isa,
                  " has no product with a packed weight of this dtype and shape");
  const Tensor weight = as_contiguous(weight_in);
  constexpr int64_t kStride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &kStride, aoti_torch_dtype_uint8(), device_type(weight), 0, &handle));
  Tensor packed(handle);
  ask_for_large_pages(packed.mutable_data_ptr(), bytes);
  const PackedWeight p = packed_weight(packed, weight.size(0), weight.size(1), dtype_of(weight));
  cpu_kernels().lowrank->pack_weight(p, data(weight));
  return packed;
}

// Into `weight`, of the dtype and shape that was packed.
void unpack_weight_(const Tensor& weight, const Tensor& packed) {
  require_one_device(weight, packed);
  require(weight.dim() == 2 && weight.is_contiguous());
  const PackedWeight p = packed_weight(packed, weight.size(0), weight.size(1), dtype_of(weight));
  cpu_kernels().lowrank->unpack_weight(p, weight.mutable_data_ptr());
}

// ---- the two devices ----

struct OnCpu {
  static constexpr bool kMayShareMemory = false;  // x and out

  static void run(LowRankForward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    prepare(p, seed, dropout_p);
    cpu_kernels().lowrank->forward(p);
  }
  static void run(LowRankBackward& p, const Tensor&, const MaybeTensor& seed, double dropout_p) {
    prepare(p, seed, dropout_p);
    cpu_kernels().lowrank->backward(p);
  }

  // result += rows W^T if `transpose`, else rows W; d_out and d_in are the sizes of W.
  static void add_base_product(const Tensor& result_in, const Rows& rows, const Tensor& weight, bool transpose,
                               int64_t d_out, int64_t d_in) {
    if (rows.count() == 0) return;
    const Rows result(result_in);
    if (!is_packed(weight)) {
      return add_product(result.matrix(), rows.matrix(), transpose ? transposed(weight) : weight);
    }
    PackedProduct p{};
    p.weight = packed_weight(weight, d_out, d_in, rows.dtype());
    p.transpose = transpose;
    p.rows = rows.count();
    p.a = rows.data();
    p.a_row_stride = rows.stride();
    p.out = result_in.mutable_data_ptr();
    p.out_row_stride = result.stride();
    cpu_kernels().lowrank->packed_product(p);
  }

  static void product_into(const Tensor& result, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), a.get(), b.get()));
  }

 private:
  // A wrong index would read past the stacked adapters. The kernel walks the indices anyway, so looking costs nothing.
  template <class Parameters>
  static void prepare(Parameters& p, const MaybeTensor& seed, double dropout_p) {
    p.dropout = dropout_of(seed, dropout_p);
    for (int64_t token = 0; p.adapter_index != nullptr && token < p.tokens; ++token) {
      const int64_t adapter = p.adapter_index[token];
      STD_TORCH_CHECK(adapter >= -1 && adapter < p.adapters, "lwft: adapter_index must lie between -1 and ",
                      p.adapters - 1, ", got ", adapter);
    }
  }
};

#ifdef LWFT_WITH_CUDA
struct OnCuda {
  static constexpr bool kMayShareMemory = true;  // all of x is read before out is written

  static void run(LowRankForward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    enqueue(p, x, seed, dropout_p, low_rank_forward_workspace, low_rank_forward_cuda);
  }
  static void run(LowRankBackward& p, const Tensor& x, const MaybeTensor& seed, double dropout_p) {
    enqueue(p, x, seed, dropout_p, low_rank_backward_workspace, low_rank_backward_cuda);
  }

  static void add_base_product(const Tensor& result_in, const Rows& rows, const Tensor& weight, bool transpose, int64_t,
                               int64_t) {
    require_vendor();
    require_cuda(is_packed(weight) ? "a packed weight is for the CPU" : nullptr);
    if (rows.count() == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(result_in.get_device_index());
    const Tensor result = Rows(result_in).matrix(), a = rows.matrix();
    const Tensor b = transpose ? transposed(weight) : weight;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(result.get(), result.get(), a.get(), b.get(), 1.0, 1.0));
  }

  static void product_into(const Tensor& result, const Tensor& a, const Tensor& b) {
    require_vendor();
    const torch::stable::accelerator::DeviceGuard guard(result.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(result.get(), a.get(), b.get()));
  }

 private:
  static void require_vendor() {
    STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr && aoti_torch_cuda_mm_out != nullptr,
                    "lwft: this torch was built without CUDA");
  }

  template <class P>
  static void enqueue(P& p, const Tensor& x, const MaybeTensor& seed, double dropout_p,
                      int64_t (*workspace_floats)(const P&), int (*kernel)(const P&, void*)) {
    set_device_dropout(p, seed, dropout_p);
    require_cuda(low_rank_cuda_declines(p));
    const Tensor workspace = empty(x, {workspace_floats(p)}, DType::f32);
    p.workspace = workspace.mutable_data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    require_no_error(kernel(p, current_cuda_stream(x)));
  }
};
#endif

// ---- the branch ----

// out = bias + the product, or out += the product; the middle that backward needs goes into `hidden`, null where none
// follows.
template <class Device>
void forward_into(const Tensor& out, bool accumulate, MaybeTensor* hidden, const Rows& x, const MaybeTensor& bias_in,
                  const Factors& factors, const MaybeTensor& index_in, const MaybeTensor& seed, double scale,
                  double dropout_p) {
  const MaybeTensor bias = as_contiguous(bias_in), index = as_contiguous(index_in);
  LowRankForward p{};
  factors.fill(p);
  set_input(p, x, scale, index);
  p.bias = data(bias);
  p.bias_dtype = bias ? dtype_of(*bias) : p.x_dtype;
  p.accumulate = accumulate;
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(out);
  p.out_row_stride = Rows(out).stride();
  if (hidden != nullptr) {
    *hidden = empty(x.tensor(), shape_of(x.tensor(), p.rank), accumulate_dtype(p.param_dtype));
    p.hidden = (*hidden)->mutable_data_ptr();
  }
  Device::run(p, x.tensor(), seed, dropout_p);
}

// Where the gradients go; null for those that are not wanted.
struct Gradients {
  void *dx, *da, *db, *dbias;
  DType bias_dtype;
};

template <class Device>
void backward_into(const Gradients& gradients, const Rows& grad_out, const Rows& x, const Factors& factors,
                   const Tensor& hidden_in, const MaybeTensor& index_in, const MaybeTensor& seed, double scale,
                   double dropout_p) {
  const Tensor hidden = as_contiguous(hidden_in);
  const MaybeTensor index = as_contiguous(index_in);
  LowRankBackward p{};
  factors.fill(p);
  set_input(p, x, scale, index);
  p.grad_out = grad_out.data();
  p.out_dtype = grad_out.dtype();
  p.grad_out_row_stride = grad_out.stride();
  p.hidden = data(hidden);
  p.dx = gradients.dx;
  p.da = gradients.da;
  p.db = gradients.db;
  p.dbias = gradients.dbias;
  p.bias_dtype = gradients.bias_dtype;
  Device::run(p, x.tensor(), seed, dropout_p);
}

// ---- low_rank_linear ----

template <class Device>
Tensor low_rank_linear(MaybeTensor* hidden, const Tensor& x_in, const Tensor& down_weight, const Tensor& up_weight,
                       const MaybeTensor& bias) {
  check(x_in, down_weight, up_weight, false, 1.0);
  require_one_device(x_in, bias);
  require(parameter_fits(dtype_of(down_weight), dtype_of(x_in)));
  require(!bias || (is_vector(*bias, up_weight.size(0)) && dtype_of(*bias) == dtype_of(up_weight)));
  const Rows x(x_in);
  const Factors factors(down_weight, up_weight);
  Tensor out = empty(x_in, shape_of(x_in, up_weight.size(0)), x.dtype());
  forward_into<Device>(out, false, hidden, x, bias, factors, {}, {}, 1.0, 0.0);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> low_rank_linear_forward(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                                                   const MaybeTensor& bias) {
  MaybeTensor hidden;
  Tensor out = low_rank_linear<Device>(&hidden, x, down_weight, up_weight, bias);
  return {out, *hidden};
}

Tensor low_rank_linear_inference(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                                 const MaybeTensor& bias) {
  return low_rank_linear<OnCpu>(nullptr, x, down_weight, up_weight, bias);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                    const Tensor& down_weight, const Tensor& up_weight,
                                                                    const Tensor& hidden, int64_t needs) {
  const Rows grad_out(grad_in), x(x_in);
  const Factors factors(down_weight, up_weight);
  const Wanted wanted(needs);
  const DType param_dtype = dtype_of(up_weight);
  Tensor dx = empty_like(wanted, 0, x_in);
  Tensor ddown = empty_like(wanted, 1, down_weight), dup = empty_like(wanted, 2, up_weight);
  Tensor dbias = wanted.empty(3, x_in, {up_weight.size(0)}, param_dtype);
  const Gradients gradients{wanted.data(0, dx), wanted.data(1, ddown), wanted.data(2, dup), wanted.data(3, dbias),
                            param_dtype};
  backward_into<Device>(gradients, grad_out, x, factors, hidden, {}, {}, 1.0, 0.0);
  return {dx, ddown, dup, dbias};
}

// ---- lora_linear: the low-rank part and the bias first, then x W^T is added in place ----

template <class Device>
Tensor lora_linear(MaybeTensor* hidden, const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                   const Tensor& lora_a, const Tensor& lora_b, const MaybeTensor& adapter_index,
                   const MaybeTensor& seed, double scale, double dropout_p) {
  check(x_in, lora_a, lora_b, adapter_index.has_value(), scale);
  const DType dtype = dtype_of(x_in);
  const int64_t d_out = lora_b.size(lora_b.dim() - 2), d_in = last_size(x_in);
  require_one_device(x_in, weight, bias, adapter_index);
  require(parameter_fits(dtype_of(lora_a), dtype));
  require(is_packed(weight) ? is_vector(weight, packed_bytes(d_out, d_in, dtype))
                            : is_matrix(weight, d_out, d_in) && dtype_of(weight) == dtype);
  require(!bias || (is_vector(*bias, d_out) && dtype_of(*bias) == dtype));
  const Rows x(x_in);
  require(!adapter_index || is_vector(*adapter_index, x.count()));
  const Factors factors(lora_a, lora_b);
  Tensor out = empty(x_in, shape_of(x_in, d_out), dtype);
  forward_into<Device>(out, false, hidden, x, bias, factors, adapter_index, seed, scale, dropout_p);
  Device::add_base_product(out, x, weight, true, d_out, d_in);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                               const Tensor& lora_a, const Tensor& lora_b,
                                               const MaybeTensor& adapter_index, const MaybeTensor& seed, double scale,
                                               double dropout_p) {
  MaybeTensor hidden;
  Tensor out = lora_linear<Device>(&hidden, x, weight, bias, lora_a, lora_b, adapter_index, seed, scale, dropout_p);
  return {out, *hidden};
}

Tensor lora_linear_inference(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& lora_a,
                             const Tensor& lora_b, const MaybeTensor& adapter_index, const MaybeTensor& seed,
                             double scale, double dropout_p) {
  return lora_linear<OnCpu>(nullptr, x, weight, bias, lora_a, lora_b, adapter_index, seed, scale, dropout_p);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                        const Tensor& weight, const Tensor& lora_a,
                                                                        const Tensor& lora_b, const Tensor& hidden,
                                                                        const MaybeTensor& adapter_index,
                                                                        const MaybeTensor& seed, double scale,
                                                                        double dropout_p, int64_t needs) {
  const Rows grad_out(grad_in), x(x_in);
  const Factors factors(lora_a, lora_b);
  const Wanted wanted(needs);
  const DType dtype = x.dtype();
  const int64_t d_out = lora_b.size(lora_b.dim() - 2), d_in = last_size(x_in);
  require(!is_packed(weight) || !wanted[1]);
  Tensor dx = empty_like(wanted, 0, x_in), dweight = wanted.empty(1, x_in, {d_out, d_in}, dtype);
  Tensor dbias = wanted.empty(2, x_in, {d_out}, dtype);
  Tensor da = empty_like(wanted, 3, lora_a), db = empty_like(wanted, 4, lora_b);
  const Gradients gradients{wanted.data(0, dx), wanted.data(3, da), wanted.data(4, db), wanted.data(2, dbias), dtype};
  backward_into<Device>(gradients, grad_out, x, factors, hidden, adapter_index, seed, scale, dropout_p);
  if (wanted[0]) Device::add_base_product(dx, grad_out, weight, false, d_out, d_in);
  if (wanted[1]) Device::product_into(dweight, grad_out.transposed(), x.matrix());
  return {dx, dweight, dbias, da, db};
}

// ---- lora_delta ----

// Conservative: rows that interleave without touching count as shared.
bool share_memory(const Rows& x, const Rows& y) {
  const auto first = [](const Rows& rows) { return static_cast<const char*>(rows.data()); };
  const auto last = [&](const Rows& rows) {
    const int64_t elements = (rows.count() - 1) * rows.stride() + rows.width();
    return first(rows) + elements * static_cast<int64_t>(element_size(rows.dtype()));
  };
  return first(x) < last(y) && first(y) < last(x);
}

template <class Device>
Tensor lora_delta_forward_(const Tensor& base_out, const Tensor& x_in, const Tensor& lora_a, const Tensor& lora_b,
                           const MaybeTensor& adapter_index, const MaybeTensor& seed, double scale, double dropout_p) {
  check(x_in, lora_a, lora_b, adapter_index.has_value(), scale);
  require_one_device(x_in, base_out, adapter_index);
  require(base_out.dim() >= 1 && last_size(base_out) == lora_b.size(lora_b.dim() - 2));
  const Rows out(base_out);
  STD_TORCH_CHECK(out.data() == base_out.const_data_ptr(),
                  "lwft::lora_delta_forward_: base_out must be rows of unit stride, with one stride between them");
  Rows x(x_in);
  require(out.count() == x.count() && (!adapter_index || is_vector(*adapter_index, x.count())));
  if (!Device::kMayShareMemory && x.count() > 0 && share_memory(x, out)) x = Rows(torch::stable::clone(x_in));
  const Factors factors(lora_a, lora_b);
  MaybeTensor hidden;
  forward_into<Device>(base_out, true, &hidden, x, {}, factors, adapter_index, seed, scale, dropout_p);
  return *hidden;
}

template <class Device>
std::tuple<Tensor, Tensor> lora_delta_forward(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                              const Tensor& lora_b, const MaybeTensor& adapter_index,
                                              const MaybeTensor& seed, double scale, double dropout_p) {
  Tensor out = empty(base_out, shape_of(base_out), dtype_of(base_out));
  torch::stable::copy_(out, base_out);
  Tensor hidden = lora_delta_forward_<Device>(out, x, lora_a, lora_b, adapter_index, seed, scale, dropout_p);
  return {out, hidden};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> lora_delta_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& lora_a,
                                                       const Tensor& lora_b, const Tensor& hidden,
                                                       const MaybeTensor& adapter_index, const MaybeTensor& seed,
                                                       double scale, double dropout_p, int64_t needs) {
  const Rows grad_out(grad_in), x(x_in);
  const Factors factors(lora_a, lora_b);
  const Wanted wanted(needs);
  Tensor dx = empty_like(wanted, 0, x_in);
  Tensor da = empty_like(wanted, 1, lora_a), db = empty_like(wanted, 2, lora_b);
  const Gradients gradients{wanted.data(0, dx), wanted.data(1, da), wanted.data(2, db), nullptr, x.dtype()};
  backward_into<Device>(gradients, grad_out, x, factors, hidden, adapter_index, seed, scale, dropout_p);
  return {dx, da, db};
}

}  // namespace
}  // namespace lwft

// The ops that both devices have.
template <class Library>
static void define_ops(Library& m) {
  m.def(
      "low_rank_linear_forward(Tensor x, Tensor down_weight, Tensor up_weight, Tensor? bias) "
      "-> (Tensor out, Tensor hidden)");
  m.def(
      "low_rank_linear_backward(Tensor grad_out, Tensor x, Tensor down_weight, Tensor up_weight, "
      "Tensor hidden, int needs) -> (Tensor dx, Tensor ddown_weight, Tensor dup_weight, Tensor dbias)");
  // `weight` is (d_out, d_in), or what pack_weight made of it
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

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  define_ops(m);
  // forward where no backward follows
  m.def("low_rank_linear_inference(Tensor x, Tensor down_weight, Tensor up_weight, Tensor? bias) -> Tensor");
  m.def(
      "lora_linear_inference(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, "
      "Tensor? adapter_index, Tensor? seed, float scale, float dropout_p) -> Tensor");
  m.def("packed_weight_bytes(Tensor weight) -> int");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight_(Tensor(a!) weight, Tensor packed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CPU, m) {
  m.impl("low_rank_linear_forward", TORCH_BOX(&lwft::low_rank_linear_forward<lwft::OnCpu>));
  m.impl("low_rank_linear_backward", TORCH_BOX(&lwft::low_rank_linear_backward<lwft::OnCpu>));
  m.impl("low_rank_linear_inference", TORCH_BOX(&lwft::low_rank_linear_inference));
  m.impl("lora_linear_forward", TORCH_BOX(&lwft::lora_linear_forward<lwft::OnCpu>));
  m.impl("lora_linear_backward", TORCH_BOX(&lwft::lora_linear_backward<lwft::OnCpu>));
  m.impl("lora_linear_inference", TORCH_BOX(&lwft::lora_linear_inference));
  m.impl("lora_delta_forward", TORCH_BOX(&lwft::lora_delta_forward<lwft::OnCpu>));
  m.impl("lora_delta_forward_", TORCH_BOX(&lwft::lora_delta_forward_<lwft::OnCpu>));
  m.impl("lora_delta_backward", TORCH_BOX(&lwft::lora_delta_backward<lwft::OnCpu>));
  m.impl("packed_weight_bytes", TORCH_BOX(&lwft::packed_weight_bytes));
  m.impl("pack_weight", TORCH_BOX(&lwft::pack_weight));
  m.impl("unpack_weight_", TORCH_BOX(&lwft::unpack_weight_));
}

#ifdef LWFT_WITH_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(lwft_cuda, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(lwft_cuda, CUDA, m) {
  m.impl("low_rank_linear_forward", TORCH_BOX(&lwft::low_rank_linear_forward<lwft::OnCuda>));
  m.impl("low_rank_linear_backward", TORCH_BOX(&lwft::low_rank_linear_backward<lwft::OnCuda>));
  m.impl("lora_linear_forward", TORCH_BOX(&lwft::lora_linear_forward<lwft::OnCuda>));
  m.impl("lora_linear_backward", TORCH_BOX(&lwft::lora_linear_backward<lwft::OnCuda>));
  m.impl("lora_delta_forward", TORCH_BOX(&lwft::lora_delta_forward<lwft::OnCuda>));
  m.impl("lora_delta_forward_", TORCH_BOX(&lwft::lora_delta_forward_<lwft::OnCuda>));
  m.impl("lora_delta_backward", TORCH_BOX(&lwft::lora_delta_backward<lwft::OnCuda>));
}
#endif
