// The cross-entropy of rows of logits and its gradient, which overwrites them, on CUDA devices: the part of
// minidisp/loss.py between its matrix products. One block per row; the logits are read twice and written once, and
// everything is computed in float32. Without nvcc, this file is plain C++: tests/cuda_emulator.cpp runs it on the CPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#include "device.h"
#endif
#include "block.h"

namespace minidisp {
namespace {

// Row n: V logits from n stride on. losses (rows,): 0 if the target is ignored, and so is its gradient.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_loss(T* logits, const int64_t* targets, int64_t ignored, int64_t V, int64_t stride, bool packed,
                 bool need_grad, float* losses) {
  __shared__ double most_of[kWarps], sum_of[kWarps];
  T* const row = logits + static_cast<int64_t>(blockIdx.x) * stride;
  const int64_t target = targets[blockIdx.x];
  const bool counted = target != ignored;
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
    losses[blockIdx.x] =
        counted ? static_cast<float>(log(total)) - (static_cast<float>(row[target]) - largest) : 0.0f;
  if (!need_grad) return;
  __syncthreads();  // the target's logit has been read
  const float share = counted ? static_cast<float>(1 / total) : 0.0f;
  for (int64_t d = threadIdx.x * 8; d < V; d += kThreads * 8) {
    const bool whole = packed && d + 8 <= V;
    read8(row, 1, d, V, whole, x);
    for (int e = 0; e < 8; ++e)
      x[e] = counted ? expf(x[e] - largest) * share - (d + e == target ? 1.0f : 0.0f) : 0.0f;
    write8(row, d, V, whole, x);
  }
}

// logits (N, V), rows at any stride; targets (N,) int64. Returns the losses, float32 (N,).
at::Tensor cross_entropy_in(const at::Tensor& logits, const at::Tensor& targets, int64_t ignored, bool need_grad) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.stride(1) == 1 && targets.dim() == 1 && targets.is_contiguous() &&
                        targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong &&
                        targets.device() == logits.device(),
                    "minidisp::cross_entropy_ takes logits (N, V) with contiguous rows, and int64 targets (N,) on the "
                    "same device");
  const at::Tensor losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  const auto run = [&](auto* rows) {
    const bool packed = reinterpret_cast<uintptr_t>(rows) % 16 == 0 && logits.stride(0) * sizeof(*rows) % 16 == 0;
    launch(softmax_loss<std::remove_pointer_t<decltype(rows)>>, logits.size(0), kThreads, 0, rows,
           targets.const_data_ptr<int64_t>(), ignored, logits.size(1), logits.stride(0), packed, need_grad,
           losses.mutable_data_ptr<float>());
  };
  void* const data = logits.mutable_data_ptr();
  if (logits.scalar_type() == at::kFloat) run(static_cast<float*>(data));
  else if (logits.scalar_type() == at::kBFloat16) run(static_cast<c10::BFloat16*>(data));
  else if (logits.scalar_type() == at::kHalf) run(static_cast<c10::Half*>(data));
  else
    TORCH_CHECK_TYPE(false, "minidisp::cross_entropy_ takes float32, bfloat16 or float16, not ", logits.scalar_type());
  return losses;
}

#if defined(__CUDACC__)
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t ignored, bool need_grad) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return cross_entropy_in(logits, targets, ignored, need_grad);
}
#endif

}  // namespace
}  // namespace minidisp

#if defined(__CUDACC__)
TORCH_LIBRARY_IMPL(minidisp, CUDA, m) { m.impl("cross_entropy_", minidisp::cross_entropy); }
#endif
