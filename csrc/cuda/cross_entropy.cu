// The cross-entropy of rows of logits and its gradient, which overwrites them, on CUDA devices: the part of
// minidisp/loss.py between its matrix products. One block per row; the logits are read twice and written once, and
// everything is computed in float32. Without nvcc, this file is plain C++: tests/cuda_emulator.cpp runs it on the CPU.

#include <cmath>
#include <type_traits>

#include "operators.h"

#if defined(__CUDACC__)
#include "device.h"
#endif
#include "block.h"

namespace minidisp::cuda {
namespace {

// Row n: V logits from n stride on. losses (rows,): 0 if the target is ignored, and so is its gradient; both are NaN if
// it is not in the vocabulary.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_loss(T* logits, const int64_t* targets, int64_t ignored, int64_t V, int64_t stride, bool packed,
                 bool need_grad, float* losses) {
  __shared__ double most_of[kWarps], sum_of[kWarps];
  T* const row = logits + static_cast<int64_t>(blockIdx.x) * stride;
  const int64_t target = targets[blockIdx.x];
  const bool counted = target != ignored, known = 0 <= target && target < V;
  float x[8];
  // The largest logit so far, and the sum of the exponentials relative to it. Finite initially, so that logits of -Inf
  // have an exponential of 0.
  float most = -3.402823466e38f, sum = 0;
  for (int64_t d = threadIdx.x * 8; d < V; d += kThreads * 8) {
    read8(row, 1, d, V, packed && d + 8 <= V, x);
    const float before = most;
    for (int e = 0; e < 8; ++e)
      if (d + e < V) most = fmaxf(most, x[e]);
    sum *= expf(before - most);
    for (int e = 0; e < 8; ++e) sum += d + e < V ? expf(x[e] - most) : 0.0f;
  }
  const float largest = static_cast<float>(block_reduce<true>(most, most_of));
  const double total = block_reduce<false>(sum * expf(most - largest), sum_of);
  if (threadIdx.x == 0)
    losses[blockIdx.x] = !counted ? 0.0f
                         : known  ? static_cast<float>(log(total)) - (static_cast<float>(row[target]) - largest)
                                  : NAN;
  if (!need_grad) return;
  __syncthreads();  // the target's logit has been read
  const float share = !counted ? 0.0f : known ? static_cast<float>(1 / total) : NAN;
  for (int64_t d = threadIdx.x * 8; d < V; d += kThreads * 8) {
    const bool whole = packed && d + 8 <= V;
    read8(row, 1, d, V, whole, x);
    for (int e = 0; e < 8; ++e)
      x[e] = counted ? expf(x[e] - largest) * share - (d + e == target ? 1.0f : 0.0f) : 0.0f;
    write8(row, d, V, whole, x);
  }
}

}  // namespace

void cross_entropy(const Logits& logits, const int64_t* targets, int64_t ignored, bool need_grad, float* losses) {
  const auto run = [&](auto* rows) {
    const bool packed = reinterpret_cast<uintptr_t>(rows) % 16 == 0 && logits.stride * sizeof(*rows) % 16 == 0;
    launch(softmax_loss<std::remove_pointer_t<decltype(rows)>>, logits.rows, kThreads, 0, rows, targets, ignored,
           logits.V, logits.stride, packed, need_grad, losses);
  };
  switch (logits.type) {
    case Type::float32: return run(static_cast<float*>(logits.data));
    case Type::bfloat16: return run(static_cast<__nv_bfloat16*>(logits.data));
    case Type::float16: return run(static_cast<__half*>(logits.data));
  }
}

}  // namespace minidisp::cuda
