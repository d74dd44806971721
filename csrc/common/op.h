// Between torch's stable ABI and the parameter structs: the only header through which a room touches torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
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

// An uninitialised tensor on the device of `like`; by the C shim, which spares a trip through the boxed dispatcher.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes, const int64_t* strides,
                            DType dtype) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         aoti_dtype(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    const int64_t size = sizes.begin()[i];
    stride *= size > 1 ? size : 1;
  }
  return empty_strided(like, sizes, strides.data(), dtype);
}

// Which gradients a backward op was asked for: bit i of `needs`. One that was not comes back empty.
class Wanted {
 public:
  explicit Wanted(int64_t needs) : needs_(needs) {}
  bool operator[](int bit) const { return needs_ >> bit & 1; }
  Tensor empty(int bit, const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) const {
    return (*this)[bit] ? lwft::empty(like, sizes, dtype) : lwft::empty(like, {0}, dtype);
  }
  void* data(int bit, const Tensor& result) const { return (*this)[bit] ? result.mutable_data_ptr() : nullptr; }

 private:
  int64_t needs_;
};

// A matrix whose rows a kernel can walk: unit stride along the last dimension. Others are copied.
inline Tensor with_unit_rows(const Tensor& matrix) {
  if (matrix.size(1) <= 1 || matrix.stride(1) == 1) return matrix;
  return torch::stable::contiguous(matrix);
}

inline MaybeTensor with_unit_rows(const MaybeTensor& matrix) {
  return matrix ? MaybeTensor(with_unit_rows(*matrix)) : std::nullopt;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline MaybeTensor as_contiguous(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(as_contiguous(*tensor)) : std::nullopt;
}

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// `seed` holds (seed, offset); it lies on the CPU for CPU kernels.
inline Dropout dropout_of(const MaybeTensor& seed, double p) {
  if (!seed) return Dropout{};
  const int64_t* words = static_cast<const int64_t*>(seed->const_data_ptr());
  return make_dropout(static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), p);
}

}  // namespace lwft
