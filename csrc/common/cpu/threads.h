// Threads and scratch memory for the kernels. The kernels know no thread library: the host installs one
// function.
//
// parallel_for(tasks, body) calls body(0) .. body(tasks - 1), each exactly once, on any thread. What a task
// computes must depend on its number only, never on who runs it or on how many threads there are: that is
// what makes results the same bits every time. It is never nested. The first exception of a task
// (std::bad_alloc) reaches the caller.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lwft {

// run(context, begin, end) runs the tasks begin .. end-1. A host splits [0, tasks) as it likes and calls run
// for every piece, from any thread; the run it is handed never throws.
using TaskRange = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t tasks, TaskRange run, void* context);
using ThreadCount = int64_t (*)();

// Null (the default): everything runs on the caller's thread.
void set_parallel_for(ParallelFor host, ThreadCount threads = nullptr);

// How many threads run tasks, many where the host does not say. Only for a cut that changes no result, as that of
// columns which are summed each on its own: fewer, wider tasks read memory in longer pieces.
int64_t thread_count();

// Below: what the templates at the end are made of.
void run_tasks(int64_t tasks, TaskRange run, void* context);

struct WorkspaceBlock;
struct WorkspaceMark {
  WorkspaceBlock* block;
  size_t used;
};
WorkspaceMark workspace_mark();
void workspace_release(WorkspaceMark mark);
void* workspace_take(size_t count, size_t element_size);

}  // namespace lwft

#ifdef LWFT_ISA
#include "common/cpu/product_scope.h"

namespace lwft::LWFT_ISA {

template <class Body>
inline void parallel_for(int64_t tasks, const Body& body) {
  run_tasks(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        const Body& run = *static_cast<const Body*>(context);
        const ProductScope products;
        for (int64_t task = begin; task < end; ++task) run(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory of this thread, given back at the end of the scope; uninitialised, 64-byte aligned. Scopes
// nest. The memory stays with the thread for the next call, up to 32 MiB. take throws std::bad_alloc. Under
// AddressSanitizer what was not taken is poisoned, and what was is filled with NaN.
class Scratch {
 public:
  Scratch() : mark_(workspace_mark()) {}
  ~Scratch() { workspace_release(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(workspace_take(static_cast<size_t>(count), sizeof(T)));
  }

 private:
  WorkspaceMark mark_;
};

}  // namespace lwft::LWFT_ISA
#endif
