// What the library does once, as torch loads it: lend the kernels torch's threads, and say which kernels run.
#include "common/cpu/dispatch.h"
#include "common/cpu/threads.h"
#include "common/op.h"

namespace lwft {
namespace {

void run_on_torch_threads(int64_t tasks, TaskRange run, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { run(context, begin, end); });
}

int64_t torch_threads() { return torch::stable::get_num_threads(); }

const bool installed = (set_parallel_for(run_on_torch_threads, torch_threads), true);

std::string cpu_isa() { return cpu_kernels().isa; }
std::string cpu_isa_warning_text() { return cpu_isa_warning(); }

}  // namespace
}  // namespace lwft

STABLE_TORCH_LIBRARY_FRAGMENT(lwft, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_warning() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lwft, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lwft::cpu_isa));
  m.impl("cpu_isa_warning", TORCH_BOX(&lwft::cpu_isa_warning_text));
}
