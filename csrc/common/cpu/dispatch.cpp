// Compiled with the flags of the baseline. The build passes the levels it compiled, worst first:
//     -DLWFT_ISA_LEVELS="X(baseline) X(avx2) X(avx512) X(avx512_bf16) X(amx_bf16)"
#include "common/cpu/dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lwft {

#define X(level)                                   \
  namespace level {                                \
  extern const NormKernels norm_kernels;           \
  extern const AdapterKernels adapter_kernels;     \
  extern const LowRankKernels lowrank_kernels;     \
  extern const AttentionKernels attention_kernels; \
  }
LWFT_ISA_LEVELS
#undef X

namespace {

#define X(level) \
  {#level, &level::norm_kernels, &level::adapter_kernels, &level::lowrank_kernels, &level::attention_kernels},
constexpr CpuKernels kLevels[] = {LWFT_ISA_LEVELS};
#undef X
constexpr int kLevelCount = sizeof(kLevels) / sizeof(kLevels[0]);

#if defined(__x86_64__)
// For clang, to whose __builtin_cpu_supports "f16c" is no feature.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Whether the processor multiplies bfloat16 in matrix registers and the system lets this process use them, for which a
// process must ask (Linux, Documentation/arch/x86/xstate.rst). Threads that start later have the permission too.
bool may_use_amx_bf16() {
#if defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  unsigned eax, ebx, ecx, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool runs_here(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512_bf16;
  if (std::strcmp(isa, "amx_bf16") == 0) return avx512_bf16 && may_use_amx_bf16();
#endif
  return false;
}

struct Choice {
  int level = 0;
  char warning[160] = "";
};

Choice choose() {
  Choice choice;
  for (int i = 0; i < kLevelCount; ++i) {
    if (runs_here(kLevels[i].isa)) choice.level = i;
  }
  const char* wish = std::getenv("LWFT_CPU_ISA");
  if (wish == nullptr || wish[0] == '\0') return choice;
  const char* reason = "no such level in this build";
  for (int i = 0; i < kLevelCount; ++i) {
    if (std::strcmp(wish, kLevels[i].isa) != 0) continue;
    if (i <= choice.level && runs_here(wish)) {
      choice.level = i;
      return choice;
    }
    reason = "this machine cannot run it";
  }
  std::snprintf(choice.warning, sizeof(choice.warning), "LWFT_CPU_ISA=%.40s ignored: %s; using %s", wish, reason,
                kLevels[choice.level].isa);
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const CpuKernels& cpu_kernels() { return kLevels[chosen().level]; }
int cpu_level_count() { return kLevelCount; }
const CpuKernels& cpu_level(int index) { return kLevels[index]; }
bool cpu_level_runs_here(int index) { return runs_here(kLevels[index].isa); }
const char* cpu_isa_warning() { return chosen().warning; }

}  // namespace lwft
