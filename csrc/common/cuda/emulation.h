// The wrappers of portable.cuh on the CPU. One block at a time; each of its threads is a fiber, run by a scheduler until
// it waits: for the other 31 lanes of its warp, at a barrier, or at its end.
//
// What makes mistakes visible:
//   - shared memory starts as NaN, so what nobody wrote shows in the result;
//   - asynchronous copies land at the wait (the latest moment allowed) or at once (the earliest), by option;
//   - schedules differ in which warp runs ahead, so a missing barrier is met by one of them;
//   - lanes that meet in different instructions, a barrier that some threads never reach, and misaligned addresses are
//     errors. An error is thrown by launch(), on the caller's stack: a faulty kernel does not end the process.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda/fiber_switch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define LWFT_KERNEL(...) inline void
#define LWFT_DEVICE inline

namespace lwft::cuda {

namespace emulation {

// round_robin: every thread one step in turn. greedy: a warp runs as far as it can before the next one starts, from the
// first warp up, or in reverse.
enum class Schedule { round_robin, greedy, greedy_reversed };

struct Options {
  Schedule schedule = Schedule::round_robin;
  bool early_copies = false;
};
inline Options options;  // of the launches to come

struct Copy {
  void* to;
  const void* from;
  bool valid;

  void land() const {
    if (valid) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

// One warp instruction in the making: what the lanes that have arrived bring, and what they take away.
struct Warp {
  static constexpr int kWords = 8;
  const char* instruction = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t in[kWarpLanes][kWords];
  uint64_t out[kWarpLanes][kWords];
};

struct Fiber {
  FiberContext context{};
  std::vector<char> stack;
  int thread = 0;
  bool done = false;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
  const uint64_t* waits_for = nullptr;  // a generation counter, and the value it must leave
  uint64_t waits_until_not = 0;
  void* sanitizer_stack = nullptr;

  bool ready() const { return !done && (waits_for == nullptr || *waits_for != waits_until_not); }
};

struct Block {
  int index = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  FiberContext scheduler{};
  const void* scheduler_stack = nullptr;  // for AddressSanitizer, with its size
  size_t scheduler_stack_bytes = 0;
  int running = -1;
  int alive = 0, at_barrier = 0;
  uint64_t barrier_generation = 0;
  std::string error;

  Fiber& fiber() { return fibers[static_cast<size_t>(running)]; }
  int lane() { return fiber().thread % kWarpLanes; }
  Warp& warp() { return warps[static_cast<size_t>(fiber().thread / kWarpLanes)]; }
};

inline thread_local Block* current = nullptr;

constexpr size_t kStackBytes = 256 << 10;

inline void to_scheduler(bool for_good) {
  Block& block = *current;
  Fiber& fiber = block.fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.sanitizer_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
  switch_fiber(fiber.context, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, nullptr, nullptr);
#endif
  static_cast<void>(for_good);
}

// Ends the launch with an error, put together from `parts`. The fibers are left where they stand, so nothing on their
// stacks may own memory: hence no strings here.
[[noreturn]] inline void fail(std::initializer_list<const char*> parts) {
  Block& block = *current;
  if (block.error.empty()) {
    for (const char* part : parts) block.error += part;
    block.error += " (block " + std::to_string(block.index) + ", thread " + std::to_string(block.fiber().thread) + ")";
  }
  for (;;) to_scheduler(false);
}

inline void wait_while(const uint64_t& counter) {
  Fiber& fiber = current->fiber();
  fiber.waits_for = &counter;
  fiber.waits_until_not = counter;
  to_scheduler(false);
  fiber.waits_for = nullptr;
}

// The 32 lanes of the warp meet here; the last one does `operation` for all.
template <class Operation>
inline void warp_instruction(const char* name, Operation operation) {
  Warp& warp = current->warp();
  if (warp.arrived == 0) warp.instruction = name;
  if (std::strcmp(warp.instruction, name) != 0) {
    fail({"lanes of one warp meet in ", warp.instruction, " and ", name});
  }
  if (++warp.arrived < kWarpLanes) return wait_while(warp.generation);
  operation(warp);
  warp.arrived = 0;
  ++warp.generation;
}

inline void check_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail({what, " at an address that is not a multiple of 16"});
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current->scheduler_stack, &current->scheduler_stack_bytes);
#endif
  current->body();
  current->fiber().done = true;
  --current->alive;
  to_scheduler(true);
}

inline void resume(Block& block, int thread) {
  block.running = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* own_stack = nullptr;
  __sanitizer_start_switch_fiber(&own_stack, block.fiber().stack.data(), kStackBytes);
#endif
  switch_fiber(block.scheduler, block.fiber().context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
#endif
}

// Runs each ready thread of [begin, end) once; whether there was one.
inline bool run_range(Block& block, int begin, int end) {
  bool ran = false;
  for (int thread = begin; thread < end && block.error.empty(); ++thread) {
    if (!block.fibers[static_cast<size_t>(thread)].ready()) continue;
    resume(block, thread);
    ran = true;
  }
  return ran;
}

inline bool run_all_once(Block& block) {
  const int threads = static_cast<int>(block.fibers.size()), warps = threads / kWarpLanes;
  if (options.schedule == Schedule::round_robin) return run_range(block, 0, threads);
  bool ran = false;
  for (int i = 0; i < warps; ++i) {
    const int warp = options.schedule == Schedule::greedy ? i : warps - 1 - i;
    while (run_range(block, warp * kWarpLanes, (warp + 1) * kWarpLanes)) ran = true;
  }
  return ran;
}

inline void run_block(Block& block) {
  current = &block;
  const int threads = static_cast<int>(block.fibers.size());
  block.alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[static_cast<size_t>(i)];
    std::vector<char> stack = std::move(fiber.stack);
    fiber = Fiber{};
    fiber.stack = std::move(stack);
    fiber.stack.resize(kStackBytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.data(), kStackBytes);  // frames of the block before
#endif
    fiber.thread = i;
    fiber.context = make_fiber(fiber.stack.data(), kStackBytes, fiber_entry);
  }
  while (block.alive > 0 && block.error.empty()) {
    if (!run_all_once(block) && block.error.empty()) {
      block.error = "threads wait for each other (block " + std::to_string(block.index) + "): a barrier or a warp " +
                    "instruction that some of them never reach";
    }
  }
  current = nullptr;
  if (!block.error.empty()) throw std::runtime_error("CUDA emulation: " + block.error);
}

}  // namespace emulation

inline int thread_index() { return emulation::current->fiber().thread; }
inline int block_index() { return emulation::current->index; }

inline unsigned char* shared_memory() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulation::current->shared.data());
  return reinterpret_cast<unsigned char*>((start + 127) & ~uintptr_t{127});
}

// Lane i gives the address of row i % 8 of matrix i / 8; it gets of each matrix the elements 2 (i % 4) and the next of
// row i / 4, of the transposed matrix in the second form.
template <bool kTransposed>
inline void ldmatrix(uint32_t (&r)[4], const void* row, const char* name) {
  emulation::check_aligned(row, "ldmatrix");
  emulation::Warp& warp = emulation::current->warp();
  const int lane = emulation::current->lane();
  warp.in[lane][0] = reinterpret_cast<uint64_t>(row);
  emulation::warp_instruction(name, [](emulation::Warp& w) {
    for (int target = 0; target < kWarpLanes; ++target) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int i, int j) -> uint32_t {
          const auto* from = reinterpret_cast<const uint16_t*>(w.in[matrix * 8 + (kTransposed ? j : i)][0]);
          return from[kTransposed ? i : j];
        };
        const int i = target / 4, j = 2 * (target % 4);
        w.out[target][matrix] = element(i, j) | element(i, j + 1) << 16;
      }
    }
  });
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(warp.out[lane][i]);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<false>(r, row, "ldmatrix"); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) { ldmatrix<true>(r, row, "ldmatrix.trans"); }

inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
}

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_float(Float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa == 0 ? HUGE_VALF : NAN)
                                 : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return x.bits & 0x8000 ? -value : value;
}

template <class T>
T from_float(float x);
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7E00};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude < 2^exponent, but for zero
  const int unit = magnitude == 0.0f || exponent - 11 < -24 ? -24 : exponent - 11;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));  // to nearest even
  // steps of 2^unit; a carry to 2048 runs into the exponent by itself
  const uint32_t bits = unit == -24 ? steps : (static_cast<uint32_t>(unit + 24) << 10) + steps;
  return {static_cast<uint16_t>(sign | bits)};
}

// Lane l = 4 g + t holds of A the pairs (row g or g + 8, columns 2 t.. and 2 t + 8..), of B the pairs (rows 2 t.. and
// 2 t + 8.., column g), of C the elements (row g and g + 8, columns 2 t, 2 t + 1).
template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Warp& warp = emulation::current->warp();
  const int lane = emulation::current->lane();
  for (int i = 0; i < 4; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &c[i], sizeof(bits));
    warp.in[lane][i] = a[i];
    warp.in[lane][4 + i] = bits | static_cast<uint64_t>(i == 0 ? b0 : i == 1 ? b1 : 0) << 32;
  }
  emulation::warp_instruction("mma", [](emulation::Warp& w) {
    float a_matrix[16][16], b_matrix[16][8];
    const auto element = [](uint64_t pair, int half) { return to_float(T{static_cast<uint16_t>(pair >> 16 * half)}); };
    for (int l = 0; l < kWarpLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          a_matrix[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = element(w.in[l][i], half);
        }
        for (int i = 0; i < 2; ++i) b_matrix[2 * t + 8 * i + half][g] = element(w.in[l][4 + i] >> 32, half);
      }
    }
    for (int l = 0; l < kWarpLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = static_cast<uint32_t>(w.in[l][4 + i]);
        float accumulator, product = 0;
        std::memcpy(&accumulator, &bits, sizeof(accumulator));
        for (int k = 0; k < 16; ++k) product += a_matrix[g + 8 * (i / 2)][k] * b_matrix[k][2 * t + i % 2];
        accumulator += product;
        uint32_t result;
        std::memcpy(&result, &accumulator, sizeof(result));
        w.out[l][i] = result;
      }
    }
  });
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = static_cast<uint32_t>(warp.out[lane][i]);
    std::memcpy(&c[i], &bits, sizeof(bits));
  }
}

inline void copy_async(void* to, const void* from, bool valid) {
  emulation::check_aligned(to, "an asynchronous copy to shared memory");
  if (valid) emulation::check_aligned(from, "an asynchronous copy from global memory");
  const emulation::Copy copy{to, from, valid};
  if (emulation::options.early_copies) {
    copy.land();
  } else {
    emulation::current->fiber().open.push_back(copy);
  }
}
inline void copy_commit() {
  emulation::Fiber& fiber = emulation::current->fiber();
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N>
inline void copy_wait() {
  emulation::Fiber& fiber = emulation::current->fiber();
  while (fiber.committed.size() > static_cast<size_t>(N)) {
    for (const emulation::Copy& copy : fiber.committed.front()) copy.land();
    fiber.committed.pop_front();
  }
}

inline int anew(int value) { return value; }

inline void block_barrier() {
  emulation::Block& block = *emulation::current;
  if (++block.at_barrier < static_cast<int>(block.fibers.size()))
    return emulation::wait_while(block.barrier_generation);
  block.at_barrier = 0;
  ++block.barrier_generation;
}

inline float shuffle_xor(float value, int mask) {
  emulation::Warp& warp = emulation::current->warp();
  const int lane = emulation::current->lane();
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  warp.in[lane][0] = bits;
  warp.in[lane][1] = static_cast<uint64_t>(mask);
  emulation::warp_instruction("shuffle_xor", [](emulation::Warp& w) {
    for (int l = 0; l < kWarpLanes; ++l) w.out[l][0] = w.in[(l ^ static_cast<int>(w.in[l][1])) % kWarpLanes][0];
  });
  bits = static_cast<uint32_t>(warp.out[lane][0]);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Runs the blocks one after the other; returns 0, or throws std::runtime_error.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, void* /*stream*/,
           Arguments... arguments) {
  if (threads % kWarpLanes != 0) throw std::runtime_error("CUDA emulation: a block must be whole warps");
  emulation::Block block;
  block.fibers.resize(static_cast<size_t>(threads));
  block.body = [=] { kernel(arguments...); };
  for (int i = 0; i < blocks; ++i) {
    block.index = i;
    block.warps.assign(static_cast<size_t>(threads / kWarpLanes), emulation::Warp{});
    block.at_barrier = 0;
    block.shared.assign(shared_bytes + 128, 0xFF);  // NaN in every format
    emulation::run_block(block);
  }
  return 0;
}

}  // namespace lwft::cuda
