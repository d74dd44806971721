// Which compiled level of the CPU kernels runs. Chosen once, when first asked: the best the processor and the
// operating system support, or what the environment variable LWFT_CPU_ISA names, if that is no better.
//
// A room adds its kernels by defining, in <room>_cpu.cpp and inside namespace lwft::LWFT_ISA,
//     extern const NormKernels norm_kernels;                 // (gives it external linkage)
//     const NormKernels norm_kernels = {forward, backward};  // constant: no code of a level runs at load
// and its op calls cpu_kernels().norm->forward(parameters).
#pragma once
#include "adapter/adapter.h"
#include "attention/attention.h"
#include "lowrank/lowrank.h"
#include "norm/norm.h"

namespace lwft {

struct CpuKernels {
  const char* isa;  // "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"; on other processors "baseline" only
  const NormKernels* norm;
  const AdapterKernels* adapter;
  const LowRankKernels* lowrank;
  const AttentionKernels* attention;
};

// The level in use.
const CpuKernels& cpu_kernels();

// Every level that was compiled, worst first, and whether this machine can run it.
int cpu_level_count();
const CpuKernels& cpu_level(int index);
bool cpu_level_runs_here(int index);

// Why LWFT_CPU_ISA was not followed ("LWFT_CPU_ISA=avx512 ignored: ..."), or an empty string.
const char* cpu_isa_warning();

}  // namespace lwft
