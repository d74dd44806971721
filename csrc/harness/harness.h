// lwft_harness: the Python module through which the tests drive the kernels without torch, level by level.
//
// A room adds its part in one file, <room>_harness.cpp:
//     void bind_norm(py::module_& m) { m.def("add_layer_norm_forward", ...); }
//     const lwft::harness::Part norm(bind_norm);
//
// Arrays are numpy's: float64, float32 and float16 are what they say, uint16 holds the bits of bfloat16.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "common/cpu/dispatch.h"
#include "common/dtype.h"

namespace lwft::harness {

namespace py = pybind11;

// Registers a room's bindings; a static object of its file.
class Part {
 public:
  explicit Part(void (*bind)(py::module_&));
};

// The kernels of a level by name. ValueError where the build has no such level or this machine cannot run it.
const CpuKernels& kernels(const std::string& level);

DType dtype_of(const py::array& array);  // TypeError for any other numpy dtype
py::dtype numpy_dtype(DType dtype);

// A new C-contiguous array.
py::array empty(DType dtype, const std::vector<py::ssize_t>& shape);

// The stride of a dimension in elements.
int64_t stride(const py::array& array, int dimension);

}  // namespace lwft::harness
