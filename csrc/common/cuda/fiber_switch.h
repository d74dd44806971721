// A fiber is a stack and the registers a function must preserve. x86-64 by hand, since the emulation switches at every
// warp instruction and swapcontext asks the kernel each time (ten times slower); ucontext elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

// Saves the callee-saved registers of the System V ABI on the stack, its top in *save, and goes on where `to` was saved.
asm(R"(
.text
.weak lwft_fiber_switch
.type lwft_fiber_switch, @function
lwft_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void lwft_fiber_switch(void** save, void* to);

namespace lwft::cuda::emulation {

using FiberContext = void*;

// A context that starts `entry` (which never returns) on a fresh stack.
inline FiberContext make_fiber(char* stack, size_t size, void (*entry)()) {
  uint64_t* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15});
  *--top = 0;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}
inline void switch_fiber(FiberContext& save, FiberContext& to) { lwft_fiber_switch(&save, to); }

}  // namespace lwft::cuda::emulation

#else
#include <ucontext.h>

namespace lwft::cuda::emulation {

using FiberContext = ucontext_t;

inline FiberContext make_fiber(char* stack, size_t size, void (*entry)()) {
  FiberContext context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  return context;
}
inline void switch_fiber(FiberContext& save, FiberContext& to) { swapcontext(&save, &to); }

}  // namespace lwft::cuda::emulation

#endif
