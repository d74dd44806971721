// How the emulation of CUDA (common/cuda/emulation.h) runs the kernels to come, for python_tests/cuda.
#include "common/cuda/portable.cuh"

#include "harness/harness.h"

namespace lwft::harness {

namespace {

using cuda::emulation::Schedule;

void set_cuda_emulation(const std::string& schedule, bool early_copies) {
  if (schedule == "round_robin") {
    cuda::emulation::options.schedule = Schedule::round_robin;
  } else if (schedule == "greedy") {
    cuda::emulation::options.schedule = Schedule::greedy;
  } else if (schedule == "greedy_reversed") {
    cuda::emulation::options.schedule = Schedule::greedy_reversed;
  } else {
    throw py::value_error("schedule must be round_robin, greedy or greedy_reversed, got '" + schedule + "'");
  }
  cuda::emulation::options.early_copies = early_copies;
}

void bind(py::module_& m) {
  m.def("set_cuda_emulation", &set_cuda_emulation, py::arg("schedule"), py::arg("early_copies"));
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
