// Between torch's stable ABI and the parameter structs: the only header through which a room touches torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/dropout.h"
#include "common/dtype.h"

namespace lwft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "lwft: a tensor must be float64, float32, bfloat16 or float16");
  return DType::f32;
}

inline int32_t aoti_dtype(DType dtype) {
  switch (dtype) {
    case DType::f64: return aoti_torch_dtype_float64();
    case DType::bf16: return aoti_torch_dtype_bfloat16();
    case DType::f16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// torch's promotion among the four floating types.
inline DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
}

// ---- what the kernels take for granted ----
//
// lwft_kernels.functional calls an op first and, if it refuses, looks for what is wrong and says so by name: looking
// costs more than a small call. So an op refuses whatever its kernel could not bear, and its message is for those who
// call torch.ops.lwft themselves.

inline void require(bool fits) {
  STD_TORCH_CHECK(fits, "lwft: the arguments do not go together; lwft_kernels.functional says which and why");
}
inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}
// The dispatcher looks for the one kernel that suits most of the arguments, not for one that suits all.
inline bool beside(const Tensor& x, const Tensor& other) { return device_type(x) == device_type(other); }
inline bool beside(const Tensor& x, const MaybeTensor& other) { return !other || beside(x, *other); }
template <class... Others>
void require_one_device(const Tensor& x, const Others&... others) {
  require((beside(x, others) && ...));
}
inline bool is_vector(const Tensor& tensor, int64_t n) { return tensor.dim() == 1 && tensor.size(0) == n; }
inline bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}
inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}
inline int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// A parameter has the dtype of the activations, or is float32 beside 16-bit ones.
inline bool parameter_fits(DType parameter, DType activation) {
  return parameter == activation || (parameter == DType::f32 && activation != DType::f64);
}

// ---- results ----

// An uninitialised tensor on the device of `like`; by the C shim, which spares a trip through the boxed dispatcher.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const int64_t* strides,
                            DType dtype) {
  int32_t device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         aoti_dtype(dtype), device_type(like), device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(like, sizes, strides.data(), dtype);
}

// The shape of `tensor`, and that with another last size.
inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return sizes;
}
inline std::vector<int64_t> shape_of(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = shape_of(tensor);
  sizes.back() = last;
  return sizes;
}
// One element per row of (..., d).
inline std::vector<int64_t> leading_shape(const Tensor& tensor) {
  std::vector<int64_t> sizes = shape_of(tensor);
  sizes.pop_back();
  return sizes;
}

// Which gradients a backward op was asked for: bit i of `needs`. One that was not comes back empty.
class Wanted {
 public:
  explicit Wanted(int64_t needs) : needs_(needs) {}
  bool operator[](int bit) const { return needs_ >> bit & 1; }
  Tensor empty(int bit, const Tensor& like, const std::vector<int64_t>& sizes, DType dtype) const {
    return (*this)[bit] ? lwft::empty(like, sizes, dtype) : lwft::empty(like, {0}, dtype);
  }
  void* data(int bit, const Tensor& result) const { return (*this)[bit] ? result.mutable_data_ptr() : nullptr; }

 private:
  int64_t needs_;
};

// ---- arguments ----

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline MaybeTensor as_contiguous(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(as_contiguous(*tensor)) : std::nullopt;
}

// The memory of `tensor` from its first element on, in two dimensions.
inline Tensor matrix_view(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride,
                          int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  constexpr int64_t kFurtherOffset = 0;  // on top of the tensor's own
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, kFurtherOffset, &handle));
  return Tensor(handle);
}

// (..., d) as rows that a kernel can walk: unit stride within a row, one stride between rows. What lies otherwise is
// copied. Here and not by a view in Python, which would cost a node of autograd.
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : tensor_(tensor), width_(last_size(tensor)) {
    if (!walk()) {
      tensor_ = torch::stable::contiguous(tensor_);
      walk();
    }
  }

  const Tensor& tensor() const { return tensor_; }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  int64_t stride() const { return stride_; }
  DType dtype() const { return dtype_of(tensor_); }
  const void* data() const { return tensor_.const_data_ptr(); }

  // The same memory in two dimensions, for the vendor's matrix product.
  Tensor matrix() const { return matrix_view(tensor_, count_, width_, stride_, 1); }
  Tensor transposed() const { return matrix_view(tensor_, width_, count_, 1, stride_); }

 private:
  // Sets count and stride; whether the rows lie so.
  bool walk() {
    count_ = 1;
    stride_ = width_;
    bool fits = width_ <= 1 || tensor_.stride(tensor_.dim() - 1) == 1;
    int64_t expected = -1;  // stride of the next dimension outwards
    for (int64_t i = tensor_.dim() - 2; i >= 0; --i) {
      const int64_t size = tensor_.size(i);
      if (size != 1) {
        if (expected < 0) stride_ = tensor_.stride(i);
        fits = fits && (expected < 0 || tensor_.stride(i) == expected);
        expected = tensor_.stride(i) * size;
      }
      count_ *= size;
    }
    return fits || count_ == 0;
  }

  Tensor tensor_;
  int64_t width_, count_ = 1, stride_ = 0;
};

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// `seed` holds (seed, offset); it lies on the CPU for CPU kernels.
inline Dropout dropout_of(const MaybeTensor& seed, double p) {
  if (!seed) return Dropout{};
  const int64_t* words = static_cast<const int64_t*>(seed->const_data_ptr());
  return make_dropout(static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), p);
}

}  // namespace lwft
