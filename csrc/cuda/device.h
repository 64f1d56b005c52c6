// Everything that needs a GPU, in one function each: sm_80 instructions and kernel launches. tests/cuda_emulator.cpp
// has its own version of these functions, and runs all other device code unchanged.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

#include "host.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "dispersion.cu needs sm_80 or later: remove older devices from TORCH_CUDA_ARCH_LIST"
#endif

namespace minidisp::cuda {
namespace {

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Copies 16 bytes from global to shared memory asynchronously; zeros unless wanted.
__device__ __forceinline__ void copy_async(char* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>  // groups that may still be in flight
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Loads four 8 x 8 matrices of 16-bit numbers: lane l passes the address of row l % 8 of matrix l / 8, and gets 2
// numbers of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) : "memory");
}

// d += a b, 16 x 8 x 16 of float16 with float32 sums, by a warp.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Calls kernel(arguments...) on the current stream.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT_MAX) fail("minidisp::dispersion: z is too large for one grid of blocks");
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, current_stream()>>>(arguments...);
  check(cudaGetLastError());
}

void fill_with_zeros(void* to, int64_t bytes) {
  check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), current_stream()));
}

}  // namespace
}  // namespace minidisp::cuda

