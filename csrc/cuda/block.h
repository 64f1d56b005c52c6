// Shared by the kernels of all .cu files: thread indices, reductions over a warp and a block, and reading of rows.

#pragma once

#include <cstdint>

namespace minidisp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

__device__ __forceinline__ double warp_sum(double x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
__device__ __forceinline__ double warp_max(double x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const double other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int64_t global_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + warp(); }

// Sum or maximum over a block, in all threads; deterministic.
template <bool kFind>
__device__ __forceinline__ double block_reduce(double x, double (&shared)[kWarps]) {
  x = kFind ? warp_max(x) : warp_sum(x);
  if (lane() == 0) shared[warp()] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < kWarps; ++w) x = kFind ? fmax(x, shared[w]) : x + shared[w];
  return x;
}

// Features d to d + 8 of a row of C; zeros from C on.
template <class T>
__device__ __forceinline__ void read8(const T* row, int64_t stride, int64_t d, int64_t C, bool packed, float (&x)[8]) {
  if (packed) {
#pragma unroll
    for (int p = 0; p < 8 / Packet<T>::kSize; ++p) {
      const Packet<T> packet = reinterpret_cast<const Packet<T>*>(row + d)[p];
#pragma unroll
      for (int e = 0; e < Packet<T>::kSize; ++e) x[p * Packet<T>::kSize + e] = static_cast<float>(packet.x[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = d + e < C ? static_cast<float>(row[(d + e) * stride]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void write8(T* row, int64_t d, int64_t C, bool packed, const float (&x)[8]) {
  if (packed) {
#pragma unroll
    for (int p = 0; p < 8 / Packet<T>::kSize; ++p) {
      Packet<T> packet;
#pragma unroll
      for (int e = 0; e < Packet<T>::kSize; ++e) packet.x[e] = static_cast<T>(x[p * Packet<T>::kSize + e]);
      reinterpret_cast<Packet<T>*>(row + d)[p] = packet;
    }
  } else {
    for (int e = 0; e < 8 && d + e < C; ++e) row[d + e] = static_cast<T>(x[e]);
  }
}

}  // namespace
}  // namespace minidisp::cuda
