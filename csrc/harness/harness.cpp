#include "harness/harness.h"

#include <pybind11/stl.h>

#include <atomic>
#include <thread>

#include "common/cpu/threads.h"

namespace lwft::harness {

namespace {

std::vector<void (*)(py::module_&)>& parts() {
  static std::vector<void (*)(py::module_&)> list;
  return list;
}

int thread_count = 1;

// Tasks one by one to whichever thread is free, so that nothing can come to depend on who runs what.
void parallel_for_on_threads(int64_t tasks, TaskRange run, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(context, task, task + 1);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < thread_count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

void set_threads(int count) {
  thread_count = count;
  set_parallel_for(count > 1 ? parallel_for_on_threads : nullptr);
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu_level_count(); ++i) {
    if (cpu_level_runs_here(i)) names.emplace_back(cpu_level(i).isa);
  }
  return names;
}

}  // namespace

Part::Part(void (*bind)(py::module_&)) { parts().push_back(bind); }

const CpuKernels& kernels(const std::string& level) {
  for (int i = 0; i < cpu_level_count(); ++i) {
    if (level == cpu_level(i).isa && cpu_level_runs_here(i)) return cpu_level(i);
  }
  throw py::value_error("no level '" + level + "' in this build that this machine can run");
}

DType dtype_of(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return DType::f64;
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return DType::f32;
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return DType::f16;
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) return DType::bf16;
  throw py::type_error("want float64, float32, float16, or uint16 for bfloat16");
}

py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::f64: return py::dtype("float64");
    case DType::f32: return py::dtype("float32");
    case DType::f16: return py::dtype("float16");
    case DType::bf16: break;
  }
  return py::dtype("uint16");
}

py::array empty(DType dtype, const std::vector<py::ssize_t>& shape) { return {numpy_dtype(dtype), shape}; }

int64_t stride(const py::array& array, int dimension) {
  return array.strides(dimension) / static_cast<int64_t>(array.itemsize());
}

}  // namespace lwft::harness

PYBIND11_MODULE(lwft_harness, m) {
  using namespace lwft;
  namespace py = pybind11;
  m.doc() = "The kernels of lwft_kernels without torch, for its tests.";
  m.def("levels", harness::levels, "The instruction set levels this machine can run, worst first.");
  m.def("chosen_level", [] { return std::string(cpu_kernels().isa); });
  m.def("level_warning", [] { return std::string(cpu_isa_warning()); });
  m.def("set_threads", harness::set_threads, py::arg("count"));
  for (auto* bind : harness::parts()) bind(m);
}
