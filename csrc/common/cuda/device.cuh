// The wrappers of portable.cuh under nvcc: PTX of sm_80 and later (PTX ISA, sections on ldmatrix, mma, cp.async).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Of so many threads a block; then, where ptxas must not spill for more, of so many blocks that fit a multiprocessor.
#define LWFT_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define LWFT_DEVICE __device__ __forceinline__

namespace lwft::cuda {

LWFT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LWFT_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

LWFT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char lwft_shared_memory[];
  return lwft_shared_memory;
}

LWFT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

LWFT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

LWFT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
LWFT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
LWFT_DEVICE void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
LWFT_DEVICE void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// `from` is not read when !valid, but must be an address all the same.
LWFT_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest of the 16 is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
LWFT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's committed groups are under way.
template <int N>
LWFT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

LWFT_DEVICE int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

LWFT_DEVICE void block_barrier() { __syncthreads(); }
LWFT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

LWFT_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

LWFT_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LWFT_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
LWFT_DEVICE T from_float(float x);
template <>
LWFT_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
LWFT_DEVICE Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Enqueues kernel(arguments...) on a cudaStream_t; returns a cudaError_t. Nothing is allocated or waited for, so the
// call can be captured in a graph.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace lwft::cuda
